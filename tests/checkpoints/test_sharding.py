"""Adapters that are spread over processes, seen in one process: a group of one rank shards just the same."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Iterator

import peft
import pytest
import torch
import torch.distributed as dist
from peft.utils.other import fsdp_auto_wrap_policy
from tiny import CASES, TASKS, llama
from torch import nn

from peft_poly import PolyConfig, PolyLayer

TARGETS = ["q_proj", "down_proj"]


@pytest.fixture
def group() -> Iterator[None]:
    """A process group of this process alone."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def adapted(**settings) -> peft.PeftModel:
    torch.manual_seed(0)
    defaults = {"target_modules": TARGETS, "task_names": TASKS, "n_splits": 2, "init_weights": False}
    return peft.get_peft_model(llama(), PolyConfig(task_type="CAUSAL_LM", **{**defaults, **settings}))


def fully_sharded(model: peft.PeftModel) -> peft.PeftModel:
    from torch.distributed.fsdp import fully_shard

    return fully_shard(model, mesh=dist.device_mesh.init_device_mesh("cpu", (1,)))


def like_zero3(model: peft.PeftModel) -> peft.PeftModel:
    """Parameters as DeepSpeed ZeRO-3 leaves them between calls."""
    for parameter in model.parameters():
        parameter.data, parameter.ds_id = torch.empty(0), 0
    return model


def like_fsdp1(model: peft.PeftModel) -> peft.PeftModel:
    """Parameters as FSDP1 with `use_orig_params=True` leaves them between calls."""
    for parameter in model.parameters():
        parameter.data = parameter.data.flatten()[: parameter.numel() // 2]
    return model


KINDS = {
    "FSDP (`fully_shard`)": fully_sharded,
    "DeepSpeed ZeRO-3": like_zero3,
    "FSDP": like_fsdp1,
}
VERBS = {
    "be looked at": lambda model, folder: model.routing_weights(),
    "grow": lambda model, folder: model.add_tasks(["new"]),
    "shrink": lambda model, folder: model.remove_tasks("rte"),
    "be averaged": lambda model, folder: model.average_skills(),
    "be merged": lambda model, folder: model.merge_adapter(task="rte"),
    "be exported": lambda model, folder: model.export_lora("rte", folder / "lora"),
}
per_kind = pytest.mark.parametrize(("how", "shard"), KINDS.items(), ids=KINDS)


class TestWhatNeedsTheWhole:
    @per_kind
    def test_saving_says_how_to_gather_and_writes_nothing(self, group, tmp_path, how, shard):
        model = shard(adapted())
        with pytest.raises(
            ValueError, match=r"must be whole to be saved, but .*get_model_state_dict.*Trainer"
        ) as error:
            model.save_pretrained(tmp_path / "adapter")
        assert f"it is sharded by {how}, and this process has a part of its tensors in base_model" in str(error.value)
        assert not (tmp_path / "adapter").exists()

    @pytest.mark.parametrize("is_main_process", [False, True])
    def test_every_rank_gets_the_error(self, group, tmp_path, is_main_process):
        with pytest.raises(ValueError, match="must be whole to be saved"):
            fully_sharded(adapted()).save_pretrained(tmp_path, is_main_process=is_main_process)

    def test_pushing_says_so_before_it_makes_a_repository(self, group):
        with pytest.raises(ValueError, match="must be whole to be saved"):
            fully_sharded(adapted()).push_to_hub("user/adapter")

    @per_kind
    @pytest.mark.parametrize("purpose", VERBS)
    def test_a_verb_says_so_and_changes_nothing(self, group, tmp_path, how, shard, purpose):
        model = shard(adapted())
        before = {name: id(p) for name, p in model.named_parameters()}
        with pytest.raises(ValueError, match=f"^Adapter 'default' must be whole to {purpose}, but it is sharded by"):
            VERBS[purpose](model, tmp_path)
        assert {name: id(p) for name, p in model.named_parameters()} == before
        assert not any(layer.merged for layer in model.modules() if isinstance(layer, PolyLayer))
        assert model.task_names == TASKS


class TestGivenTensors:
    def test_whole_ones_are_saved(self, group, tmp_path):
        whole, model = adapted(), fully_sharded(adapted())
        state = {name: tensor.full_tensor() for name, tensor in model.state_dict().items()}
        model.save_pretrained(tmp_path, state_dict=state)
        loaded = peft.PeftModel.from_pretrained(whole.unload(), tmp_path).state_dict()
        assert all(torch.equal(loaded[name], state[name]) for name in state if "poly_" in name)

    @pytest.mark.parametrize("granularity", ["layer", "block", "model"])
    @pytest.mark.parametrize("router_only", [False, True])
    def test_the_state_of_the_model_itself_is_enough(self, tmp_path, granularity, router_only):
        model = adapted(router_granularity=granularity)
        if router_only:
            model.train_router_only()
        model.save_pretrained(tmp_path, state_dict=model.state_dict())
        assert (tmp_path / "adapter_model.safetensors").exists()

    def test_parts_are_refused(self, group, tmp_path):
        model = fully_sharded(adapted())
        with pytest.raises(RuntimeError, match=r"`state_dict` has a part of .*poly_lora_A.default only: it is sharded"):
            model.save_pretrained(tmp_path / "adapter", state_dict=model.state_dict())
        assert not (tmp_path / "adapter").exists()

    def test_missing_ones_are_named(self, tmp_path):
        model = adapted()
        model.train_router_only()
        trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
        with pytest.raises(
            RuntimeError, match=r"lacks 8 of the 12 tensors of adapter 'default', such as .*train_router_only"
        ):
            model.save_pretrained(tmp_path, state_dict=trained)
        with pytest.raises(RuntimeError, match=r"lacks 12 of the 12 tensors.*Names must be those of this model"):
            model.save_pretrained(
                tmp_path, state_dict={f"module.{key}": value for key, value in model.state_dict().items()}
            )

    @pytest.mark.parametrize("settings", [{}, {"modules_to_save": ["lm_head"]}])
    def test_where_there_are_none_what_rank_0_has_saved_stays(self, tmp_path, settings):
        model = adapted(**settings)
        model.save_pretrained(tmp_path)
        before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
        with pytest.warns(UserWarning, match="`state_dict` is empty, so that nothing is saved"):
            model.save_pretrained(tmp_path, state_dict={})
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            model.save_pretrained(tmp_path, state_dict={}, is_main_process=False)
        assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


class TestFSDP1:
    """What of FSDP1 can be seen on a CPU, where it does not shard: how it wraps. The rest: test_gpu."""

    def wrapped(self, model: nn.Module, use_orig_params: bool) -> nn.Module:
        from torch.distributed.fsdp import FullyShardedDataParallel, ShardingStrategy

        return FullyShardedDataParallel(
            model, auto_wrap_policy=fsdp_auto_wrap_policy(model), use_orig_params=use_orig_params,
            sharding_strategy=ShardingStrategy.NO_SHARD, device_id=torch.device("cpu"),
        )  # fmt: skip

    def test_pefts_policy_wraps_with_use_orig_params(self, group):
        model = adapted(router_noise=False)
        call = {**CASES["llama"].inputs(), "task_ids": TASKS}
        twin, grads = copy.deepcopy(model), []
        for each in (twin, self.wrapped(model, use_orig_params=True)):
            each(**call, labels=call["input_ids"]).loss.backward()
            grads.append(
                {n.replace("_fsdp_wrapped_module.", ""): p.grad for n, p in each.named_parameters() if "poly_" in n}
            )
        assert all(torch.allclose(grads[0][name], grads[1][name], atol=1e-6) for name in grads[0])

    def test_without_it_torch_refuses_frozen_and_trained_parameters_in_one_unit(self, group):
        with pytest.raises(ValueError, match="Must flatten tensors with uniform `requires_grad`"):
            self.wrapped(adapted(), use_orig_params=False)
