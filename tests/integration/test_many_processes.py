"""Two processes on one machine (gloo): DDP and FSDP2 do what one process does on the same global batches.

`ranks_steps.py` has what they run. On CPUs accelerate shards nothing unless `on_cpus.py` tells it to; that patch is
in these tests alone. FSDP1 does not run on CPUs: `integration/test_gpu.py`.
"""

from __future__ import annotations

from importlib.metadata import version
from pathlib import Path
from typing import Any

import peft
import pytest
import ranks_steps
import torch
import yaml
from accelerate.commands.config.config_args import load_config_from_file
from accelerate.commands.launch import launch_command_parser
from adapters import GATES
from packaging.version import Version
from processes import CONFIGS, DEEPSPEED, TORCHRUN, accelerate, launch
from safetensors.torch import load_file

HERE = Path(__file__).parent
LOSSES = {"rel": 1e-5} if Version(version("transformers")).major >= 5 else {"abs": 6e-5}  # 4 rounds them to four digits

pytestmark = pytest.mark.processes


def results(folder: Path, step: str) -> list[dict[str, Any]]:
    """What each of the two ranks has left."""
    return [torch.load(folder / f"{step}-{rank}.pt", weights_only=False) for rank in range(2)]


def saved(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "adapter_model.safetensors")


def assert_same(found: dict[str, torch.Tensor], wanted: dict[str, torch.Tensor]) -> None:
    assert found.keys() == wanted.keys()
    for name, tensor in wanted.items():
        torch.testing.assert_close(found[name], tensor, rtol=1e-4, atol=2e-6, msg=lambda text, name=name: name + text)


@pytest.fixture(scope="module")
def one_process(tmp_path_factory) -> dict[str, Any]:
    """The same training in this process: losses, the adapter saved, and what it began with."""
    folder, model = tmp_path_factory.mktemp("one"), ranks_steps.build()
    before = ranks_steps.adapter_of(model)
    trainer = ranks_steps.trainer(folder, model)
    trainer.train()
    trainer.save_model(str(folder / "adapter"))
    after = ranks_steps.adapter_of(model)
    assert all((after[name] - tensor).abs().max() > 1e-3 for name, tensor in before.items())
    return {
        "losses": ranks_steps.losses_of(trainer),
        "saved": saved(folder / "adapter"),
        "before": before,
        "model": model,
    }


@pytest.fixture(scope="module")
def by_torchrun(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("torchrun")
    launch(TORCHRUN, HERE / "ranks_steps.py", "ddp", "raw", "gated", folder)
    return folder


class TestDDP:
    def test_two_ranks_train_as_one_process_does(self, by_torchrun, one_process):
        for result in results(by_torchrun, "ddp"):
            assert (result["world"], result["wrapped"]) == (2, "DistributedDataParallel")
            assert result["losses"] == pytest.approx(one_process["losses"], **LOSSES)
        assert_same(saved(by_torchrun / "ddp"), one_process["saved"])

    def test_the_ranks_agree_to_the_bit(self, by_torchrun):
        first, second = (result["adapter"] for result in results(by_torchrun, "ddp"))
        assert all(torch.equal(tensor, second[name]) for name, tensor in first.items())

    def test_a_task_that_no_rank_has_keeps_its_router_row(self, by_torchrun, one_process):
        trained = results(by_torchrun, "ddp")[0]["adapter"]
        rows = [name for name in trained if "module_logits" in name]
        assert rows
        for name in rows:
            assert torch.equal(trained[name][3], one_process["before"][name][3])
            assert not torch.equal(trained[name][:3], one_process["before"][name][:3])

    def test_with_one_seed_the_ranks_draw_the_same_noise_for_different_rows(self, by_torchrun):
        (noise, ids), (other_noise, other_ids) = (result["samples"]["as is"] for result in results(by_torchrun, "ddp"))
        assert torch.equal(noise, other_noise)
        assert not torch.equal(ids, other_ids)

    def test_a_seed_per_rank_gives_each_its_noise_and_leaves_the_order_of_rows(self, by_torchrun):
        for result in (ranks := results(by_torchrun, "ddp")):
            assert torch.equal(result["samples"]["by rank"][1], result["samples"]["as is"][1])
        (noise, _), (other_noise, _) = (result["samples"]["by rank"] for result in ranks)
        assert not torch.isclose(noise, other_noise).any()


class TestFullyShard:
    def test_sharded_ranks_train_as_one_process_does(self, by_torchrun, one_process):
        for result in results(by_torchrun, "raw"):
            assert (result["world"], result["sharded"]) == (2, True)
            assert result["losses"] == pytest.approx(one_process["losses"], **LOSSES)

    def test_the_gathered_adapter_is_whole_and_saved_by_rank_0_alone(self, by_torchrun, one_process):
        assert_same(saved(by_torchrun / "raw"), one_process["saved"])  # rank 1 saved, too: nothing, as it was given

    def test_a_saved_adapter_computes_what_the_one_process_run_does(self, by_torchrun, one_process):
        loaded = peft.PeftModel.from_pretrained(ranks_steps.build().unload(), by_torchrun / "raw").eval()
        ids = torch.stack([row["input_ids"] for row in ranks_steps.rows()[:4]])
        with torch.no_grad():
            outputs = [
                model(input_ids=ids, task_ids=[0, 1, 2, 3]).logits for model in (loaded, one_process["model"].eval())
            ]
        torch.testing.assert_close(*outputs, rtol=1e-4, atol=1e-5)

    def test_it_resumes(self, by_torchrun, one_process):
        for result in results(by_torchrun, "raw"):
            assert result["resumed"] == pytest.approx(one_process["losses"], **LOSSES)
        assert_same(saved(by_torchrun / "raw-resumed"), saved(by_torchrun / "raw"))

    def test_saving_without_gathering_says_how_and_leaves_nothing(self, by_torchrun):
        for result in results(by_torchrun, "raw"):
            assert "must be whole to be saved, but it is sharded by FSDP (`fully_shard`)" in result["errors"]["save"]
            assert "StateDictOptions(full_state_dict=True, cpu_offload=True)" in result["errors"]["save"]
            assert "has a part of base_model.model.model.layers.0" in result["errors"]["given"]
            assert not result["folder"]

    @pytest.mark.parametrize(
        ("verb", "purpose"),
        [("merge", "be merged"), ("routing", "be looked at"), ("export", "be exported"), ("grow", "grow")],
    )
    def test_what_needs_the_whole_adapter_says_so(self, by_torchrun, verb, purpose):
        for result in results(by_torchrun, "raw"):
            assert result["errors"][verb].startswith(f"Adapter 'default' must be whole to {purpose}, but it is sharded")


def test_ranks_train_gates_as_one_process_does(by_torchrun, tmp_path):
    alone = ranks_steps.trainer(tmp_path, ranks_steps.build(**GATES))
    alone.train()
    alone.save_model(str(tmp_path / "adapter"))
    losses, (first, second) = ranks_steps.losses_of(alone), results(by_torchrun, "gated")
    for result in (first, second):
        assert result["ddp"] == pytest.approx(losses, **LOSSES)
        assert result["fully_shard"] == pytest.approx(losses, **LOSSES)
    assert all(torch.equal(tensor, second["adapter"][name]) for name, tensor in first["adapter"].items())
    assert_same(first["adapter"], ranks_steps.adapter_of(alone.model))
    assert_same(saved(by_torchrun / "gated"), saved(tmp_path / "adapter"))


# ------------------------------------------------------------------------------- Trainer under a sharding launcher
class Sharded:
    """A run under one of the configs of `examples/accelerate`, and what it must have come to."""

    config: str
    kind: tuple[str, bool]
    timeout = 200
    gpus = False

    @pytest.fixture(scope="class")
    def folder(self, tmp_path_factory) -> Path:
        folder = tmp_path_factory.mktemp(self.config)
        command = [HERE / "ranks_steps.py", "sharding_trainer", folder]
        command = command if self.gpus else [HERE / "on_cpus.py", *command]
        launch(accelerate(f"{self.config}.yaml"), *command, timeout=self.timeout, gpus=self.gpus)
        return folder

    def test_the_trainer_trains_as_one_process_does(self, folder, one_process):
        for result in results(folder, "sharding_trainer"):
            assert (result["world"], result["type"], result["fsdp2"]) == (2, *self.kind)
        assert results(folder, "sharding_trainer")[0]["losses"] == pytest.approx(one_process["losses"], **LOSSES)

    def test_it_saves_the_whole_adapter(self, folder, one_process):
        assert_same(saved(folder / "whole"), one_process["saved"])

    def test_it_resumes(self, folder, one_process):
        losses = results(folder, "sharding_trainer")[0]["resumed"]
        assert losses[-2:] == pytest.approx(one_process["losses"][-2:], rel=1e-5)
        assert_same(saved(folder / "resumed"), saved(folder / "whole"))

    def test_it_generates_for_the_task_of_each_row(self, folder, one_process):
        ids = ranks_steps.rows()[0]["input_ids"].repeat(2, 1)
        options = {"max_new_tokens": 3, "min_new_tokens": 3, "do_sample": False}
        tokens = one_process["model"].eval().generate(input_ids=ids, task_ids=["rte", "boolq"], **options)
        assert all(torch.equal(result["tokens"], tokens) for result in results(folder, "sharding_trainer"))


class TestFSDP2(Sharded):
    config, kind = "fsdp2", ("FSDP", True)

    @pytest.mark.skipif(Version(version("accelerate")) < Version("1.15"), reason="accelerate resumes FSDP2 since 1.15")
    def test_it_resumes(self, folder, one_process):
        super().test_it_resumes(folder, one_process)

    def test_saving_without_gathering_says_how(self, folder):
        for result in results(folder, "sharding_trainer"):
            assert "`Trainer.save_model(folder)` does both, with FSDP's FULL_STATE_DICT" in result["error"]


@pytest.mark.slow
@pytest.mark.timeout(700)  # the first run compiles a part of DeepSpeed
@DEEPSPEED
class TestZeRO2(Sharded):
    config, kind, timeout = "zero2", ("DEEPSPEED", False), 600

    def test_the_adapter_is_whole_on_every_rank(self, folder):
        assert results(folder, "sharding_trainer")[0]["error"] == "no error"


@pytest.mark.slow
@pytest.mark.timeout(700)
@DEEPSPEED
class TestZeRO3(Sharded):
    config, kind, timeout = "zero3", ("DEEPSPEED", False), 600

    def test_saving_without_gathering_says_how(self, folder):
        for result in results(folder, "sharding_trainer"):
            assert "it is sharded by DeepSpeed ZeRO-3" in result["error"]
            assert "`stage3_gather_16bit_weights_on_model_save`" in result["error"]


@pytest.mark.gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
class TestFSDP1(Sharded):
    config, kind, gpus = "fsdp1", ("FSDP", False), True


# ------------------------------------------------------------------------------------------------------------- configs
KINDS = {"ddp": "MULTI_GPU", "fsdp1": "FSDP", "fsdp2": "FSDP", "zero2": "DEEPSPEED", "zero3": "DEEPSPEED"}


def test_every_config_is_tested():
    assert {path.stem for path in CONFIGS.glob("*.yaml")} == set(KINDS)


@pytest.mark.parametrize("name", KINDS)
def test_accelerate_reads_the_config_and_knows_each_of_its_keys(name):
    config = load_config_from_file(str(CONFIGS / f"{name}.yaml"))  # raises for keys that it does not know
    assert (config.distributed_type.value, config.num_processes, config.mixed_precision) == (KINDS[name], 2, "no")


@pytest.mark.parametrize(
    ("name", "section", "expected"),
    [
        ("fsdp1", "fsdp_config", {"fsdp_version": 1, "fsdp_state_dict_type": "FULL_STATE_DICT"}),
        ("fsdp2", "fsdp_config", {"fsdp_version": 2, "fsdp_state_dict_type": "FULL_STATE_DICT"}),
        ("zero2", "deepspeed_config", {"zero_stage": 2}),
        ("zero3", "deepspeed_config", {"zero_stage": 3}),
    ],
)
def test_the_settings_of_fsdp_and_deepspeed_are_ones_of_the_launcher(name, section, expected):
    options = {action.dest for action in launch_command_parser()._actions}
    settings = yaml.safe_load((CONFIGS / f"{name}.yaml").read_text(encoding="utf-8"))[section]
    assert settings.keys() <= options
    assert {key: settings[key] for key in expected} == expected
