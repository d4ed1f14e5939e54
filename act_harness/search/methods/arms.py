"""Scores of documents with a head set in force, by the product's own scorer."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

from act_harness.attention import attach
from act_harness.attention.placement import input_device
from act_harness.engines import select_engine
from act_harness.errors import RecipeError
from act_harness.evidence.scaling import FOLDS
from act_harness.scoring.scorer import Item, Scorer
from act_harness.search.choose.effects import not_finite
from act_harness.search.documents import digest_of
from act_harness.search.record import measured_facts, set_tokens

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from act_harness.artifact import Artifact, ModelFacts
    from act_harness.calibration import LayerPlan
    from act_harness.search.documents import Document, TaskDocuments
    from act_harness.search.recipe import Recipe

__all__ = [
    "Arm",
    "ArmScorer",
    "Parts",
    "Scores",
    "computing_engine",
    "identity_of",
    "parts_of",
]

Scores = dict[str, dict[str, list[list[float]]]]
"""Split to task to log-likelihoods, a row a document, as long as its choices."""

Parts = Mapping[str, Mapping[str, Sequence["Document"]]]
"""Split to task to documents: ``search``, ``verify``, and ``evaluation``, which only judges."""


class Arm(NamedTuple):
    """A method's head set and what it scores."""

    method: str
    heads: int
    """Calibrated heads; 0: the untouched model."""
    artifact_sha256: str | None
    engine: str | None
    """What computed it; None: the stock model."""
    scores: Scores
    note: str = ""
    """What a reader of the table should know of it."""


def parts_of(documents: Sequence[TaskDocuments]) -> Parts:
    """Return the documents that arms are scored on.

    ``evaluation`` is of each task the held-out documents where there are any, else those of the
    split ``judge``.

    Raises:
        RecipeError: a task comes twice, has none that judge, too few to choose by or to fit the
            supervised scaling on, or a document without label or texts of its choices.
    """
    if len({one.task for one in documents}) < len(documents):
        raise RecipeError(f"a task comes twice: {[one.task for one in documents]}; give each once")
    for one in documents:
        _check_task(one)
    return {
        "search": {one.task: one.search for one in documents},
        "verify": {one.task: one.verify for one in documents},
        "evaluation": {one.task: one.held_out or one.judge for one in documents},
    }


def _check_task(one: TaskDocuments) -> None:
    """Refuse, before anything is computed, a task of which no table can be made."""
    judge = one.held_out or one.judge
    if len(judge) < 2:
        raise RecipeError(
            f"task {one.task!r} has no documents that only judge; prepare them with "
            "--held-out N, or give the recipe judge_samples"
        )
    if len(one.verify) < 2 or len(one.search) + len(one.verify) < FOLDS:
        raise RecipeError(
            f"task {one.task!r} has {len(one.search)} search and {len(one.verify)} verify "
            f"documents; a table of methods needs 2 that verify, and {FOLDS} in both; raise "
            "samples or verify_samples"
        )
    for document in (*one.search, *one.verify, *judge):
        if len(document.choices) != len(document.requests) or not document.labelled:
            raise RecipeError(
                f"document {document.key} of task {one.task!r} lacks its label or the texts of "
                "its choices; a table of methods needs both, so prepare the documents again"
            )
        document.check_choices("a table of methods")


def identity_of(recipe: Recipe, facts: ModelFacts, parts: Parts, device: str) -> dict[str, Any]:
    """Return all that decides what arms find and score; what was kept of another is refused."""
    return {
        "recipe": recipe.content(),
        "model": measured_facts(facts),
        "documents": {
            split: {task: digest_of(found) for task, found in tasks.items()}
            for split, tasks in parts.items()
        },
        "device": device,
    }


@dataclass(frozen=True)
class ArmScorer:
    """Scores documents with a model's heads calibrated as an artifact says."""

    model: PreTrainedModel
    facts: ModelFacts
    engine: str = "auto"
    """The recipe's; :meth:`engine_of` says what computes an artifact."""

    @property
    def device(self) -> str:
        """Kind of the model's device."""
        return input_device(self.model).type

    @property
    def token_budget(self) -> int:
        """Tokens of a forward."""
        return set_tokens(self.device)

    def engine_of(self, artifact: Artifact) -> str:
        """Return the name of an engine that computes an artifact."""
        return computing_engine(self.engine, list(artifact.plans().values()), self.device)

    def scores(self, artifact: Artifact | None, parts: Parts) -> Scores:
        """Return the log-likelihood of every choice of every document, to 6 digits.

        Args:
            artifact: None or one without heads: the untouched model.
            parts: documents by split and task.

        Raises:
            InfrastructureError: a score is not finite.
        """
        kept = artifact if artifact is not None and artifact.head_count() else None
        engine = self.engine if kept is None else self.engine_of(kept)
        attachment = attach(self.model, kept, facts=self.facts, engine=engine)
        try:
            scorer = Scorer(self.model, attachment, token_budget=self.token_budget)
            return {
                split: {task: _rows(scorer, documents) for task, documents in tasks.items()}
                for split, tasks in parts.items()
            }
        finally:
            attachment.detach()

    def arm(self, method: str, artifact: Artifact | None, parts: Parts, *, note: str = "") -> Arm:
        """Score a method's head set."""
        heads = artifact.head_count() if artifact is not None else 0
        found = self.scores(artifact, parts)
        if artifact is None or not heads:
            return Arm(method, 0, None, None, found, note)
        return Arm(method, heads, artifact.sha256(), self.engine_of(artifact), found, note)


def _rows(scorer: Scorer, documents: Sequence[Document]) -> list[list[float]]:
    items = [Item(*request) for document in documents for request in document.requests]
    found = iter(scorer.score(items))
    rows = []
    for document in documents:
        row = [round(next(found).loglikelihood, 6) for _ in document.requests]
        if not all(map(math.isfinite, row)):
            raise not_finite(document)
        rows.append(row)
    return rows


def computing_engine(name: str, plans: Sequence[LayerPlan], device: str) -> str:
    """Return an engine's name, ``torch`` where that one does not compute the plans.

    Triton computes the methods and refuses most controls; a table needs both.
    """
    engine = select_engine(name, device=device)
    return "torch" if any(engine.supports(plan) for plan in plans) else name
