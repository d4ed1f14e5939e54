"""The ways of searching that the search benchmark compares, each measured by a function."""

from __future__ import annotations

import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from act_harness.artifact import Artifact, ModelFacts
from act_harness.attention import attach
from act_harness.bench.common import synchronize
from act_harness.engines import select_engine
from act_harness.scoring.scorer import Item, Scorer
from act_harness.search.choose.effects import head_effects
from act_harness.search.compute.measure import Measurement
from act_harness.search.compute.workbench import Workbench
from act_harness.search.documents import Document, TaskDocuments
from act_harness.search.ledger import SearchLedger
from act_harness.search.recipe import Recipe
from act_harness.search.run import kept_heads
from act_harness.support.processes import Processes

if TYPE_CHECKING:
    from collections.abc import Sequence

    from act_harness.calibration import LayerPlan
    from act_harness.engines.operation import Engine, EngineResult
    from act_harness.evidence.resampling import Array
    from act_harness.search.choose.effects import HeadEffect, TaskScores
    from act_harness.search.choose.sets import Place

__all__ = ["Loop", "Pass", "measure_loop", "measure_way"]

Grid = dict[int, tuple[int, ...]]


@dataclass
class Pass:
    """One way of searching, measured."""

    seconds: float
    forwards: float
    rows: float
    effects: list[HeadEffect]
    measurement: Measurement
    estimates: dict[Place, float]
    seconds_by_part: dict[str, float]


class _TimedEngine:
    """An engine that notes how long it takes."""

    def __init__(self, engine: Engine, device: str) -> None:
        self.name, self._engine, self._device = engine.name, engine, device
        self.seconds = 0.0

    def supports(self, plan: LayerPlan) -> list[str]:
        """See :class:`act_harness.engines.operation.Engine`."""
        return self._engine.supports(plan)

    def __call__(self, *args: Any, **kwargs: Any) -> EngineResult:  # noqa: ANN401 - as the engine
        synchronize(self._device)
        began = time.perf_counter()
        result = self._engine(*args, **kwargs)
        synchronize(self._device)
        self.seconds += time.perf_counter() - began
        return result


def measure_way(
    model: Any,  # noqa: ANN401
    documents: Sequence[TaskDocuments],
    recipe: Recipe,
    grid: Grid,
    device: str,
    *,
    screened: bool,
) -> Pass:
    """Run one way of searching over the documents' search split, in a ledger of its own."""
    chosen = select_engine(recipe.engine, device=torch.device(device).type, plans=[recipe.plan])
    engine = _TimedEngine(chosen, device)
    with (
        tempfile.TemporaryDirectory() as folder,
        SearchLedger.opened(Path(folder), identity={}) as ledger,
        Workbench(model) as bench,
    ):
        measurement = Measurement(
            recipe,
            {d.task: d.search for d in documents},
            ledger,
            Processes(),
            engine,
        )
        bench.forwards = bench.rows_computed = 0
        parts = {}
        synchronize(device)
        began = time.perf_counter()
        estimates: dict[Place, float] = {}
        if screened:
            measurement.screen(bench, grid, progress=lambda done: None)
            estimates = measurement.estimates(grid)
            grid = kept_heads(estimates, recipe.keep)
            synchronize(device)
            parts["screen"] = time.perf_counter() - began
            parts["engine in the screen"] = engine.seconds
        measurement.run(bench, grid, progress=lambda done: None)
        synchronize(device)
        seconds = time.perf_counter() - began
        parts["exact pass"] = seconds - parts.get("screen", 0.0)
        parts["engine in the exact pass"] = engine.seconds - parts.get("engine in the screen", 0.0)
        stock = measurement.baselines()
        effects = head_effects(stock, measurement.changes(grid, stock))
        return Pass(
            seconds, bench.forwards, bench.rows_computed, effects, measurement, estimates, parts
        )


@dataclass
class Loop:
    """The loop over heads, measured on some of them and scaled to all."""

    seconds: float
    """Scaled to all heads and documents."""
    forwards: float
    rows: float
    heads: int
    documents: int
    worst: float
    """Largest difference of a margin from the exact pass, in nats."""
    predictions: float
    """Share of equal predictions."""


def measure_loop(
    model: Any,  # noqa: ANN401
    facts: ModelFacts,
    recipe: Recipe,
    grid: Grid,
    exact: Pass,
    share: tuple[int, int | None],
    device: str,
    *,
    turn: float = 0.5,
) -> Loop:
    """Time the loop over heads at batch 1 on some of them, and compare it with the exact pass.

    Args:
        model: the model.
        facts: what identifies it.
        recipe: settings of the search.
        grid: heads by layer.
        exact: the exact pass over the same documents.
        share: number of heads, and of documents per task (None: all).
        device: the model's.
        turn: where between one chosen head and the next the first one lies, in [0, 1).
    """
    everything = [(layer, head) for layer, heads in grid.items() for head in heads]
    step = max(1, len(everything) // share[0])
    chosen = everything[int(turn * step) :: step][: share[0]]
    stock = exact.measurement.baselines()
    changes = exact.measurement.changes(grid, stock)
    seconds, worst, equal, seen, forwards, tokens = 0.0, 0.0, 0, 0, 0, 0
    for layer, head in chosen:
        artifact = Artifact(
            name="loop", model=facts, calibration=recipe.calibration, heads={layer: (head,)}
        )
        attachment = attach(model, artifact, facts=facts, engine=recipe.engine)
        try:
            scorer = Scorer(model, attachment)
            for number, task in enumerate(stock):
                ordered = exact.measurement.ordered(task.task)
                picked = _spread(len(ordered), share[1])
                _score(scorer, ordered[:1])  # warm
                before = scorer.work.forwards
                synchronize(device)
                began = time.perf_counter()
                found = _score(scorer, [ordered[place] for place in picked])
                synchronize(device)
                seconds += time.perf_counter() - began
                forwards += scorer.work.forwards - before
                tokens += sum(len(ordered[p].requests[0][0]) for p in picked)
                scores = task.scores + changes[layer, head, 0][number]
                one = _agreement(task, scores, found, picked)
                worst, equal, seen = max(worst, one[0]), equal + one[1], seen + len(picked)
        finally:
            attachment.detach()
    pairs = sum(len(task.right) for task in stock) * len(everything)
    scale = pairs / seen
    return Loop(
        seconds * scale,
        forwards * scale,
        tokens * scale * facts.num_hidden_layers,
        len(chosen),
        seen // len(chosen),
        worst,
        equal / seen,
    )


def _spread(count: int, wanted: int | None) -> list[int]:
    if wanted is None or wanted >= count:
        return list(range(count))
    return [int((n + 0.5) * count / wanted) for n in range(wanted)]


def _score(scorer: Scorer, documents: Sequence[Document]) -> list[list[float]]:
    return [
        [s.loglikelihood for s in scorer.score([Item(*request) for request in document.requests])]
        for document in documents
    ]


def _agreement(
    task: TaskScores,
    scores: Array,
    found: list[list[float]],
    picked: list[int],
) -> tuple[float, int]:
    """Return the largest difference of a margin and the number of equal predictions."""
    import numpy as np

    other = scores.copy()
    for place, row in zip(picked, found, strict=True):
        other[place, : len(row)] = row
    plain = task.__class__(task.task, task.scores, task.right, task.fixed, "margin")
    difference = np.abs(plain.margins(other) - plain.margins(scores))[picked]
    same = other.argmax(axis=-1)[picked] == scores.argmax(axis=-1)[picked]
    return float(difference.max()), int(same.sum())
