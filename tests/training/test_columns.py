"""Columns that a `Trainer` keeps for a model that has a task-routed one inside."""

from __future__ import annotations

import datasets
import pytest
import torch
from adapters import poly, spread
from peft import get_peft_model
from rows import arguments, rows, with_ids
from tiny import TASKS, llama
from torch import nn
from transformers import Trainer

from peft_poly import DataCollatorWithTaskIds


class Deaf(nn.Module):
    """A model around an adapted one, which takes no task."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = spread(get_peft_model(llama(), poly("llama", task_names=TASKS, n_tasks=None, router_noise=False)))

    def forward(self, input_ids, labels=None):
        return self.inner(input_ids=input_ids, labels=labels)


class Listening(Deaf):
    """The same, which hands the task on."""

    def forward(self, input_ids, labels=None, task_ids=None):
        return self.inner(input_ids=input_ids, labels=labels, task_ids=task_ids)


@pytest.mark.parametrize("named", [True, False])
def test_a_model_inside_another_that_takes_the_ids_trains_as_by_itself(tmp_path, named):
    data = rows(4) if named else with_ids(rows(4))
    collator = DataCollatorWithTaskIds(task_names=TASKS) if named else None
    model = Listening().train()
    trainer = Trainer(
        model, arguments(tmp_path), train_dataset=datasets.Dataset.from_list(data), data_collator=collator
    )
    (batch,) = trainer.get_train_dataloader()
    ids, labels = batch["input_ids"], batch["labels"]
    names = [TASKS[task] for task in batch["task_ids"]]
    loss = trainer.compute_loss(model, dict(batch))
    torch.testing.assert_close(loss, model.inner(input_ids=ids, labels=labels, task_ids=names).loss)


@pytest.mark.parametrize("kind", [datasets.Dataset.from_list, list], ids=["dataset", "list"])
@pytest.mark.parametrize("named", [True, False])
def test_a_model_inside_another_that_takes_no_ids_says_which_column_is_dropped_and_what_keeps_it(tmp_path, named, kind):
    data = kind(rows(4) if named else with_ids(rows(4)))
    collator = DataCollatorWithTaskIds(task_names=TASKS) if named else None
    trainer = Trainer(Deaf(), arguments(tmp_path), train_dataset=data, data_collator=collator)
    column = "'task'" if named else "'task_ids'"
    with (
        pytest.warns(UserWarning, match=rf"drops the column {column} .* Let `Deaf\.forward` take `task_ids`"),
        pytest.raises(ValueError, match="task"),
    ):
        trainer.train()


def test_a_set_task_does_not_hide_that_the_rows_said_others(tmp_path):
    model = Deaf()
    model.inner.set_task("rte")
    trainer = Trainer(model, arguments(tmp_path), train_dataset=with_ids(rows(4)))
    with pytest.warns(UserWarning, match="drops the column 'task_ids'") as caught:
        trainer.train()
    assert len([warning for warning in caught if "drops the column" in str(warning.message)]) == 1
