"""What a method is given: recipe, model and documents; and what it is: :class:`Method`."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Protocol

from act_harness.attention.probe import attending_layers
from act_harness.calibration import Calibration, LayerPlan
from act_harness.search.choose.effects import TaskScores
from act_harness.search.methods.arms import ArmScorer, computing_engine
from act_harness.search.recipe import OF_SINGLE_HEADS, Recipe, make_recipe
from act_harness.search.run import run_search

if TYPE_CHECKING:
    from act_harness.artifact import Artifact, ModelFacts
    from act_harness.search.documents import Document, TaskDocuments

__all__ = ["Method", "MethodContext"]

_DETECTION = ("rule", "alpha", "tau", "protect", "min_rows", "decode")


class Method(Protocol):
    """One way to a head set, or a control."""

    @property
    def name(self) -> str:
        """Its name on the command line and in the table."""

    @property
    def note(self) -> str:
        """What it does, in a clause."""

    def find(self, context: MethodContext) -> Artifact | None:
        """Return the head set it finds; None: the untouched model."""


@dataclass(frozen=True)
class MethodContext:
    """What methods find head sets from."""

    recipe: Recipe
    """Tasks, samples, seeds, detection and settings of the searches."""
    facts: ModelFacts
    documents: Sequence[TaskDocuments]
    """Splits search and verify; nothing that judges is in it."""
    scorer: ArmScorer
    """Of the model."""
    ledgers: Path
    artifact_of: Callable[[str], Artifact | None]
    """What another method of the registry found."""
    show_progress: bool = True

    @cached_property
    def layers(self) -> dict[int, int]:
        """Number of heads of every layer that attends, asked of the model once."""
        return attending_layers(self.scorer.model)

    @property
    def detection(self) -> dict[str, Any]:
        """How the recipe finds sinks, as settings of a calibration."""
        settings = self.recipe.calibration.settings()
        return {name: settings[name] for name in _DETECTION if name in settings}

    def search(
        self,
        name: str,
        *,
        method: Literal["exhaustive", "gradient"],
        **changes: Any,  # noqa: ANN401 - a recipe's fields
    ) -> Artifact:
        """Run a search with the recipe's settings and the changes of a method.

        Args:
            name: of the artifact.
            method: of the search; settings of the recipe that it does not read are left out.
            changes: fields of the recipe; ``gradient`` and ``top`` change single settings.
        """
        own = _set_fields(self.recipe)
        for field in OF_SINGLE_HEADS if method == "gradient" else ("gradient",):
            own.pop(field, None)
        for field in ("gradient", "top"):
            if field in changes:
                changes[field] = {**own.get(field, {}), **changes[field]}
        if method == "exhaustive" and self.recipe.objective == "entropy":
            own["objective"] = "corrected"
        content = {**own, "name": name, "method": method, "controls": {"random_sets": 0}, **changes}
        recipe = make_recipe(content, source=f"method {name!r}")
        tuned = recipe.tuned_calibration() if method == "gradient" else recipe.calibration
        engine = computing_engine(recipe.engine, [_plan(tuned)], self.scorer.device)
        return run_search(
            recipe.model_copy(update={"engine": engine}),
            model=self.scorer.model,
            documents=self.documents,
            facts=self.facts,
            ledgers=self.ledgers,
            token_budget=self.scorer.token_budget,
            show_progress=self.show_progress,
        ).artifact

    def verified(self, artifact: Artifact | None) -> float:
        """Return the mean accuracy over tasks on verify, as the recipe's objective reads it."""
        parts: Mapping[str, Sequence[Document]] = {one.task: one.verify for one in self.documents}
        found = self.scorer.scores(artifact, {"verify": parts})["verify"]
        values = []
        for task, rows in found.items():
            scores = TaskScores.of(parts[task], rows, objective=self.recipe.objective)
            arm = scores.arm(scores.scores)
            plain = self.recipe.objective == "margin" or arm.corrected is None
            values.append(arm.accuracy if plain else float(arm.corrected or 0.0))
        return math.fsum(values) / len(values)


def _plan(calibration: Calibration) -> LayerPlan:
    return LayerPlan.uniform(calibration, (0,))


def _set_fields(recipe: Recipe) -> dict[str, Any]:
    """Return the fields that a recipe sets, as plain values."""
    found: dict[str, Any] = recipe.model_dump(mode="json", exclude_unset=True, exclude_none=True)
    if "calibration" in found:
        found["calibration"] = recipe.calibration.settings()
    return found
