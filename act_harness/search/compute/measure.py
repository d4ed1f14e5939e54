"""Measuring single heads: units of work, kept in the ledger, read back as changes of scores.

The unit is (task, chunk of documents, layer). A chunk's baseline forward is repeated when a killed
search comes back to it; nothing else is. Chunks are dealt out to processes whole, and every unit is
packed from its chunk alone, so its numbers do not depend on what ran before it or beside it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch

from act_harness.engines import refuse_unsupported
from act_harness.errors import CalibrationError, InfrastructureError
from act_harness.search.choose.effects import TaskScores, not_finite
from act_harness.search.compute.exact import ChunkPass
from act_harness.search.compute.layout import Chunk, chunks_of
from act_harness.search.compute.screen import estimate_chunk, score_weights

if TYPE_CHECKING:
    from act_harness.engines.operation import Engine
    from act_harness.search.choose.effects import Array
    from act_harness.search.choose.sets import Place
    from act_harness.search.compute.layout import Layout
    from act_harness.search.compute.workbench import Workbench
    from act_harness.search.documents import Document
    from act_harness.search.ledger import SearchLedger
    from act_harness.search.recipe import Recipe
    from act_harness.support.processes import Processes

__all__ = ["Measurement", "Work"]

Grid = dict[int, tuple[int, ...]]


@dataclass
class Work:
    """What a search computed in this process, for its report."""

    pairs: int = 0
    """(sequence, head, mass map) triples that were asked for."""
    computed: int = 0
    """Of them, those in which a row changed, and that were run."""
    forwards: int = 0
    rows: int = 0
    """Rows that went through a decoder layer, summed over layers."""


@dataclass
class Measurement:
    """One split of all tasks, measured chunk by chunk."""

    recipe: Recipe
    tasks: dict[str, Sequence[Document]]
    ledger: SearchLedger
    processes: Processes
    engine: Engine
    split: Literal["search", "verify"] = "search"
    """Which documents of the tasks these are: their units have keys of their own."""
    work: Work = field(default_factory=Work)
    chunks: list[Chunk] = field(init=False)

    def __post_init__(self) -> None:
        refuse_unsupported(self.engine, [self.recipe.plan])
        if self.recipe.calibration.target == "span":
            raise CalibrationError(
                "a search does not find the spans of prompts, which target 'span' is about; "
                "write the head set by hand and evaluate that"
            )
        self.chunks = [
            chunk
            for documents in self.tasks.values()
            for chunk in chunks_of(documents, self.recipe.size("chunk_tokens"))
        ]

    @property
    def share(self) -> list[Chunk]:
        """The chunks of this process."""
        rank, count = self.processes.rank, self.processes.count
        return [chunk for n, chunk in enumerate(self.chunks) if n % count == rank]

    def layout(self, chunk: Chunk, bench: Workbench) -> Layout:
        """Lay out a chunk for the model at hand."""
        share = self.recipe.calibration.decode != "running"
        return bench.lay_out(chunk.documents, share=share)

    def run(
        self,
        bench: Workbench,
        grid: Grid,
        *,
        progress: Callable[[int], object],
        known: Callable[[int], object] | None = None,
        after_chunk: Callable[[Chunk], object] = lambda chunk: None,
    ) -> None:
        """Measure what the ledger lacks of ``grid``; returns when all processes are done.

        Args:
            bench: the opened model.
            grid: heads by layer.
            progress: called with (layer, head, mass map, document) combinations done.
            known: called with those that the ledger had; None: ``progress`` is.
            after_chunk: called after each chunk of this process.
        """
        maps = len(self.recipe.mass_maps())
        for chunk in self.share:
            missing = [layer for layer in grid if self._key(chunk, layer) not in self.ledger]
            done = sum(len(grid[layer]) for layer in grid if layer not in missing)
            if done:
                (known or progress)(done * maps * len(chunk.documents))
            if missing or self._base_key(chunk) not in self.ledger:
                self._chunk(bench, chunk, {layer: grid[layer] for layer in missing}, progress)
            after_chunk(chunk)
        self.processes.read_together(self.ledger)

    def _chunk(
        self, bench: Workbench, chunk: Chunk, grid: Grid, progress: Callable[[int], object]
    ) -> None:
        recipe, before = self.recipe, (bench.forwards, bench.rows_computed)
        layout = self.layout(chunk, bench)
        passing = ChunkPass(
            bench,
            layout,
            engine=self.engine,
            calibration=recipe.calibration,
            strengths=recipe.mass_maps(),
            first_layer=min(grid, default=0),
            pack_tokens=recipe.size("pack_tokens"),
        )
        if self._base_key(chunk) not in self.ledger:
            self.ledger.add(
                self._base_key(chunk), {"scores": _rounded(passing.baseline(), layout.counts)}
            )
        for layer, heads in grid.items():
            change, counts = passing.layer(layer, heads)
            _refuse_not_finite(change, chunk, layer, heads, layout.counts)
            self.ledger.add(self._key(chunk, layer), _unit(change, heads, layout.counts))
            self.work.pairs += counts.variants
            self.work.computed += counts.computed
            progress(len(heads) * change.shape[0] * len(chunk.documents))
        self.work.forwards += bench.forwards - before[0]
        self.work.rows += bench.rows_computed - before[1]

    # -- screening ---------------------------------------------------------------------------

    def screen(
        self,
        bench: Workbench,
        grid: Grid,
        *,
        progress: Callable[[int], object],
        known: Callable[[int], object] | None = None,
    ) -> None:
        """Estimate every head of ``grid`` on this process's chunks; wait for the others.

        Args:
            bench: the opened model.
            grid: heads by layer.
            progress: called with the number of documents done.
            known: called with the number that the ledger had; None: ``progress`` is.
        """
        if self.recipe.objective == "corrected":  # the label prior needs all documents first
            self.run(bench, {}, progress=lambda done: None)
        for chunk in self.share:
            key = ("screen", chunk.task, chunk.number)
            there = key in self.ledger
            if not there:
                self._screen_chunk(bench, chunk, grid, key)
            (known if there and known else progress)(len(chunk.documents))
        self.processes.read_together(self.ledger)

    def _screen_chunk(self, bench: Workbench, chunk: Chunk, grid: Grid, key: Any) -> None:  # noqa: ANN401
        recipe, before = self.recipe, (bench.forwards, bench.rows_computed)
        total: dict[int, torch.Tensor] = {}
        rows: list[list[float]] = []
        known = self._weights(chunk)
        for piece in chunks_of(
            chunk.documents, recipe.size("screen_tokens")
        ):  # in the chunk's order
            layout = self.layout(piece, bench)
            scores, found = estimate_chunk(
                bench,
                layout,
                lambda scores, piece=piece, layout=layout: torch.from_numpy(  # type: ignore[misc]
                    known(piece, _rounded(scores, layout.counts))
                ),
                engine=self.engine,
                calibration=recipe.calibration,
                strengths=recipe.mass_maps(),
                grid=grid,
            )
            rows += _rounded(scores, layout.counts)
            for layer, values in found.items():
                total[layer] = total.get(layer, 0) + values
        if self._base_key(chunk) not in self.ledger:
            self.ledger.add(self._base_key(chunk), {"scores": rows})
        estimates = {
            str(layer): [[float(f"{v:.8g}") for v in row] for row in values.tolist()]
            for layer, values in total.items()
        }
        self.ledger.add(key, {"estimates": estimates})
        self.work.forwards += bench.forwards - before[0]
        self.work.rows += bench.rows_computed - before[1]

    def _weights(self, chunk: Chunk) -> Callable[[Chunk, list[list[float]]], Array]:
        """Return what gives the weights of a piece of the chunk from its own scores."""
        if self.recipe.objective == "corrected":
            base = self.baselines()[list(self.tasks).index(chunk.task)]
            every = score_weights(base)

            def from_ledger(piece: Chunk, _: list[list[float]]) -> Array:
                start = chunk.first + piece.first
                return every[start : start + len(piece.documents)]

            return from_ledger
        return lambda piece, scores: score_weights(
            TaskScores.of(piece.documents, scores, objective="margin")
        )

    def estimates(self, grid: Grid) -> dict[Place, float]:
        """Return the estimated effect of every place, in the unit of the measured effects."""
        found: dict[Place, float] = {}
        for base in self.baselines():
            share = 1.0 / (base.spread * len(base.right) * len(self.tasks))
            for chunk in self._of(base.task, complete=True):
                unit = self.ledger.get(("screen", chunk.task, chunk.number))["estimates"]
                for layer, heads in grid.items():
                    for strength, row in enumerate(unit[str(layer)]):
                        for head, value in zip(heads, row, strict=True):
                            if not math.isfinite(value):
                                raise InfrastructureError(
                                    f"the estimate of head {layer}.{head} on {len(chunk.documents)}"
                                    f" documents of {base.task}, {chunk.documents[0].key} the "
                                    "first, is not finite; check the model's weights and the dtype"
                                )
                            place = (layer, head, strength)
                            found[place] = found.get(place, 0.0) + value * share
        return found

    # -- reading back ------------------------------------------------------------------------

    def ordered(self, task: str, *, complete: bool = True) -> list[Document]:
        """Return a task's documents in the order in which their chunks hold them."""
        return [d for chunk in self._of(task, complete=complete) for d in chunk.documents]

    def baselines(self, *, complete: bool = True) -> list[TaskScores]:
        """Return the untouched model's scores by task.

        Args:
            complete: False takes the chunks measured so far (for a running best list).
        """
        found = []
        for task in self.tasks:
            chunks = self._of(task, complete=complete)
            scores = [row for c in chunks for row in self.ledger.get(self._base_key(c))["scores"]]
            documents = self.ordered(task, complete=complete)
            found.append(TaskScores.of(documents, scores, objective=self.recipe.objective))
        return found

    def changes(
        self, grid: Grid, baselines: Sequence[TaskScores], *, complete: bool = True
    ) -> dict[Place, list[Array]]:
        """Return the changes of the scores, (documents, choices) by task, for every place."""
        found: dict[Place, list[Array]] = {
            (layer, head, strength): [np.zeros(base.scores.shape) for base in baselines]
            for layer, heads in grid.items()
            for head in heads
            for strength in range(len(self.recipe.mass_maps()))
        }
        for number, task in enumerate(self.tasks):
            for chunk in self._of(task, complete=complete):
                for layer in grid:
                    for one in self.ledger.get(self._key(chunk, layer))["changes"]:
                        head, strength, rows = one
                        for document, values in rows:  # a ledger of an older version may hold them
                            if not all(map(math.isfinite, values)):
                                raise not_finite(chunk.documents[document], _with(layer, head))
                        place = (layer, head, strength)
                        if place not in found:
                            continue
                        table = found[place][number]
                        for document, values in rows:
                            table[chunk.first + document, : len(values)] = values
        return found

    def _of(self, task: str, *, complete: bool) -> list[Chunk]:
        mine = [chunk for chunk in self.chunks if chunk.task == task]
        if complete:
            return mine
        measured = []
        for chunk in mine:  # a prefix, so that document numbers stay those of the whole
            if self._base_key(chunk) not in self.ledger:
                break
            measured.append(chunk)
        return measured

    def _base_key(self, chunk: Chunk) -> tuple[Any, ...]:
        return (self._named("base"), chunk.task, chunk.number)

    def _key(self, chunk: Chunk, layer: int) -> tuple[Any, ...]:
        return (self._named("layer"), chunk.task, chunk.number, layer)

    def _named(self, unit: str) -> str:
        return unit if self.split == "search" else f"{self.split} {unit}"


def _rounded(scores: torch.Tensor, counts: Sequence[int]) -> list[list[float]]:
    return [
        [round(value, 6) for value in row[:count]]
        for row, count in zip(scores.tolist(), counts, strict=True)
    ]


def _with(layer: int, head: int) -> str:
    return f" where head {layer}.{head} is calibrated"


def _refuse_not_finite(
    change: torch.Tensor, chunk: Chunk, layer: int, heads: Sequence[int], counts: Sequence[int]
) -> None:
    """Refuse changes that are no numbers before the ledger keeps them.

    Args:
        change: (strengths, heads, documents, choices); choices that a document lacks do not count.
        chunk: Of the documents.
        layer: Of the heads.
        heads: Their numbers.
        counts: Choices of each document.
    """
    there = torch.arange(change.shape[-1])[None] < torch.tensor(counts)[:, None]
    wrong = ~torch.isfinite(change) & there.to(change.device)
    for _, head, document, _ in wrong.nonzero()[:1].tolist():
        raise not_finite(chunk.documents[document], _with(layer, heads[head]))


def _unit(change: torch.Tensor, heads: Sequence[int], counts: Sequence[int]) -> dict[str, Any]:
    """Write (strengths, heads, documents, choices) down, leaving out what did not change."""
    found = []
    moved = (change != 0).any(dim=-1)  # (M, h, documents)
    values = change.tolist()
    for strength, head in moved.any(dim=-1).nonzero().tolist():
        some = moved[strength, head].nonzero()[:, 0].tolist()
        rows = [
            [d, [round(value, 6) for value in values[strength][head][d][: counts[d]]]] for d in some
        ]
        found.append([heads[head], strength, rows])
    return {"changes": found}
