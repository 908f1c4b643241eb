"""Random nets for `test_fuzz.py`: stacks of adapted layers, each of which sees the rows in its own way."""

from __future__ import annotations

import copy
from typing import Any, Optional

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

__all__ = ["MAY_REFUSE", "MOVED", "PLAIN", "WAYS", "D", "Net", "NetWithIds", "make_net"]

D = 8


def flattened(lin: nn.Module, x: torch.Tensor) -> torch.Tensor:
    return lin(x.reshape(-1, D)).view(x.shape)


def sequence_first(lin: nn.Module, x: torch.Tensor) -> torch.Tensor:
    return lin(x.transpose(0, 1)).transpose(0, 1) if x.dim() > 2 else lin(x)


def windows(lin: nn.Module, x: torch.Tensor) -> torch.Tensor:
    return lin(x.reshape(x.shape[0] * 2, -1, D)).view(x.shape) if x.dim() > 2 and x.shape[1] % 2 == 0 else lin(x)


def windows_outside(lin: nn.Module, x: torch.Tensor) -> torch.Tensor:
    if x.dim() < 3 or x.shape[1] % 2:
        return lin(x)
    return torch.cat(lin(torch.cat(x.chunk(2, 1))).chunk(2), 1)


def sorted_rows(lin: nn.Module, x: torch.Tensor) -> torch.Tensor:
    order = x.flatten(1).sum(1).argsort()
    return lin(x[order])[order.argsort()]


def put_onto_others(lin: nn.Module, x: torch.Tensor) -> torch.Tensor:
    return lin(torch.zeros_like(x) + x.flip(0)).flip(0)


def in_parts(lin: nn.Module, x: torch.Tensor) -> torch.Tensor:
    return lin(torch.cat(x.split(1)))


def picked(lin: nn.Module, x: torch.Tensor) -> torch.Tensor:
    """Each token goes to one of two experts, of which one is adapted."""
    tokens = x.reshape(-1, D)
    chosen = tokens[:, 0] > 0
    return tokens.clone().index_put((chosen,), lin(tokens[chosen])).view(x.shape)


def one_by_one(lin: nn.Module, x: torch.Tensor) -> torch.Tensor:
    return torch.stack([lin(row) for row in x])


def checkpointed(lin: nn.Module, x: torch.Tensor) -> torch.Tensor:
    return checkpoint(lin, x, use_reentrant=False) if torch.is_grad_enabled() else lin(x)


def reentrant(lin: nn.Module, x: torch.Tensor) -> torch.Tensor:
    return checkpoint(lin, x, use_reentrant=True) if torch.is_grad_enabled() else lin(x)


def nested(lin: nn.Module, x: torch.Tensor) -> torch.Tensor:
    return checkpoint(checkpointed, lin, x, use_reentrant=False) if torch.is_grad_enabled() else lin(x)


WAYS = {
    "flattened": flattened,
    "sequence first": sequence_first,
    "windows": windows,
    "windows outside": windows_outside,
    "sorted": sorted_rows,
    "put onto others": put_onto_others,
    "in parts": in_parts,
    "picked": picked,
    "one by one": one_by_one,
    "checkpointed": checkpointed,
    "reentrant": reentrant,
    "nested": nested,
    "plain": lambda lin, x: lin(x),
    "tied": lambda lin, x: lin(torch.tanh(lin(x))),
    "images": None,  # the layer sees images, of which a row may have none or several
    "table": None,  # and a table of positions
}
MAY_REFUSE = {"windows outside", "sorted", "put onto others", "picked", "one by one", "images"}
MOVED = {"flattened", "sequence first", "windows", "in parts", "table"}  # followed where there is a way to watch
PLAIN = ["plain", "flattened", "sequence first", "windows", "table"]  # followed exactly, and computed once


class Block(nn.Module):
    """One adapted layer."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.how, self.lin = how, nn.Linear(D, D)

    def forward(self, x: torch.Tensor, images: Optional[torch.Tensor], owners: Optional[torch.Tensor]) -> torch.Tensor:
        if self.how != "images":
            return WAYS[self.how](self.lin, x)
        if images is None:
            return x
        of_rows = x.new_zeros(len(x), D).index_add(0, owners, self.lin(images))
        return x + of_rows.view(len(x), *[1] * (x.dim() - 2), D)


class DisentangledSelfAttention(nn.Module):
    """By its name, one whose layer serves rows and a table."""

    def __init__(self) -> None:
        super().__init__()
        self.lin, self.table = nn.Linear(D, D), nn.Parameter(torch.randn(3, D), requires_grad=False)

    def forward(self, hidden_states: torch.Tensor, attention_mask: Any = None, query_states: Any = None):
        return self.lin(hidden_states) + self.lin(self.table).mean(0)


class Net(nn.Module):
    """`(b, ..., D)`, or codes `(b, ...)`, to `(b, ..., D)`, with images `(n, D)` of rows `owners` beside it."""

    def __init__(self, hows: list[str]) -> None:
        super().__init__()
        self.codes = nn.Embedding(16, D).requires_grad_(False)
        self.blocks = nn.ModuleList(DisentangledSelfAttention() if how == "table" else Block(how) for how in hows)

    def forward(self, input_ids: torch.Tensor, pixel_values: Any = None, owners: Any = None) -> torch.Tensor:
        x = input_ids if input_ids.is_floating_point() else self.codes(input_ids)
        for block in self.blocks:
            y = block(x) if isinstance(block, DisentangledSelfAttention) else block(x, pixel_values, owners)
            x = torch.tanh(y) + 0.5 * x
        return x

    def prepare_inputs_for_generation(self, guidance_scale: float = 1.0) -> None:
        """Its signature says that `generate` may double the rows."""

    @torch.no_grad()
    def generate(self, input_ids, num_beams=1, guidance_scale=None, special=""):
        """Two steps on rows that are repeated, or "tiled"; the first row may end after one ("ends")."""
        x = input_ids.repeat_interleave(num_beams, 0)
        if special == "tiled":
            x = torch.cat([input_ids] * num_beams)
        if not guidance_scale:
            first = self(x)
            done = num_beams if special == "ends" else 0
            return torch.cat([first[:done], self(first[done:])]) if done < len(x) else first
        for _ in range(2):
            with_prompt, without = self(torch.cat([x, torch.zeros_like(x)])).chunk(2)
            x = without + guidance_scale * (with_prompt - without)
        return x


class NetWithIds(Net):
    """One that has something for each task itself."""

    def __init__(self, hows: list[str]) -> None:
        super().__init__(hows)
        self.offsets = nn.Parameter(torch.randn(16, D), requires_grad=False)

    def forward(self, input_ids, pixel_values=None, owners=None, task_ids=None) -> torch.Tensor:
        x = input_ids if input_ids.is_floating_point() else self.codes(input_ids)
        if task_ids is not None:
            x = x + self.offsets[torch.as_tensor(task_ids)].view(len(x), *[1] * (x.dim() - 2), D)
        return super().forward(x, pixel_values, owners)


def make_net(hows: list[str], seed: int, own_ids: bool = False) -> Net:
    torch.manual_seed(seed)
    return copy.deepcopy((NetWithIds if own_ids else Net)(hows).double())
