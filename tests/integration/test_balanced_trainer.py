"""`TaskSamplingMixin` before a trainer class: the epochs are those of the sampler, also when a run is resumed."""

from __future__ import annotations

import inspect
from collections import Counter

import datasets
import pytest
import torch
from accelerate.data_loader import BatchSamplerShard, skip_first_batches
from rows import KINDS, with_ids
from tiny import TASKS
from torch.utils.data import BatchSampler, DataLoader
from trainer_steps import balanced, unequal
from transformers import TrainerCallback, TrainingArguments, default_data_collator
from transformers.trainer_utils import get_last_checkpoint

from peft_poly import TaskSampler


def epoch(sampler: TaskSampler, number: int = 0) -> list[int]:
    sampler.set_epoch(number)
    return list(sampler)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("column", ["task", "task_ids"])
def test_a_trainer_draws_its_epochs_by_task(tmp_path, kind, column):
    data = unequal() if column == "task" else with_ids(unequal())
    trainer, seen = balanced(tmp_path, KINDS[kind](data))
    trainer.train()
    drawn = [task for batch in seen.batches for task in batch]
    assert Counter(drawn[:24]) == Counter(drawn[24:]) == {0: 8, 1: 8, 2: 8}
    tasks = [TASKS.index(row["task"]) for row in unequal()]
    sampler = TaskSampler(tasks, "uniform", seed=5)
    assert drawn == [tasks[row] for row in epoch(sampler, 0) + epoch(sampler, 1)]


def test_the_seed_of_the_data_is_the_one_that_counts(tmp_path):
    first = balanced(tmp_path, unequal(), seed=1, data_seed=5)[0]._get_train_sampler()
    assert list(first) == list(TaskSampler([row["task"] for row in unequal()], "uniform", seed=5))


def test_a_resumed_run_draws_what_an_uninterrupted_one_does(tmp_path):
    class Stop(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            control.should_training_stop = state.global_step == 8  # in the second of two epochs of six steps

    saved = {"save_strategy": "steps", "save_steps": 4, "save_total_limit": 3}
    whole, all_seen = balanced(tmp_path / "whole", unequal(), **saved)
    whole.train()
    part, _ = balanced(tmp_path / "part", unequal(), **saved)
    part.add_callback(Stop())
    part.train()
    again, rest = balanced(tmp_path / "part", unequal(), **saved)
    again.train(resume_from_checkpoint=get_last_checkpoint(str(tmp_path / "part")))
    assert len(all_seen.batches) == 12
    assert rest.batches == all_seen.batches[8:]
    for (name, a), b in zip(whole.model.named_parameters(), again.model.parameters(), strict=True):
        assert torch.equal(a, b), name


def test_a_batch_that_does_not_fit_is_made_smaller_and_stays_balanced(tmp_path):
    trainer, seen = balanced(tmp_path, unequal(), auto_find_batch_size=True, num_train_epochs=1)

    def out_of_memory(module, args, kwargs):
        if len(kwargs["input_ids"]) > 3:
            raise RuntimeError("CUDA out of memory.")

    trainer.model.get_base_model().register_forward_pre_hook(out_of_memory, with_kwargs=True)
    trainer.train()
    fitted = [batch for batch in seen.batches if len(batch) <= 3]
    assert len(fitted) < len(seen.batches)
    assert Counter(task for batch in fitted for task in batch) == {0: 8, 1: 8, 2: 8}


def test_the_epoch_reaches_the_sampler_when_a_run_of_two_processes_is_resumed(tmp_path):
    trainer, _ = balanced(tmp_path, unequal())
    sampler = trainer._get_train_sampler()
    batches = BatchSamplerShard(BatchSampler(sampler, 4, False), 2, 1)
    resumed = skip_first_batches(DataLoader(unequal(), batch_sampler=batches), 1)
    assert len(resumed) == 2
    trainer.state.epoch = 1.25
    trainer.control = trainer.callback_handler.on_epoch_begin(trainer.args, trainer.state, trainer.control)
    sampler.set_epoch(0)  # as loaders of accelerate before 1.15 do, which begin anew where a run is resumed
    assert sampler.epoch == 1
    assert list(resumed.batch_sampler) == list(batches)[1:]


def test_what_sampling_by_task_cannot_serve_is_refused(tmp_path):
    stream = datasets.Dataset.from_list(unequal()).to_iterable_dataset()
    with pytest.raises(ValueError, match=r"A stream of rows cannot be sampled by task.*interleave_datasets"):
        balanced(tmp_path, stream, max_steps=2)
    with pytest.raises(ValueError, match=r'must be "proportional", "uniform" or a temperature above 0, got \'even\''):
        balanced(tmp_path, unequal(), task_balance="even")
    new = "train_sampling_strategy" in inspect.signature(TrainingArguments).parameters
    grouped = {"train_sampling_strategy": "group_by_length"} if new else {"group_by_length": True}
    with pytest.raises(ValueError, match=r"`task_balance` and `.*group_by_length.*both say the order"):
        balanced(tmp_path, unequal(), **grouped)
    bare, _ = balanced(tmp_path, [{"input_ids": [3], "labels": [3]}])
    with pytest.raises(ValueError, match="Row 0 of the data set has neither a column `task`"):
        bare.train()


def test_a_task_that_the_model_does_not_know_is_found_before_the_first_step(tmp_path):
    data = unequal()
    data[20]["task"] = "bolq"
    trainer, seen = balanced(tmp_path, data)
    match = r"Row 20 of the training data: Unknown task 'bolq'\. Did you mean 'boolq'\? Adapter 'default' knows: rte"
    with pytest.raises(ValueError, match=match):
        trainer.train()
    assert not seen.batches
    data = with_ids(unequal())
    data[3]["task_ids"] = 3
    with pytest.raises(ValueError, match=r"Row 3 of the training data: Task ids of adapter 'default' must lie in"):
        balanced(tmp_path, data)[0].train()


def test_rows_are_sampled_by_a_column_that_no_collator_reads(tmp_path):
    """The model computes one task, and the column says something else."""
    data = [{**row, "task": f"part {index % 2}"} for index, row in enumerate(unequal())]
    trainer, _ = balanced(tmp_path, data)
    trainer.data_collator = default_data_collator
    trainer.model.set_task("rte")
    assert set(trainer._get_train_sampler().rows) == {"part 0", "part 1"}
