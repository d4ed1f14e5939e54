"""Measuring whole head sets on the ``verify`` split, through the same scorer as an evaluation."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from tqdm import tqdm

from act_harness.artifact import Artifact, ModelFacts
from act_harness.attention import attach
from act_harness.provenance import sha256_json
from act_harness.scoring import Item, Scorer
from act_harness.search.effects import TaskScores

if TYPE_CHECKING:
    from collections.abc import Sequence

    from transformers import PreTrainedModel

    from act_harness.data import Document
    from act_harness.search.ledger import Ledger
    from act_harness.search.processes import Processes
    from act_harness.search.recipe import Recipe

__all__ = ["Outcome", "SetJudge", "make_heads"]

Place = tuple[int, int, int]
"""(layer, head, index of the mass map)."""


class Outcome(NamedTuple):
    """How a head set did on the verify split, beside the untouched model."""

    accuracy: float
    """Mean over tasks."""
    corrected: float
    """The same after the label prior is subtracted, where a task has one."""
    effect: float
    """Mean over tasks of the standardised change of the objective's margin."""
    by_task: dict[str, dict[str, float | None]]

    def value(self, recipe: Recipe) -> float:
        """Return what head sets are chosen by."""
        if recipe.top.criterion == "margin":
            return self.effect
        return self.corrected if recipe.objective == "corrected" else self.accuracy

    def to_json(self) -> dict[str, Any]:
        """Return the figures, rounded for the artifact."""
        return {
            "accuracy": round(self.accuracy, 6),
            "corrected_accuracy": round(self.corrected, 6),
            "effect": float(f"{self.effect:.6g}"),
            "by_task": self.by_task,
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


@dataclass
class SetJudge:
    """Measures head sets; what the ledger knows is not measured again."""

    model: PreTrainedModel
    facts: ModelFacts
    recipe: Recipe
    tasks: dict[str, Sequence[Document]]
    """Verify documents by task."""
    ledger: Ledger
    processes: Processes
    token_budget: int = 4096
    show: bool = False
    """Draw progress bars."""

    def judge(self, sets: Sequence[Sequence[Place]]) -> list[Outcome]:
        """Measure head sets, an empty one being the untouched model."""
        wanted = [(), *map(tuple, sets)]
        pairs = [(s, task) for s in dict.fromkeys(map(_sorted, wanted)) for task in self.tasks]
        missing = [pair for pair in pairs if self._key(*pair) not in self.ledger]
        rank, count = self.processes.rank, self.processes.count
        mine = [pair for number, pair in enumerate(missing) if number % count == rank]
        total = sum(len(self.tasks[task]) for _, task in mine)
        with tqdm(total=total, desc="sets", unit="doc", disable=not (self.show and mine)) as bar:
            for places, task in mine:
                scores = self._measure(places, self.tasks[task])
                self.ledger.add(self._key(places, task), {"scores": scores})
                bar.update(len(scores))
        if missing:
            self.processes.read_together(self.ledger)
        return [self._outcome(_sorted(places)) for places in sets]

    def baseline(self) -> Outcome:
        """Return the untouched model's figures."""
        return self.judge([()])[0]

    def _key(self, places: tuple[Place, ...], task: str) -> tuple[Any, ...]:
        return ("set", sha256_json([list(place) for place in places])[:16], task)

    def _measure(
        self, places: tuple[Place, ...], documents: Sequence[Document]
    ) -> list[list[float]]:
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

    def _outcome(self, places: tuple[Place, ...]) -> Outcome:
        by_task: dict[str, dict[str, float | None]] = {}
        raw, corrected, effects = [], [], []
        for task, documents in self.tasks.items():
            stock = TaskScores.of(
                documents,
                self.ledger.get(self._key((), task))["scores"],
                objective=self.recipe.objective,
            )
            found = TaskScores.of(
                documents,
                self.ledger.get(self._key(places, task))["scores"],
                objective=self.recipe.objective,
            )
            arm = stock.arm(found.scores)
            change = float(np.mean(arm.margins - stock.margins(stock.scores)))
            raw.append(arm.accuracy)
            corrected.append(arm.accuracy if arm.corrected is None else arm.corrected)
            effects.append(change / stock.spread)
            by_task[task] = {
                "accuracy": round(arm.accuracy, 6),
                "corrected_accuracy": None if arm.corrected is None else round(arm.corrected, 6),
                "margin_change": float(f"{change:.6g}"),
            }
        count = len(raw)
        return Outcome(
            math.fsum(raw) / count,
            math.fsum(corrected) / count,
            math.fsum(effects) / count,
            by_task,
        )


def _sorted(places: Sequence[Place]) -> tuple[Place, ...]:
    return tuple(sorted(places))
