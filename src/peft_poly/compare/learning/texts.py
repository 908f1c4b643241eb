"""From texts to vectors: tokens, hidden states of the adapted encoder, their mean. Nothing is computed twice in vain.

Letters: b texts, l tokens, d features.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from contextlib import nullcontext
from typing import Any

import torch
from torch import nn

from .blocks import Blocks

__all__ = ["MANY", "Texts", "padded"]

MANY = 64  # texts of a batch that only asks
MOST_BYTES = 2 * 2**30  # of hidden states that are kept


def padded(tokenizer: Any, ids: list[list[int]]) -> dict[str, torch.Tensor]:
    """The inputs of an encoder."""
    rows = [torch.tensor(tokens) for tokens in ids]
    return {
        "input_ids": nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=tokenizer.pad_token_id),
        "attention_mask": nn.utils.rnn.pad_sequence([torch.ones_like(row) for row in rows], batch_first=True),
    }


class Texts:
    """Texts as an encoder reads them.

    Args:
        tokenizer: of the encoder.
        blocks: of the encoder.
        max_length: longest text in tokens; the rest is cut off.
    """

    def __init__(self, tokenizer: Any, blocks: Blocks, max_length: int) -> None:
        self.tokenizer, self.blocks, self.max_length = tokenizer, blocks, max_length
        self._ids: dict[str, list[int]] = {}
        self._kept: dict[str, torch.Tensor] = {}  # (l, d)

    def ids(self, text: str) -> list[int]:
        """The tokens of a text; one at least."""
        if text not in self._ids:
            found = self.tokenizer(text, truncation=True, max_length=self.max_length)["input_ids"]
            self._ids[text] = found or [self.tokenizer.pad_token_id]
        return self._ids[text]

    def check_known(self, texts: Iterable[str]) -> None:
        """Texts are made of what the tokenizer knows; one without a vocabulary of its own knows next to nothing.

        Raises:
            ValueError: more than half of their tokens are unknown.
        """
        special = {*self.tokenizer.all_special_ids} - {self.tokenizer.unk_token_id}
        found = [token for text in texts for token in self.ids(text) if token not in special]
        unknown = found.count(self.tokenizer.unk_token_id)
        if 2 * unknown > len(found):
            raise ValueError(
                f"The encoder's tokenizer knows {len(found) - unknown} of the {len(found)} tokens of these texts. Save "
                "the tokenizer that the encoder was trained with beside it, or take an encoder for their language."
            )

    def in_order(self, texts: Sequence[str]) -> list[list[int]]:
        """Places in `texts`, `MANY` together, the short ones first: so there is little to pad."""
        order = sorted(range(len(texts)), key=lambda n: len(self.ids(texts[n])))
        return [order[begin : begin + MANY] for begin in range(0, len(order), MANY)]

    @torch.no_grad()
    def keep(self, encoder: nn.Module, texts: Iterable[str]) -> None:
        """Run the blocks that are not adapted over all texts, if the encoder can begin above them and memory allows.

        Args:
            encoder: before it is adapted.
            texts: all that will be read.
        """
        found = list(dict.fromkeys(texts))
        numbers = sum(len(self.ids(text)) for text in found) * encoder.config.hidden_size  # type: ignore[union-attr,operator]
        longest = max(found, key=lambda text: len(self.ids(text)))
        if 4 * numbers > MOST_BYTES or not self.blocks.can_be_given(
            encoder, self._inputs(encoder, [found[0], longest])
        ):
            return
        for places in self.in_order(found):
            part = [found[n] for n in places]
            with self.blocks.watched() as states:
                encoder(**self._inputs(encoder, part))
            self._kept |= {text: states[0][n, : len(self.ids(text))].clone() for n, text in enumerate(part)}

    def vectors(self, encoder: nn.Module, texts: Sequence[str], **call: Any) -> torch.Tensor:
        """Vectors `(b, d)` of length `sqrt(d)`, the means over the tokens of `texts`; `call` goes to the encoder."""
        kept = [self._kept[text] for text in texts if text in self._kept]
        whole = len(kept) == len(texts)
        with self.blocks.given(nn.utils.rnn.pad_sequence(kept, batch_first=True)) if whole else nullcontext():
            inputs = self._inputs(encoder, texts)
            hidden = encoder(**inputs, **call).last_hidden_state  # (b, l, d)
        mask = inputs["attention_mask"].unsqueeze(-1)
        return nn.functional.normalize((hidden * mask).sum(1), dim=-1) * hidden.shape[-1] ** 0.5

    def _inputs(self, encoder: nn.Module, texts: Sequence[str]) -> dict[str, torch.Tensor]:
        device = next(encoder.parameters()).device
        inputs = padded(self.tokenizer, [self.ids(text) for text in texts])
        return {name: values.to(device) for name, values in inputs.items()}
