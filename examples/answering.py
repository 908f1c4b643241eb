"""What `serve.py` answers, and how one batch of requests becomes one forward: labels and ranking.

A service checks a request when it comes, so that nothing wrong gets into a batch, and turns it into token ids. Later
its `run` answers many of them at once, each row with the task of its own. `check` runs in the thread of the server and
`run` in that of the batches; only `check` calls the tokenizer, which is not made for two threads at once.
"""

from __future__ import annotations

import unicodedata
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Annotated, Any

import torch
from peft import PeftConfig
from pydantic import AfterValidator, BaseModel, ConfigDict, Field, StrictInt
from pydantic_core import PydanticCustomError
from ranking import Ranker, load_tasks
from torch.nn.utils.rnn import pad_sequence


class UnknownTaskError(Exception):
    """The adapter has no such task; the message has the closest match."""


def is_blank(text: str) -> bool:
    """Whether it has nothing but spaces, and characters for control and format."""
    return all(unicodedata.category(character) in ("Cc", "Cf", "Zl", "Zp", "Zs") for character in text)


def _not_blank(text: str) -> str:
    if is_blank(text):
        raise PydanticCustomError("blank", "The text is blank; it needs a character that can be seen")
    return text


Option = Annotated[str, Field(min_length=1, max_length=2_000)]  # without a limit, pydantic lets half characters in
Text = Annotated[str, Field(min_length=1, max_length=20_000), AfterValidator(_not_blank)]


class Request(BaseModel):
    """What every request has; a key that is not known is an error."""

    model_config = ConfigDict(extra="forbid")
    task: StrictInt | Annotated[str, Field(max_length=1_000)] = Field(description="A task's name or id.")
    input: Text


class RankRequest(Request):
    """A text, and options to choose from: those that the task was trained on, if none are given."""

    instruction: str | None = Field(None, max_length=2_000, description="What is asked; the task's own by default.")
    options: list[Option] | None = Field(None, min_length=2, max_length=64, description="The task's own by default.")


class RankAnswer(BaseModel):
    answer: str
    probabilities: dict[str, float] = Field(description="Of the options; their sum is 1.")


class ClassifyRequest(Request):
    """A text to classify."""


class ClassifyAnswer(BaseModel):
    """What the head of the task says; of a number its `value`, else `labels`, which are several in some tasks."""

    task: str | int
    labels: list[str] | None = Field(None, description="The likeliest, or, where several may hold, all likely ones.")
    probabilities: dict[str, float] | None = Field(None, description="Of the labels, by name.")
    value: float | None = Field(None, description="The number.")


@dataclass(frozen=True)
class Item:
    """A request that was checked: its task, its tokens, and what else its service needs.

    The task is a name where tasks have names: an id may mean another one once the adapter was loaded anew.
    """

    task: int | str
    tokens: list[int]
    options: dict[str, list[int]] | None = None  # the tokens of each
    max_new_tokens: int = 0


class Service:
    """A model with a task-routed adapter, and its tokenizer.

    Args:
        model: the `PeftModel`.
        tokenizer: its tokenizer.
        max_length: most tokens of a text; nothing is cut off silently.
        max_new_tokens: most tokens that are generated.
        source: where the adapter was read from, to be read again.

    Raises:
        ValueError: the model has too few positions for texts so long.
    """

    padding_side = "right"

    def __init__(self, model: Any, tokenizer: Any, max_length: int, max_new_tokens: int = 0, source: str = "") -> None:
        positions = getattr(model.config, "max_position_embeddings", None)
        if positions and max_length + max_new_tokens > positions:
            asked = f"{max_length} tokens of a text and {max_new_tokens} new ones"
            raise ValueError(
                f"The model has {positions} positions, too few for {asked}. Choose a smaller --max_length."
            )
        self.model, self.tokenizer = model.eval(), tokenizer
        self.max_length, self.max_new_tokens, self.source = max_length, max_new_tokens, source
        self.stopping = False  # nobody waits any more for what is being computed

    @property
    def tasks(self) -> list[Any]:
        """Names of the tasks, or their ids if they have none."""
        return self.model.task_names or list(range(self.model.active_peft_config.n_tasks))

    def task(self, asked: int | str) -> int | str:
        """The task that a request asks for, as `tasks` has it; a name that is not there if the adapter lets it in."""
        try:
            return self.tasks[self.model.task_id(asked)]
        except ValueError as error:
            if isinstance(asked, str) and self.model.active_peft_config.unknown_task == "mean":
                return asked
            raise UnknownTaskError(str(error)) from error

    def reload(self) -> None:
        """Read the saved adapter again, with the tasks that it has by now; call it while no batch is computed.

        Raises:
            OSError: it cannot be read; the one that was there stays.
            ValueError: it is no adapter of this kind for this model; the one that was there stays.
        """
        model, old = self.model, self.model.active_adapter
        new = "default" if old != "default" else "reloaded"
        config = PeftConfig.from_pretrained(self.source)
        if (config.peft_type, config.task_type) != (
            model.active_peft_config.peft_type,
            model.active_peft_config.task_type,
        ):
            raise ValueError(f"{self.source} is now of type {config.peft_type.value}, for {config.task_type}.")
        try:
            model.load_adapter(self.source, new)
        except Exception as error:  # of torch, where shapes do not fit
            if new in model.peft_config:
                model.delete_adapter(new)
            raise ValueError(f"{self.source} cannot be loaded: {error}") from error
        model.peft_config[new].unknown_task = model.peft_config[old].unknown_task
        model.set_adapter(new)
        model.delete_adapter(old)
        model.eval()

    def tokens(self, what: str, text: str, **how: Any) -> list[int]:
        """Token ids of a text; `how` goes to the tokenizer.

        Raises:
            ValueError: it is too long, or has none but those that a tokenizer adds to a blank.
        """
        ids = [] if is_blank(text) else self.tokenizer(text, **how)["input_ids"]
        if not 0 < len(ids) <= self.max_length:
            raise ValueError(f"The {what} has {len(ids)} tokens; 1 to {self.max_length} are allowed.")
        return ids

    def padded(self, rows: Iterable[list[int]]) -> dict[str, torch.Tensor]:
        """The rows as one batch, `(b, l)`, on the device of the model."""
        ids = [torch.tensor(row) for row in rows]
        how = {"batch_first": True, "padding_side": self.padding_side}
        tokens = pad_sequence(ids, padding_value=self.tokenizer.pad_token_id, **how)
        mask = pad_sequence([torch.ones_like(row) for row in ids], **how)
        return {"input_ids": tokens.to(self.model.device), "attention_mask": mask.to(self.model.device)}


class RankService(Service):
    """Answers with the option nearest to the text; see `ranking.py`.

    The vector of a task's option depends on nothing else, so it is kept, up to `KEPT` of them. `known` reads what a
    request need not say, as `tasks_of_data` does.
    """

    path, request, answer = "/rank", RankRequest, RankAnswer
    KEPT, MOST_ROWS = 10_000, 256  # vectors kept; rows of one forward

    def __init__(
        self,
        model: Any,
        tokenizer: Any,
        max_length: int,
        temperature: float,
        known: Callable[[], dict[str, Any]],
        source: str = "",
    ) -> None:
        super().__init__(model, tokenizer, max_length, source=source)
        self.ranker, self._read, self.known = Ranker(model, temperature), known, known()
        self._vectors: dict[tuple[int | str, str], torch.Tensor] = {}

    def reload(self) -> None:
        known = self._read()
        super().reload()
        self.known = known
        self._vectors.clear()

    def describe(self, task: int | str) -> dict[str, Any]:
        """What `/tasks` says of a task: its instruction and options, where it has its own."""
        return {"task": task, "instruction": None, "options": None, **self.known.get(task, {})}

    def check(self, request: RankRequest) -> Item:
        """The request's tokens.

        Raises:
            UnknownTaskError: there is no such task.
            ValueError: a text is too long; options are missing, or repeated.
        """
        task = self.task(request.task)
        own = self.describe(task)
        options = own["options"] if request.options is None else request.options
        instruction = own["instruction"] if request.instruction is None else request.instruction
        if options is None:
            raise ValueError(f"Task {request.task!r} has no options of its own. Pass `options`.")
        if len(set(options)) != len(options):
            raise ValueError(f"Every option may be there once, got {options}.")
        text = f"{instruction} {request.input}" if instruction else request.input
        return Item(task, self.tokens("text", text), {option: self.tokens("option", option) for option in options})

    @torch.inference_mode()
    def run(self, items: list[Item]) -> list[RankAnswer]:
        """One forward over all texts and all options that are new, each row with its task."""
        wanted = {(item.task, name): ids for item in items for name, ids in item.options.items()}
        new = {pair: ids for pair, ids in wanted.items() if pair not in self._vectors}
        rows = [item.tokens for item in items] + list(new.values())
        tasks = [item.task for item in items] + [task for task, _ in new]
        vectors = torch.cat(
            [
                self.ranker.embed(self.padded(rows[n : n + self.MOST_ROWS]), tasks[n : n + self.MOST_ROWS])
                for n in range(0, len(rows), self.MOST_ROWS)
            ]
        ).cpu()
        self._vectors.update(zip(new, vectors[len(items) :], strict=True))
        answers = [self._choose(item, vectors[n]) for n, item in enumerate(items)]
        while len(self._vectors) > self.KEPT:
            del self._vectors[next(iter(self._vectors))]  # the oldest
        return answers

    def _choose(self, item: Item, text: torch.Tensor) -> RankAnswer:
        options = torch.stack([self._vectors[item.task, name] for name in item.options])
        chances = torch.softmax(options @ text / self.ranker.temperature, dim=0).tolist()
        probabilities = dict(zip(item.options, chances, strict=True))
        return RankAnswer(answer=max(probabilities, key=probabilities.__getitem__), probabilities=probabilities)


class ClassifyService(Service):
    """Answers with the labels of the task's own head, from one forward for requests of all tasks."""

    path, request, answer = "/classify", ClassifyRequest, ClassifyAnswer

    def describe(self, task: int | str) -> dict[str, Any]:
        """What `/tasks` says of a task: its kind, and the names of its labels."""
        labels = self.model.task_labels[task]
        names = None if labels.kind == "regression" else list(labels.names)
        return {"task": task, "kind": labels.kind, "labels": names}

    def check(self, request: ClassifyRequest) -> Item:
        """The request's tokens.

        Raises:
            UnknownTaskError: there is no such task.
            ValueError: the text is too long.
        """
        return Item(self.task(request.task), self.tokens("text", request.input))

    @torch.inference_mode()
    def run(self, items: list[Item]) -> list[ClassifyAnswer]:
        """One forward, each row with its task."""
        batch = self.padded(item.tokens for item in items)
        logits = self.model(**batch, task_ids=[item.task for item in items]).logits.float().cpu()
        return [self._answer(item.task, row) for item, row in zip(items, logits, strict=True)]

    def _answer(self, task: int | str, logits: torch.Tensor) -> ClassifyAnswer:
        labels = self.model.task_labels[task]
        own = logits[: len(labels)]
        if labels.kind == "regression":
            return ClassifyAnswer(task=task, value=own.item())
        several = labels.kind == "multi_label"
        chances = dict(zip(labels.names, (own.sigmoid() if several else own.softmax(0)).tolist(), strict=True))
        likely = [label for label, chance in chances.items() if chance > 0.5]
        chosen = likely if several else [max(chances, key=chances.__getitem__)]
        return ClassifyAnswer(task=task, labels=chosen, probabilities=chances)


def tasks_of_data(folder: str) -> dict[str, dict[str, Any]]:
    """Instruction and options of each task whose rows have them in common."""
    tasks, _ = load_tasks(folder)
    known = {name: {key: rows[0][key] for key in ("instruction", "options")} for name, rows in tasks.items()}
    return {name: own for name, own in known.items() if all(own.items() <= row.items() for row in tasks[name])}
