"""Measuring whole head sets on a split, through the same scorer as an evaluation.

Sets are measured on two splits that never meet: on ``verify`` to choose among them, on ``judge`` to
say what the chosen one is worth (see :mod:`act_harness.search.choose.judgement`).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from act_harness.artifact import Artifact, ModelFacts
from act_harness.attention import attach
from act_harness.attention.parallel import refuse_parts
from act_harness.evidence.stats import RESAMPLES, PairedDifference, Part, combined_difference
from act_harness.scoring.scorer import Item, Scorer
from act_harness.search.choose.effects import Arm, Array, TaskScores
from act_harness.search.documents import digest_of
from act_harness.support.provenance import sha256_json

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from act_harness.search.documents import Document
    from act_harness.search.ledger import MeasuredUnits
    from act_harness.search.recipe import Recipe
    from act_harness.support.processes import Processes

__all__ = [
    "ModelSets",
    "Outcome",
    "Reading",
    "SetMeasurement",
    "chosen_by",
    "make_heads",
    "try_all_heads",
]

Place = tuple[int, int, int]
"""(layer, head, index of the mass map)."""

ScoreSet = Callable[[tuple[Place, ...], Sequence["Document"]], list[list[float]]]
"""Scores documents, one row of their choices' log-likelihoods each, with a set calibrated."""


Reading = Literal["raw", "corrected", "raw_other_tasks", "accuracy", "objective", "margin"]
"""What is read off a set's answers, by document.

Columns of a table, see :meth:`Outcome.readings`: ``raw`` and ``corrected`` say whether the answer
is right before and after the label prior is subtracted, both of the tasks with fixed choices
(``raw`` of all tasks where none has them), ``raw_other_tasks`` of the tasks left out there.

What sets are chosen by, of all tasks, see :func:`chosen_by`: ``accuracy`` is raw; ``objective`` is
corrected where a task has fixed choices and raw elsewhere, as the objective's margins are;
``margin`` is the change of the objective's margin in units of the untouched model's spread.
"""


@dataclass(frozen=True)
class Outcome:
    """How a head set did on a split, beside the untouched model, by task."""

    stock: dict[str, Arm]
    """The untouched model."""
    arms: dict[str, Arm]
    """The same documents with the set calibrated."""
    spreads: dict[str, float]
    """Of the untouched model's margins."""

    @property
    def accuracy(self) -> float:
        """Mean over all tasks."""
        return _mean([arm.accuracy for arm in self.arms.values()])

    @property
    def corrected(self) -> float | None:
        """Mean over the tasks with fixed choices, label prior subtracted; None without any."""
        found = [arm.corrected for arm in self.arms.values() if arm.corrected is not None]
        return _mean(found) if found else None

    def changes(self) -> dict[str, Any]:
        """Return the change of each document's margin in units of the spread, (documents,)."""
        return {
            task: (arm.margins - self.stock[task].margins) / self.spreads[task]
            for task, arm in self.arms.items()
        }

    def readings(self) -> list[Reading]:
        """Return the columns of accuracies; raw and corrected are of the same tasks."""
        fixed = [arm.corrected_hits is not None for arm in self.arms.values()]
        if not any(fixed):
            return ["raw"]
        return ["raw", "corrected"] if all(fixed) else ["raw", "corrected", "raw_other_tasks"]

    def tasks_of(self, reading: Reading) -> list[str]:
        """Return the tasks of a column: those with fixed choices where there are any."""
        fixed = [task for task, arm in self.arms.items() if arm.corrected_hits is not None]
        if reading in ("accuracy", "objective", "margin") or not fixed:
            return list(self.arms)
        if reading == "raw_other_tasks":
            return [task for task in self.arms if task not in fixed]
        return fixed

    def column_of(self, reading: Reading) -> Reading:
        """Return the column that holds the same figures, the reading itself where none does."""
        columns = self.readings()
        if len(columns) == 1 and reading in ("accuracy", "objective"):
            return "raw"
        if len(columns) == 2:
            same: dict[Reading, Reading] = {"accuracy": "raw", "objective": "corrected"}
            return same.get(reading, reading)
        return reading

    def parts(self, reading: Reading) -> list[Part]:
        """Return both arms' values by document, one part a task; see :data:`Reading`."""
        if reading == "margin":
            return [Part(np.zeros_like(change), change) for change in self.changes().values()]
        pairs = [(self.stock[task], self.arms[task]) for task in self.tasks_of(reading)]
        return [Part(_hits(stock, reading), _hits(arm, reading)) for stock, arm in pairs]

    def difference(self, reading: Reading, *, resamples: int = RESAMPLES) -> PairedDifference:
        """Return the set against the untouched model, paired by document; mean over tasks."""
        return combined_difference(self.parts(reading), resamples=resamples)

    def score(self, reading: Reading) -> float:
        """Return the set's own figure: accuracy, or the effect for ``margin``; mean over tasks."""
        return _mean([float(np.mean(part.b)) for part in self.parts(reading)])

    def untouched(self) -> Outcome:
        """Return the untouched model as a set of its own."""
        return Outcome(self.stock, self.stock, self.spreads)

    def to_json(self) -> dict[str, Any]:
        """Return the figures, rounded for the artifact."""
        return {
            "accuracy": round(self.accuracy, 6),
            "corrected_accuracy": _rounded(self.corrected),
            "effect": float(f"{self.score('margin'):.6g}"),
        }

    def by_task(self) -> dict[str, dict[str, float | None]]:
        """Return the same task by task; margins in nats."""
        return {
            task: {
                "accuracy": round(arm.accuracy, 6),
                "corrected_accuracy": _rounded(arm.corrected),
                "margin_change": float(f"{(arm.margins - self.stock[task].margins).mean():.6g}"),
            }
            for task, arm in self.arms.items()
        }


def make_heads(
    places: Sequence[Place], recipe: Recipe
) -> tuple[dict[int, tuple[int, ...]], dict[int, dict[int, Any]] | None]:
    """Return an artifact's ``heads`` and ``strengths`` of some places."""
    maps, own = recipe.mass_maps(), recipe.model_copy(update={"strengths": ()}).mass_maps()[0]
    heads: dict[int, list[int]] = {}
    strengths: dict[int, dict[int, Any]] = {}
    for layer, head, strength in sorted(places):
        heads.setdefault(layer, []).append(head)
        if maps[strength] != own:
            strengths.setdefault(layer, {})[head] = maps[strength]
    return {layer: tuple(found) for layer, found in heads.items()}, strengths or None


def try_all_heads(
    model: PreTrainedModel, facts: ModelFacts, recipe: Recipe, grid: dict[int, tuple[int, ...]]
) -> None:
    """Attach the heads at stake once: a model that takes none is found before any is measured."""
    refuse_parts(model, "the search")
    trial = Artifact(name=recipe.name, model=facts, calibration=recipe.calibration, heads=grid)
    attach(model, trial, facts=facts, engine=recipe.engine).detach()


@dataclass
class ModelSets:
    """Scores documents with a set of a model's heads calibrated."""

    model: PreTrainedModel
    facts: ModelFacts
    recipe: Recipe
    token_budget: int = 4096

    def __call__(
        self, places: tuple[Place, ...], documents: Sequence[Document]
    ) -> list[list[float]]:
        """Return the log-likelihood of every choice; no places: the untouched model."""
        heads, strengths = make_heads(places, self.recipe)
        artifact = None
        if places:
            artifact = Artifact(
                name=self.recipe.name,
                model=self.facts,
                calibration=self.recipe.calibration,
                heads=heads,
                strengths=strengths,
            )
        attachment = attach(self.model, artifact, facts=self.facts, engine=self.recipe.engine)
        try:
            scorer = Scorer(self.model, attachment, token_budget=self.token_budget)
            items = [Item(*request) for document in documents for request in document.requests]
            found = iter(scorer.score(items))
        finally:
            attachment.detach()
        return [
            [round(next(found).loglikelihood, 6) for _ in document.requests]
            for document in documents
        ]


@dataclass
class SetMeasurement:
    """Measures head sets on one split; what the ledger knows is not measured again."""

    score: ScoreSet
    recipe: Recipe
    tasks: dict[str, Sequence[Document]]
    """Documents of the split by task."""
    ledger: MeasuredUnits
    processes: Processes
    split: Literal["verify", "judge"] = "verify"
    progress: Callable[[int], object] = lambda documents: None
    """Called with the number of documents just scored."""
    _stock: dict[str, tuple[TaskScores, Arm]] = field(default_factory=dict, init=False)
    _digests: dict[str, str] = field(init=False)

    def __post_init__(self) -> None:
        self._digests = {task: digest_of(found)[:16] for task, found in self.tasks.items()}

    def outcomes(self, sets: Sequence[Sequence[Place]]) -> list[Outcome]:
        """Measure head sets, an empty one being the untouched model."""
        wanted = [(), *map(tuple, sets)]
        pairs = [(s, task) for s in dict.fromkeys(map(_sorted, wanted)) for task in self.tasks]
        missing = [pair for pair in pairs if self._key(*pair) not in self.ledger]
        rank, count = self.processes.rank, self.processes.count
        for places, task in [pair for n, pair in enumerate(missing) if n % count == rank]:
            scores = self.score(places, self.tasks[task])
            self.ledger.add(self._key(places, task), {"scores": scores})
            self.progress(len(scores))
        if missing:
            self.processes.read_together(self.ledger)
        return [self._outcome(_sorted(places)) for places in sets]

    def baseline(self) -> Outcome:
        """Return the untouched model's figures."""
        return self.outcomes([()])[0]

    def _key(self, places: tuple[Place, ...], task: str) -> tuple[Any, ...]:
        name = sha256_json([list(place) for place in places])[:16]
        if self.split == "verify":  # the ledger's own name says which documents these are
            return ("set", name, task)
        return ("judge set", name, task, self._digests[task])

    def _scores(self, places: tuple[Place, ...], task: str) -> TaskScores:
        found = self.ledger.get(self._key(places, task))["scores"]
        return TaskScores.of(self.tasks[task], found, objective=self.recipe.objective)

    def _outcome(self, places: tuple[Place, ...]) -> Outcome:
        for task in self.tasks:
            if task not in self._stock:
                stock = self._scores((), task)
                self._stock[task] = stock, stock.arm(stock.scores)
        return Outcome(
            stock={task: arm for task, (_, arm) in self._stock.items()},
            arms={
                task: stock.arm(self._scores(places, task).scores)
                for task, (stock, _) in self._stock.items()
            },
            spreads={task: stock.spread for task, (stock, _) in self._stock.items()},
        )


def _hits(arm: Arm, reading: Reading) -> Array:
    if reading in ("corrected", "objective") and arm.corrected_hits is not None:
        return arm.corrected_hits
    return arm.hits


def chosen_by(recipe: Recipe) -> Reading:
    """Return what a recipe chooses head sets by on ``verify``."""
    if recipe.top.criterion == "margin":
        return "margin"
    return "objective" if recipe.objective == "corrected" else "accuracy"


def _mean(values: Sequence[float]) -> float:
    return math.fsum(values) / len(values)


def _rounded(value: float | None) -> float | None:
    return None if value is None else round(value, 6)


def _sorted(places: Sequence[Place]) -> tuple[Place, ...]:
    return tuple(sorted(places))
