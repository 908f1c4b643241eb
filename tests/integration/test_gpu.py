"""What only a GPU can show: low precision, compiled training, no waiting for the device, FSDP1.

All but the last class is skipped without one. That class looks for the same mistakes on the meta device, which has no
numbers: whoever wants to read one, as a wait for the GPU does, fails.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager

import peft
import pytest
import torch
import torch.distributed as dist
from peft.utils.other import fsdp_auto_wrap_policy
from tiny import CASES, TASKS
from torch import nn

from peft_poly import PolyConfig, create_poly_optimizer

TARGETS = {"llama": ["q_proj", "v_proj", "down_proj"], "mlp": ["lin0", "lin1"]}
TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 5e-2, torch.float16: 5e-3}
IDS = [2, 0, 1]
dtypes = pytest.mark.parametrize("dtype", TOLERANCE, ids=str)


def adapted(case: str = "llama", dtype: torch.dtype = torch.float32, **settings) -> peft.PeftModel:
    torch.manual_seed(0)
    defaults = {"task_names": TASKS, "n_splits": 2, "init_weights": False, "router_noise": False}
    config = PolyConfig(target_modules=TARGETS[case], task_type=CASES[case].task_type, **{**defaults, **settings})
    return peft.get_peft_model(CASES[case].make().to(dtype), config).eval()


def batch(case: str = "llama", device: str = "cuda", dtype: torch.dtype = torch.float32) -> dict[str, torch.Tensor]:
    inputs = CASES[case].inputs()
    return {k: v.to(device, dtype) if v.is_floating_point() else v.to(device) for k, v in inputs.items()}


def steps(model: nn.Module, n: int, **call) -> list[float]:
    optimizer = create_poly_optimizer(model, torch.optim.AdamW, lr=1e-2, router_lr=0.1)
    losses = []
    for _ in range(n):
        loss = model(**call, labels=call["input_ids"]).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.detach())
    return torch.stack(losses).tolist()


@contextmanager
def waiting_is_an_error() -> Iterator[None]:
    before = torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode(before)


@pytest.mark.gpu
class TestDtypes:
    @dtypes
    @pytest.mark.parametrize("grad", [False, True], ids=["inference", "training"])
    def test_outputs_are_those_of_the_cpu(self, dtype, grad):
        model = adapted(dtype=dtype)
        twin = copy.deepcopy(model).cuda()
        with torch.set_grad_enabled(grad):
            wanted = adapted(dtype=torch.float32)(**batch(device="cpu"), task_ids=IDS).logits
            found = twin(**batch(), task_ids=IDS).logits
        torch.testing.assert_close(found.float().cpu(), wanted, rtol=TOLERANCE[dtype], atol=TOLERANCE[dtype])

    @dtypes
    def test_gradients_are_those_of_the_cpu(self, dtype):
        models = [adapted(), adapted(dtype=dtype).cuda()]
        for model, device in zip(models, ("cpu", "cuda"), strict=True):
            inputs = batch(device=device)
            model.train()(**inputs, labels=inputs["input_ids"], task_ids=IDS).loss.backward()
        for (name, wanted), found in zip(models[0].named_parameters(), models[1].parameters(), strict=True):
            if wanted.requires_grad:
                scale = wanted.grad.abs().max().item()
                difference = (found.grad.float().cpu() - wanted.grad).abs().max().item()
                assert difference <= 4 * TOLERANCE[dtype] * scale, name

    def test_a_bf16_model_is_trained(self):
        model = adapted(dtype=torch.bfloat16, router_noise=True).cuda().train()
        losses = steps(model, 20, **batch(), task_ids=IDS)
        assert losses[-1] < losses[0]
        assert all(p.isfinite().all() for p in model.parameters())

    def test_a_model_is_trained_under_autocast(self):
        model = adapted().cuda().train()
        with torch.autocast("cuda", dtype=torch.bfloat16):
            losses = steps(model, 20, **batch(), task_ids=IDS)
        assert losses[-1] < losses[0]

    def test_generation_follows_the_task_of_each_row(self):
        model, inputs = adapted().cuda(), batch()
        options = {"max_new_tokens": 4, "min_new_tokens": 4, "do_sample": False}
        mixed = model.generate(**inputs, task_ids=IDS, **options)
        for row, task in enumerate(IDS):
            assert torch.equal(mixed[row], model.generate(**inputs, task_ids=task, **options)[row])

    def test_a_merged_task_gives_its_outputs(self):
        model = adapted().cuda()
        with torch.no_grad():
            routed = model(**batch(), task_ids="sst2").logits
            merged = model.merge_and_unload(task="sst2")(**batch()).logits
        torch.testing.assert_close(merged, routed, rtol=1e-3, atol=1e-4)


@pytest.mark.gpu
class TestCompile:
    @pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
    def test_the_whole_graph_is_compiled_and_gives_the_same(self, training):
        model, inputs = adapted().cuda().train(training), batch()
        compiled = torch.compile(copy.deepcopy(model), fullgraph=True)
        for ids in ([2, 0, 1], [1, 1, 0]):
            ids = torch.tensor(ids, device="cuda")
            with torch.set_grad_enabled(training):
                outputs = [each(**inputs, task_ids=ids).logits for each in (model, compiled)]
            torch.testing.assert_close(*outputs, rtol=1e-3, atol=1e-4)

    def test_compiled_training_lowers_the_loss_as_eager_training_does(self):
        model = adapted().cuda().train()
        compiled = torch.compile(copy.deepcopy(model))
        losses = [steps(each, 10, **batch(), task_ids=torch.tensor(IDS, device="cuda")) for each in (model, compiled)]
        assert losses[1] == pytest.approx(losses[0], rel=1e-2)


@pytest.mark.gpu
class TestWaiting:
    def test_the_test_would_notice(self):
        with waiting_is_an_error(), pytest.raises(RuntimeError, match="synchroniz"):
            torch.ones(1, device="cuda").item()

    @pytest.mark.parametrize("case", ["mlp", "llama"])
    @pytest.mark.parametrize("noise", [False, True], ids=["without noise", "with noise"])
    @pytest.mark.parametrize("ids", [IDS, TASKS, 1, "rte", torch.tensor(IDS)], ids=str)
    def test_no_forward_or_backward_waits_for_the_device(self, case, noise, ids):
        model, inputs = adapted(case, router_noise=noise).cuda().train(), batch(case)
        inputs.pop("attention_mask", None)  # transformers reads it
        ids = ids.cuda() if isinstance(ids, torch.Tensor) else ids
        first = lambda out: out if isinstance(out, torch.Tensor) else out.logits  # noqa: E731
        first(model(**inputs, task_ids=ids)).sum().backward()  # libraries set themselves up
        with waiting_is_an_error():
            first(model(**inputs, task_ids=ids)).sum().backward()
            with torch.no_grad():
                model.eval()(**inputs, task_ids=ids)


@pytest.mark.gpu
class TestFSDP1:
    """One rank, which holds all parameters. With two, test_many_processes shards, gathers, saves, resumes."""

    def test_it_trains_as_an_unwrapped_model_does(self):
        from torch.distributed.fsdp import FullyShardedDataParallel

        dist.init_process_group("nccl", store=dist.HashStore(), rank=0, world_size=1)
        try:
            model = adapted().cuda().train()
            twin = copy.deepcopy(model)
            policy = fsdp_auto_wrap_policy(model)
            wrapped = FullyShardedDataParallel(model, auto_wrap_policy=policy, use_orig_params=True, device_id=0)
            losses = [steps(each, 5, **batch(), task_ids=IDS) for each in (twin, wrapped)]
            assert losses[1] == pytest.approx(losses[0], rel=1e-4)
        finally:
            dist.destroy_process_group()


class TestOnTheMetaDevice:
    """Reading a number of a tensor on the meta device raises, as waiting for a GPU would cost."""

    def test_the_test_would_notice(self):
        with pytest.raises((NotImplementedError, RuntimeError)):
            torch.ones(1, device="meta").item()

    @pytest.mark.parametrize("noise", [False, True], ids=["without noise", "with noise"])
    @pytest.mark.parametrize("ids", [IDS, TASKS, 1, "rte", torch.tensor(IDS)], ids=str)
    def test_no_forward_or_backward_reads_a_number_of_a_tensor(self, noise, ids):
        model = adapted("mlp", router_noise=noise).to("meta").train()
        x = batch("mlp", "meta")["x"].requires_grad_()
        ids = ids.to("meta") if isinstance(ids, torch.Tensor) else ids
        model(x, task_ids=ids).sum().backward()
        assert all(p.grad is not None for p in model.parameters() if p.requires_grad)
        with torch.no_grad():
            assert model.eval()(x, task_ids=ids).shape == (3, 5, 4)
