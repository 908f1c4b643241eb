"""Rows with tasks, and quiet settings of a Trainer, for the tests that train."""

from __future__ import annotations

from typing import Any

import datasets
import torch
from tiny import TASKS, VOCAB
from torch.utils.data import Dataset
from transformers import PreTrainedTokenizerFast, Seq2SeqTrainingArguments, TrainingArguments


def rows(n: int = 12, length: int = 6, tasks: list[str] = TASKS, seed: int = 0) -> list[dict[str, Any]]:
    """Rows of tokens that are their own labels; the tasks take turns, by name, and a column is of no use.

    The first token is no label: for a causal model it never is, but some releases of transformers count it.
    """
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randint(3, VOCAB, (n, length), generator=generator).tolist()
    return [
        {"input_ids": ids, "labels": [-100, *ids[1:]], "task": tasks[index % len(tasks)], "note": f"row {index}"}
        for index, ids in enumerate(tokens)
    ]


def with_ids(found: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The rows with the column `task_ids` in place of `task`."""
    return [{**{k: v for k, v in row.items() if k != "task"}, "task_ids": TASKS.index(row["task"])} for row in found]


class TorchRows(Dataset):
    """A torch data set of the rows."""

    def __init__(self, found: list[dict[str, Any]]) -> None:
        self.found = found

    def __len__(self) -> int:
        return len(self.found)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return self.found[index]


KINDS = {"torch": TorchRows, "datasets": datasets.Dataset.from_list}


def arguments(folder: Any, **settings: Any) -> TrainingArguments:
    """Two steps of four rows on the CPU, nothing printed, nothing saved, unless said otherwise."""
    return TrainingArguments(str(folder), **{**QUIET, **settings})


def seq2seq_arguments(folder: Any, **settings: Any) -> Seq2SeqTrainingArguments:
    """As `arguments`, with generation at evaluation."""
    return Seq2SeqTrainingArguments(str(folder), **{**QUIET, "predict_with_generate": True, **settings})


QUIET = {
    "max_steps": 2, "per_device_train_batch_size": 4, "per_device_eval_batch_size": 4, "learning_rate": 0.01,
    "report_to": [], "use_cpu": True, "save_strategy": "no", "disable_tqdm": True, "dataloader_pin_memory": False,
}  # fmt: skip


def tokenizer() -> PreTrainedTokenizerFast:
    """Words w3, w4, ... for the tokens 3, 4, ...; 0 pads, 1 ends, 2 begins."""
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from tokenizers.pre_tokenizers import WhitespaceSplit

    words = ["<pad>", "</s>", "<s>", *(f"w{index}" for index in range(3, VOCAB))]
    inner = Tokenizer(WordLevel({word: index for index, word in enumerate(words)}, unk_token="w3"))
    inner.pre_tokenizer = WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=inner, pad_token="<pad>", eos_token="</s>", bos_token="<s>")
