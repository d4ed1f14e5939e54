"""Sampling that repeats exactly, whatever else is in the batch.

``generate`` draws from one generator for the whole batch, so an answer would depend on its
neighbours, and on where a run was resumed. Here every token's noise is a function of (seed,
question, turn, step, token id) and of nothing else. The next token is the argmax of
``logits / temperature + Gumbel noise``, which has the distribution of the softmax (the
Gumbel-max trick). Two computations of the same logits that differ by rounding nearly always agree
on the argmax, because all tokens keep their noise; an inverse-CDF draw would shift every
boundary behind the first difference.

The noise is splitmix64 (Steele, Lea, Flood, OOPSLA 2014) in int64 arithmetic, the same on every
device. Not here: any choice of settings (:mod:`act_harness.mtbench.chat.settings`).
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

__all__ = [
    "RowLimits",
    "RowSampler",
    "StopTexts",
    "first_with",
    "gumbel_noise",
    "left_padded",
    "row_key",
]

_TAIL = 24
"""Tokens decoded in each step to look for the end of a stop text, beside the text's own length."""


def _signed(value: int) -> int:
    value &= (1 << 64) - 1
    return value - (1 << 64) if value >> 63 else value


_GOLDEN = _signed(0x9E3779B97F4A7C15)
_MIX_1 = _signed(0xBF58476D1CE4E5B9)
_MIX_2 = _signed(0x94D049BB133111EB)


def row_key(seed: int, question: str, turn: int) -> int:
    """Return the key of one answer's noise: a signed 64-bit number."""
    digest = hashlib.sha256(f"{seed}\n{question}\n{turn}".encode()).digest()
    return int.from_bytes(digest[:8], "big", signed=True)


def _shifted(value: Tensor, bits: int) -> Tensor:
    """Logical shift to the right; int64's own would repeat the sign."""
    return (value >> bits) & ((1 << (64 - bits)) - 1)


def _mixed(value: Tensor) -> Tensor:
    value = (value ^ _shifted(value, 30)) * _MIX_1
    value = (value ^ _shifted(value, 27)) * _MIX_2
    return value ^ _shifted(value, 31)


def gumbel_noise(keys: Tensor, step: int, tokens: Tensor) -> Tensor:
    """Return standard Gumbel noise for some tokens.

    Args:
        keys: (B,) int64 keys of the rows, from :func:`row_key`.
        step: number of the token within its answer, from 0.
        tokens: (B, n) int64 token ids.

    Returns:
        (B, n) float64; equal arguments give equal numbers in any batch.
    """
    state = _mixed(keys + _signed((step + 1) * _GOLDEN))
    bits = _mixed(state[:, None] + (tokens + 1) * _GOLDEN)
    uniform = (_shifted(bits, 11).double() + 0.5) * 2.0**-53  # strictly inside (0, 1)
    return -torch.log(-torch.log(uniform))


class RowSampler:
    """Logits processor: rows with a temperature are sampled, the others stay greedy.

    To be used with ``do_sample=False``; a sampled row keeps one finite logit, the token drawn.
    """

    def __init__(
        self,
        keys: Sequence[int],
        temperatures: Sequence[float],
        *,
        start: int,
        top_k: int = 0,
        top_p: float = 1.0,
    ) -> None:
        """Store what every row needs.

        Args:
            keys: (B,) keys of the rows.
            temperatures: (B,) temperatures; 0 means greedy.
            start: tokens of the padded prompt, so that steps can be counted.
            top_k: sample among so many tokens; 0: all.
            top_p: sample among the most probable tokens that hold this share.
        """
        self.rows = [row for row, value in enumerate(temperatures) if value > 0]
        self.keys = torch.tensor([keys[row] for row in self.rows], dtype=torch.int64)
        self.temperatures = torch.tensor([temperatures[row] for row in self.rows])
        self.start, self.top_k, self.top_p = start, top_k, top_p

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """Return (B, V) float logits for the argmax that follows."""
        if not self.rows:
            return scores
        device = scores.device
        rows = torch.tensor(self.rows, device=device)
        logits = scores[rows].double() / self.temperatures.to(device).double()[:, None]
        count = min(self.top_k, logits.shape[1]) if self.top_k else logits.shape[1]
        values, tokens = logits.topk(count, dim=1)  # sorted, the most probable first
        if self.top_p < 1.0:
            shares = values.softmax(dim=1)
            before = shares.cumsum(dim=1) - shares
            values = values.masked_fill(before >= self.top_p, -torch.inf)
        noise = gumbel_noise(self.keys.to(device), input_ids.shape[1] - self.start, tokens)
        drawn = tokens.gather(1, (values + noise).argmax(dim=1, keepdim=True))
        sampled = torch.full_like(scores[rows], -torch.inf).scatter(1, drawn, 0.0)
        return scores.index_copy(0, rows, sampled)


class RowLimits:
    """Stopping criterion: each row has its own largest number of new tokens."""

    def __init__(self, limits: Sequence[int], *, start: int) -> None:
        self.limits = torch.tensor(list(limits))
        self.start = start

    def __call__(self, input_ids: Tensor, scores: object, **_: object) -> Tensor:
        """Return (B,) bool: which rows are done."""
        return (self.limits <= input_ids.shape[1] - self.start).to(input_ids.device)


class StopTexts:
    """Stopping criterion: a row is done once its answer contains one of some texts."""

    def __init__(self, tokenizer: Any, texts: Sequence[str], *, start: int) -> None:  # noqa: ANN401
        self.tokenizer, self.texts, self.start = tokenizer, tuple(texts), start
        # A token is at least one byte, so this many hold the longest text.
        self.tail = _TAIL + max((len(text.encode()) for text in texts), default=0)

    def __call__(self, input_ids: Tensor, scores: object, **_: object) -> Tensor:
        """Return (B,) bool: which rows are done."""
        recent = input_ids[:, max(self.start, input_ids.shape[1] - self.tail) :]
        found = [
            any(text in self.tokenizer.decode(row) for text in self.texts)
            for row in recent.tolist()
        ]
        return torch.tensor(found, device=input_ids.device)


def first_with(
    texts: Sequence[str], tokens: list[int], decoded: Callable[[list[int]], str]
) -> int | None:
    """Return how many tokens it takes until one of some texts is there; None if it never is."""

    def holds(count: int) -> bool:
        text = decoded(tokens[:count])
        return any(stop in text for stop in texts)

    if not holds(len(tokens)):
        return None
    low, high = 0, len(tokens)  # the first ``low`` tokens do not hold one, ``high`` do
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if holds(middle) else (middle, high)
    return high


def left_padded(
    rows: Sequence[tuple[int, ...]], pad_token: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return token ids and mask, (B, T) each, the rows at the right end."""
    longest = max(map(len, rows))
    ids = torch.full((len(rows), longest), pad_token)
    mask = torch.zeros_like(ids)
    for number, row in enumerate(rows):
        ids[number, longest - len(row) :] = torch.tensor(row)
        mask[number, longest - len(row) :] = 1
    return ids, mask
