"""What `serve.py` generates: one `generate` for requests of all tasks, each a prompt or the messages of a chat."""

from __future__ import annotations

from typing import Any, Literal

import torch
from answering import Item, Request, Service, Text
from jinja2 import TemplateError
from pydantic import BaseModel, ConfigDict, Field, model_validator
from pydantic_core import PydanticCustomError
from transformers import StoppingCriteriaList


class Message(BaseModel):
    """One of a chat."""

    model_config = ConfigDict(extra="forbid")
    role: Literal["system", "user", "assistant"]
    content: Text


class GenerateRequest(Request):
    """A prompt as it is, or the messages of a chat, which the tokenizer's template makes one of."""

    input: Text | None = None
    messages: list[Message] | None = Field(None, min_length=1, max_length=200, description="For chat models.")
    max_new_tokens: int = Field(32, ge=1, description="The server has a limit.")

    @model_validator(mode="after")
    def _one_of_two(self) -> GenerateRequest:
        if (self.input is None) == (self.messages is None):
            raise PydanticCustomError("prompt", "Pass `input`, a prompt as it is, or `messages`, those of a chat")
        if self.messages and self.messages[-1].role != "user":
            raise PydanticCustomError("chat", "The last of `messages` must be the user's: it is what is answered")
        return self


class GenerateAnswer(BaseModel):
    output: str


class GenerateService(Service):
    """Continues a prompt (or, as an encoder-decoder, answers it) with the likeliest tokens.

    The likeliest tokens of a short answer are the first ones of a longer, so rows that want fewer are cut.
    """

    path, request, answer = "/generate", GenerateRequest, GenerateAnswer

    def __init__(self, model: Any, tokenizer: Any, max_length: int, max_new_tokens: int, source: str = "") -> None:
        super().__init__(model, tokenizer, max_length, max_new_tokens, source)
        self.prompt_first = not model.config.is_encoder_decoder  # in what it generates
        self.padding_side = "left" if self.prompt_first else "right"
        if self.tokenizer.pad_token is None:
            self.tokenizer.pad_token = self.tokenizer.eos_token

    @property
    def chats(self) -> bool:
        """Whether the tokenizer has a template that makes messages a prompt."""
        return getattr(self.tokenizer, "chat_template", None) is not None

    def describe(self, task: int | str) -> dict[str, Any]:
        """What `/tasks` says of a task."""
        return {"task": task}

    def check(self, request: GenerateRequest) -> Item:
        """The request's tokens.

        Raises:
            UnknownTaskError: there is no such task.
            ValueError: the prompt is too long, too much is wanted, or the messages are none that the template takes.
        """
        task = self.task(request.task)
        if request.max_new_tokens > self.max_new_tokens:
            raise ValueError(f"`max_new_tokens` may be {self.max_new_tokens} at most, got {request.max_new_tokens}.")
        return Item(task, self._prompt(request), max_new_tokens=request.max_new_tokens)

    def _prompt(self, request: GenerateRequest) -> list[int]:
        if request.messages is None:
            return self.tokens("prompt", request.input)
        if not self.chats:
            raise ValueError("The tokenizer has no chat template, so `messages` cannot be made a prompt. Pass `input`.")
        chat = [message.model_dump() for message in request.messages]
        try:
            prompt = self.tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
        except TemplateError as error:
            raise ValueError(f"The chat template refuses these messages: {error}") from error
        return self.tokens("prompt", prompt, add_special_tokens=False)  # those that it wants are in the template

    @torch.inference_mode()
    def run(self, items: list[Item]) -> list[GenerateAnswer]:
        """One `generate`, each row with its task."""
        batch = self.padded(item.tokens for item in items)
        most = max(item.max_new_tokens for item in items)
        greedy = {"do_sample": False, "num_beams": 1, "pad_token_id": self.tokenizer.pad_token_id}
        until = StoppingCriteriaList(
            [lambda ids, scores, **_: torch.full_like(ids[:, 0], self.stopping, dtype=torch.bool)]
        )
        tasks = [item.task for item in items]
        made = self.model.generate(**batch, task_ids=tasks, max_new_tokens=most, stopping_criteria=until, **greedy)
        start = batch["input_ids"].shape[1] if self.prompt_first else 1  # a decoder begins with a start token
        rows = [row[start : start + item.max_new_tokens] for row, item in zip(made, items, strict=True)]
        return [GenerateAnswer(output=text) for text in self.tokenizer.batch_decode(rows, skip_special_tokens=True)]
