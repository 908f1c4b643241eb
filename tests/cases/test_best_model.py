"""`load_best_model_at_end` restores the best adapter, whatever its name."""

from __future__ import annotations

import peft
import pytest
import torch
from rows import TorchRows, arguments, rows, with_ids
from tiny import TASKS, llama
from transformers import Trainer

from peft_poly import PolyConfig


@pytest.mark.parametrize("name", ["default", "mine"])
@pytest.mark.parametrize("beside", [False, True])
def test_the_best_adapter_is_restored(name, beside, tmp_path):
    torch.manual_seed(0)
    config = PolyConfig(task_type="CAUSAL_LM", task_names=TASKS, router_noise=False)
    model = peft.get_peft_model(llama(), config, adapter_name=name)
    if beside:
        model.add_adapter("other", PolyConfig(task_type="CAUSAL_LM", task_names=TASKS))
    data, losses, states = TorchRows(with_ids(rows())), {1: 1.0, 2: 3.0, 3: 2.0}, {}

    class Judged(Trainer):
        def evaluate(self, *args, **kwargs):
            step = self.state.global_step
            states[step] = {n: p.detach().clone() for n, p in self.model.named_parameters() if f".{name}" in n}
            self.log(metrics := {"eval_loss": losses[step]})
            return metrics

    settings = {"eval_strategy": "steps", "save_strategy": "steps", "eval_steps": 1, "save_steps": 1, "max_steps": 3}
    args = arguments(tmp_path, **settings, load_best_model_at_end=True, learning_rate=0.5)
    Judged(model, args, train_dataset=data, eval_dataset=data).train()
    assert len(states) == 3
    for key, best in states[1].items():
        assert torch.equal(model.get_parameter(key), best)
    assert any(not torch.equal(states[3][key], best) for key, best in states[1].items())
