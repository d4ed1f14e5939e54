"""Documents as right-padded batches, and which rows say how likely each choice is.

All choices of one token are read from the last row of their prompt; a longer choice has a row of
tokens of its own, prompt and choice. Nothing is shared between documents, and a pad stands behind
everything that is read, so a document's scores depend on no other in its batch.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch
from torch import Tensor

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray

    from act_harness.search.documents import Document

__all__ = ["Batch", "batches_of", "forward_cost", "rows_of", "tokens_of"]

_FORWARD = {"cpu": 2e7}
"""Hidden size squared times the padded tokens that take as long as what a forward costs whatever
its size, by device: a processor waits for its weights, a GPU for launches (results/benchmarks)."""

_FORWARD_ELSEWHERE = 2e10

_PARTS = (1.0, 1.125, 1.25, 1.5, 2.0)
"""Of a process's share of the tokens: how large a batch is tried. Pads make all batches together
larger than all shares, and one batch too many is a whole forward for one process."""


class _Read(NamedTuple):
    """One summand of a choice's log-likelihood: the token that follows a row."""

    row: int
    token: int
    choice: int


class _Row(NamedTuple):
    """A sequence of tokens, and what is read off it."""

    tokens: tuple[int, ...]
    prompt: int
    reads: tuple[_Read, ...]


def rows_of(document: Document) -> list[_Row]:
    """Return the sequences that score a document."""
    found: list[_Row] = []
    short: dict[tuple[int, ...], list[_Read]] = {}
    for choice, (context, answer) in enumerate(document.requests):
        last = len(context) - 1
        if len(answer) == 1:
            short.setdefault(context, []).append(_Read(last, answer[0], choice))
        else:
            own = tuple(_Read(last + n, token, choice) for n, token in enumerate(answer))
            found.append(_Row(context + answer[:-1], len(context), own))
    for context, reads in short.items():
        found.append(_Row(context, len(context), tuple(reads)))
    return found


@dataclass(frozen=True)
class Batch:
    """The tensors of some documents: B sequences of T tokens, pads on the right."""

    documents: tuple[int, ...]
    """Their numbers among those that were batched."""
    ids: Tensor  # (B, T) long
    real: Tensor  # (B, T) bool
    prompt: Tensor  # (B, T) bool
    places: Tensor  # (P, 2) long: rows that are read, (sequence, t)
    read_place: Tensor  # (N,) long: index into places
    read_token: Tensor  # (N,) long
    read_slot: Tensor  # (N,) long: document within the batch * choices + choice
    choices: int
    """Most choices of a document."""

    @property
    def tokens(self) -> int:
        """Padded tokens."""
        return self.ids.numel()

    def scores(self, logits: Tensor) -> Tensor:
        """Return (documents, choices) log-likelihoods from the (P, vocabulary) logits of places.

        Choices that a document lacks have minus infinity.
        """
        dtype = torch.float64 if logits.dtype == torch.float64 else torch.float32
        known = torch.log_softmax(logits.to(dtype), dim=1)[self.read_place, self.read_token]
        slots = len(self.documents) * self.choices
        found = known.new_zeros(slots).index_add(0, self.read_slot, known)
        there = torch.zeros(slots, dtype=torch.bool, device=known.device)
        there[self.read_slot] = True
        return found.masked_fill(~there, -torch.inf).view(len(self.documents), self.choices)


def tokens_of(document: Document) -> int:
    """Return the tokens of the sequences that score a document."""
    return sum(len(row.tokens) for row in rows_of(document))


def forward_cost(device: torch.device, hidden: int) -> float:
    """Return how many padded tokens take as long as one more forward, and its backward.

    Args:
        device: of the model.
        hidden: its hidden size; a token's arithmetic grows with the square of it.
    """
    return _FORWARD.get(device.type, _FORWARD_ELSEWHERE) / hidden**2


def batches_of(
    documents: Sequence[Document],
    *,
    tokens: int,
    device: torch.device,
    forward: float = math.inf,
    processes: int = 1,
) -> list[Batch]:
    """Batch documents, of one task or of several, those of like length together.

    Of all ways to cut the documents, longest first, the one that costs least: padded tokens, and
    ``forward`` for each batch.

    Args:
        documents: to score.
        tokens: most padded tokens of a batch; a longer document has one of its own.
        device: where the tensors go.
        forward: padded tokens that one more batch may save, at most half of a full one.
        processes: that take every so many-th batch. Of several, batches are as large as lets the
            one that is done last be done soonest.
    """
    rows = [rows_of(document) for document in documents]
    longest = np.array([max(len(row.tokens) for row in own) for own in rows])
    order = np.lexsort((np.arange(len(rows)), -longest))
    width = longest[order]
    ends = np.concatenate([[0], np.cumsum([len(rows[number]) for number in order])])
    forward = min(forward, tokens / 2)
    most = {tokens}
    if processes > 1:
        share = sum(len(row.tokens) for own in rows for row in own) / processes
        most |= {min(tokens, math.ceil(part * share)) for part in _PARTS}

    def last(spans: list[tuple[int, int]]) -> float:
        costs = [forward + (ends[stop] - ends[start]) * width[start] for start, stop in spans]
        return float(max(sum(costs[rank::processes]) for rank in range(processes)))

    cuts = [_cut(width, ends, tokens=some, forward=forward) for some in sorted(most)]
    spans = min(cuts, key=last)
    return [
        _batch(some, rows, max(len(documents[n].requests) for n in some), device)
        for some in (order[start:stop].tolist() for start, stop in spans)
    ]


def _cut(
    width: NDArray[np.int64], ends: NDArray[np.int64], *, tokens: int, forward: float
) -> list[tuple[int, int]]:
    """Return where the batches of documents begin and end that cost least.

    Args:
        width: (documents,) tokens of the longest sequence, descending.
        ends: (documents + 1,) sequences before each document, and of all.
        tokens: see :func:`batches_of`; likewise the next.
        forward: see there.
    """
    forward = min(forward, tokens / 2)
    cost, starts, low = np.zeros(len(ends)), [0] * len(ends), 0
    for stop in range(1, len(ends)):
        while low < stop - 1 and (ends[stop] - ends[low]) * width[low] > tokens:
            low += 1
        found = cost[low:stop] + forward + (ends[stop] - ends[low:stop]) * width[low:stop]
        starts[stop] = low + int(found.argmin())
        cost[stop] = found.min()
    spans: list[tuple[int, int]] = []
    stop = len(width)
    while stop:
        spans.append((starts[stop], stop))
        stop = starts[stop]
    return spans[::-1]


def _batch(
    numbers: Sequence[int], rows: list[list[_Row]], choices: int, device: torch.device
) -> Batch:
    sequences = [(place, row) for place, number in enumerate(numbers) for row in rows[number]]
    longest = max(len(row.tokens) for _, row in sequences)
    places: list[tuple[int, int]] = []
    reads: list[tuple[int, int, int]] = []
    for number, (place, row) in enumerate(sequences):
        known: dict[int, int] = {}
        for read in row.reads:
            if read.row not in known:
                known[read.row] = len(places)
                places.append((number, read.row))
            reads.append((known[read.row], read.token, place * choices + read.choice))
    length = torch.tensor([len(row.tokens) for _, row in sequences], device=device)
    prompt = torch.tensor([row.prompt for _, row in sequences], device=device)
    column = torch.arange(longest, device=device)
    table = torch.tensor(reads, device=device)
    return Batch(
        documents=tuple(numbers),
        ids=torch.tensor(
            [[*row.tokens, *[0] * (longest - len(row.tokens))] for _, row in sequences],
            device=device,
        ),
        real=column < length[:, None],
        prompt=column < prompt[:, None],
        places=torch.tensor(places, device=device),
        read_place=table[:, 0],
        read_token=table[:, 1],
        read_slot=table[:, 2],
        choices=choices,
    )
