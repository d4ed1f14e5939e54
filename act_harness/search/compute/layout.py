"""How a chunk of documents is laid out for the forwards of the search.

A sequence is a prompt with the tokens of all its answers behind it, side by side: an answer's rows
see the prompt and themselves, never another answer, and carry the positions that follow the prompt.
One forward so scores every choice of a question. Sequences are padded on the left, so that every
window of last rows is one slice for the whole chunk. With decode ``running`` a row's sinks depend
on all rows before it, so each answer of several tokens gets a sequence of its own. So it does in
models with layers that are not attention, which would also see pads on the left: theirs stand on
the right, behind all that is read.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Literal, NamedTuple

import torch
from torch import Tensor

from act_harness.engines.geometry import Geometry

if TYPE_CHECKING:
    from collections.abc import Sequence

    from act_harness.search.documents import Document

__all__ = ["Chunk", "Layout", "chunks_of"]

Tokens = tuple[int, ...]


class Chunk(NamedTuple):
    """Documents of one task that are computed together; the same on every run of a recipe."""

    task: str
    number: int
    documents: tuple[Document, ...]
    first: int
    """Index of the first document within the task's documents, as they are sorted here."""


def chunks_of(documents: Sequence[Document], tokens: int) -> list[Chunk]:
    """Cut one task's documents into chunks of at most ``tokens`` padded tokens (or one document).

    Documents are taken from long to short, so that a chunk holds few pads; ties keep the order in
    which they were drawn.
    """
    ordered = sorted(documents, key=_length, reverse=True)
    chunks: list[Chunk] = []
    first = 0
    while first < len(ordered):
        longest = max(_length(ordered[first]), 1)
        count = max(1, tokens // longest)
        some = tuple(ordered[first : first + count])
        chunks.append(Chunk(some[0].task, len(chunks), some, first))
        first += len(some)
    return chunks


def _length(document: Document) -> int:
    return sum(
        len(context) + sum(len(answer) - 1 for answer in answers)
        for context, answers in _by_context(document).items()
    )


def _by_context(document: Document) -> dict[Tokens, list[Tokens]]:
    """Return the distinct answers of each context of a document."""
    found: dict[Tokens, list[Tokens]] = {}
    for context, answer in document.requests:
        answers = found.setdefault(context, [])
        if answer not in answers:
            answers.append(answer)
    return found


class _Sequence(NamedTuple):
    document: int
    context: Tokens
    answers: tuple[Tokens, ...]

    @property
    def size(self) -> int:
        """Number of tokens."""
        return len(self.context) + sum(len(answer) - 1 for answer in self.answers)


@dataclass(frozen=True)
class Layout:
    """The tensors of a chunk: S sequences of T tokens, and which rows are read for which answer."""

    ids: Tensor  # (S, T) long
    real: Tensor  # (S, T) bool
    prompt: Tensor  # (S, T) bool
    position: Tensor  # (S, T) long: position of each token in its own text
    segment: Tensor  # (S, T) long: 0 prompt, 1.. an answer, -1 pad
    owner: Tensor  # (S,) long: document of each sequence within the chunk
    places: Tensor  # (P, 2) long: the rows that are read, (sequence, t), sorted
    read_place: Tensor  # (N,) long: index into places of each answer token
    read_token: Tensor  # (N,) long: the token
    read_slot: Tensor  # (N,) long: document * choices + choice; a token may serve equal choices
    documents: int
    choices: int
    """Most choices of a document; slots of choices that a document lacks are never read."""
    right: tuple[int, ...]
    counts: tuple[int, ...]
    """Number of choices of each document."""

    @classmethod
    def of(
        cls,
        documents: Sequence[Document],
        *,
        device: torch.device,
        share: bool = True,
        pads: Literal["left", "right"] = "left",
    ) -> Layout:
        """Lay out a chunk.

        Args:
            documents: at least one.
            device: where the tensors go.
            share: let all answers of a context share one sequence.
            pads: where shorter sequences are padded.
        """
        sequences = list(_sequences(documents, share=share))
        builder = _Builder(sequences, documents, pads)
        return builder.build(device)

    @cached_property
    def offset(self) -> Tensor:
        """(S,) number of pads before each sequence."""
        return self.real.int().argmax(dim=1)

    @cached_property
    def common(self) -> int:
        """Number of leading tokens that all sequences share, the last prompt row excluded.

        Tasks put the same instruction before every document; causality makes these rows the same
        in every sequence, as long as calibration does the same to them.
        """
        most = int(self.prompt.sum(dim=1).min()) - 1
        if len(self.ids) < 2 or most < 1:
            return 0
        place = self.offset[:, None] + torch.arange(most, device=self.ids.device)
        tokens = self.ids.gather(1, place)
        same = (tokens == tokens[:1]).all(dim=0)
        return int(same.int().cumprod(dim=0).sum())

    @cached_property
    def level(self) -> Tensor:
        """(P,) bool: places from which every choice of a document is read once.

        The normaliser of the softmax there is the same for all its choices, so no margin depends
        on it.
        """
        row, column = self.places.T
        alone = torch.bincount(self.owner, minlength=self.documents)[self.owner] == 1
        return (self.segment[row, column] == 0) & alone[row]

    @cached_property
    def length(self) -> int:
        """T, padded tokens of a sequence."""
        return self.ids.shape[1]

    def visible(self, window: int | None) -> Tensor:
        """Return (S, 1, T, T) bool: what each row can see, within ``window`` positions if given.

        Pads see themselves: a row that sees nothing would be a division by zero.
        """
        place = torch.arange(self.length, device=self.ids.device)
        causal = place[None, :] <= place[:, None]
        rows, columns = self.segment[:, :, None], self.segment[:, None, :]
        seen = causal & (columns >= 0) & (rows >= 0) & ((columns == 0) | (columns == rows))
        if window is not None:
            distance = self.position[:, :, None] - self.position[:, None, :]
            seen &= distance < window
        seen |= torch.eye(self.length, dtype=torch.bool, device=seen.device)
        return seen[:, None]

    def geometry(self, visible: Tensor | None) -> Geometry:
        """Return the geometry for engines: one forward over everything; None: causal."""
        return Geometry(
            real=self.real,
            prompt=self.prompt,
            first_row=0,
            first_column=0,
            columns=self.length,
            mask=visible,
            ids=self.ids,
        )


def _sequences(documents: Sequence[Document], *, share: bool) -> list[_Sequence]:
    found = []
    for number, document in enumerate(documents):
        for context, answers in _by_context(document).items():
            if share:
                found.append(_Sequence(number, context, tuple(answers)))
                continue
            short = tuple(answer for answer in answers if len(answer) == 1)  # they add no rows
            if short:
                found.append(_Sequence(number, context, short))
            found.extend(
                _Sequence(number, context, (answer,)) for answer in answers if len(answer) > 1
            )
    return found


class _Builder:
    """Fills the lists that become a layout's tensors."""

    def __init__(
        self, sequences: list[_Sequence], documents: Sequence[Document], pads: str
    ) -> None:
        self.sequences, self.documents, self.pads = sequences, documents, pads
        self.longest = max(sequence.size for sequence in sequences)
        self.choices = max(len(document.requests) for document in documents)
        self.rows: dict[str, list[list[int]]] = {"ids": [], "position": [], "segment": []}
        self.places: list[tuple[int, int]] = []
        self.reads: list[tuple[int, int, int]] = []

    def build(self, device: torch.device) -> Layout:
        for number, sequence in enumerate(self.sequences):
            self._add(number, sequence)
        long = {
            key: torch.tensor(rows, dtype=torch.long, device=device)
            for key, rows in self.rows.items()
        }
        reads = torch.tensor(self.reads, dtype=torch.long, device=device)
        return Layout(
            ids=long["ids"],
            real=long["segment"] >= 0,
            prompt=long["segment"] == 0,
            position=long["position"],
            segment=long["segment"],
            owner=torch.tensor([s.document for s in self.sequences], device=device),
            places=torch.tensor(self.places, dtype=torch.long, device=device),
            read_place=reads[:, 0],
            read_token=reads[:, 1],
            read_slot=reads[:, 2],
            documents=len(self.documents),
            choices=self.choices,
            right=tuple(document.right for document in self.documents),
            counts=tuple(len(document.requests) for document in self.documents),
        )

    def _add(self, number: int, sequence: _Sequence) -> None:
        missing = self.longest - sequence.size
        pads, size = missing if self.pads == "left" else 0, len(sequence.context)
        ids, position = [0] * pads, [0] * pads
        segment = [-1] * pads
        ids += sequence.context
        position += range(size)
        segment += [0] * size
        last = len(self.places)
        self.places.append((number, pads + size - 1))
        for n, answer in enumerate(sequence.answers, start=1):
            slots = [
                sequence.document * self.choices + choice
                for choice, request in enumerate(self.documents[sequence.document].requests)
                if request == (sequence.context, answer)
            ]
            self.reads += [(last, answer[0], slot) for slot in slots]
            for offset, token in enumerate(answer[:-1]):
                self.places.append((number, len(ids)))
                self.reads += [(len(self.places) - 1, answer[offset + 1], slot) for slot in slots]
                ids.append(token)
                position.append(size + offset)
                segment.append(n)
        behind = missing - pads
        for key, row, pad in (("ids", ids, 0), ("position", position, 0), ("segment", segment, -1)):
            self.rows[key].append(row + [pad] * behind)
