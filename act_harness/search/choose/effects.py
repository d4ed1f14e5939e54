"""From measured score changes to effects: accuracies, margins, p-values, one table.

The margin of a document is the log-likelihood of its right choice minus the best wrong one's. With
objective ``corrected``, each choice's mean score over the task's documents (the label prior) is
subtracted first, in the baseline and in the calibrated arm alike; a task whose choices differ from
document to document has no such prior and keeps its plain margins. A head's effect is the mean
margin change, in units of the baseline margin's spread over the documents, averaged over tasks.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import numpy.typing as npt
import scipy.special  # type: ignore[import-untyped]

from act_harness.errors import InfrastructureError, InternalError

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from act_harness.search.documents import Document

__all__ = [
    "Arm",
    "HeadEffect",
    "HeadTask",
    "TaskScores",
    "both_splits",
    "head_effects",
    "not_finite",
]

Array = npt.NDArray[np.float64]


def not_finite(document: Document, where: str = "") -> InfrastructureError:
    """Return the error for a document with scores of which no effect can be computed.

    Args:
        document: Whose scores they are.
        where: Under which head's calibration; empty for the untouched model or a set of heads.
    """
    return InfrastructureError(
        f"document {document.key} of {document.task} has scores that are not finite{where}; "
        "check the model's weights and the dtype"
    )


@dataclass(frozen=True)
class Arm:
    """How one arm did on one task."""

    hits: Array
    """(documents,) 1.0 where the best-scored choice is right, else 0.0."""
    corrected_hits: Array | None
    """(documents,) the same after the label prior is subtracted; None where choices differ by
    document."""
    margins: Array
    """(documents,) of the objective."""

    @property
    def accuracy(self) -> float:
        """Share of the documents that are right."""
        return float(self.hits.mean())

    @property
    def corrected(self) -> float | None:
        """The same after the label prior is subtracted; None where choices differ by document."""
        return None if self.corrected_hits is None else float(self.corrected_hits.mean())


@dataclass(frozen=True)
class TaskScores:
    """The baseline's scores of one task's documents, and how to read scores of other arms."""

    task: str
    scores: Array
    """(documents, choices) log-likelihoods; minus infinity where a choice does not exist."""
    right: npt.NDArray[np.int64]
    fixed: bool
    """Whether the choices are the same for every document."""
    objective: str

    @classmethod
    def of(
        cls, documents: Sequence[Document], scores: Sequence[Sequence[float]], *, objective: str
    ) -> TaskScores:
        """Read the scores of ``documents``, one row each, as long as its choices."""
        choices = max(len(document.requests) for document in documents)
        table = np.full((len(documents), choices), -np.inf)
        for row, (document, found) in enumerate(zip(documents, scores, strict=True)):
            if len(found) != len(document.requests):
                raise InternalError("a document has another number of scores than choices")
            if not np.isfinite(found).all():
                raise not_finite(document)
            table[row, : len(found)] = found
        kinds = {document.choices for document in documents}
        right = np.array([document.right for document in documents], dtype=np.int64)
        fixed = len(kinds) == 1 and bool(np.isfinite(table).all())
        return cls(documents[0].task, table, right, fixed, objective)

    def margins(self, scores: Array) -> Array:
        """Return margins of the objective, (..., documents), of (..., documents, choices)."""
        given = self.corrected(scores) if self.objective == "corrected" and self.fixed else scores
        rows = np.arange(len(self.right))
        right = given[..., rows, self.right]
        wrong = given.copy()
        wrong[..., rows, self.right] = -np.inf
        return np.asarray(right - wrong.max(axis=-1))

    def corrected(self, scores: Array) -> Array:
        """Subtract each choice's mean over the documents."""
        return np.asarray(scores - scores.mean(axis=-2, keepdims=True))

    def hits(self, scores: Array) -> Array:
        """Return 1.0 where the best-scored choice is right, (..., documents)."""
        return np.asarray(scores.argmax(axis=-1) == self.right, dtype=np.float64)

    def arm(self, scores: Array) -> Arm:
        """Judge the scores of an arm, (documents, choices)."""
        return Arm(
            hits=self.hits(scores),
            corrected_hits=self.hits(self.corrected(scores)) if self.fixed else None,
            margins=self.margins(scores),
        )

    def followed_by(self, other: TaskScores) -> TaskScores:
        """Return the task with the documents of ``other`` behind its own."""
        width = max(self.scores.shape[1], other.scores.shape[1])
        alike = self.scores.shape[1] == other.scores.shape[1]
        return TaskScores(
            self.task,
            np.concatenate([_widened(one.scores, width, -np.inf) for one in (self, other)]),
            np.concatenate([self.right, other.right]),
            self.fixed and other.fixed and alike,
            self.objective,
        )

    @property
    def spread(self) -> float:
        """Standard deviation of the baseline's margins; 1 where all are equal."""
        margins = self.margins(self.scores)
        found = float(margins.std(ddof=1)) if len(margins) > 1 else 0.0
        return found or 1.0


class HeadTask(NamedTuple):
    """What calibrating one head does on one task."""

    n: int
    accuracy: float
    corrected: float | None
    margin_change: float
    """Mean over the documents, in nats."""
    p: float
    """One-sided, of "the mean change is not above zero" (Student's t)."""


class HeadEffect(NamedTuple):
    """One head under one mass map."""

    layer: int
    head: int
    strength: int
    """Index into the recipe's mass maps."""
    effect: float
    """Mean over tasks of the standardised margin change."""
    stderr: float
    p: float
    """One-sided, of the effect."""
    accuracy: float
    """Mean over tasks."""
    tasks: tuple[HeadTask, ...]
    """In the order of the recipe's tasks."""

    @property
    def place(self) -> tuple[int, int, int]:
        """(layer, head, strength)."""
        return self.layer, self.head, self.strength


def head_effects(
    tasks: Sequence[TaskScores],
    changes: Mapping[tuple[int, int, int], Sequence[Array]],
) -> list[HeadEffect]:
    """Return the effect of every measured (layer, head, strength), in that order.

    Args:
        tasks: baselines.
        changes: for each place the changes of the scores, (documents, choices), by task.
    """
    spreads = [task.spread for task in tasks]
    margins = [task.margins(task.scores) for task in tasks]
    result = []
    for place in sorted(changes):
        rows, means, errors = [], [], []
        for number, task in enumerate(tasks):
            scores = task.scores + changes[place][number]
            moved = task.margins(scores) - margins[number]
            arm = task.arm(scores)
            mean, error = float(moved.mean()), _error(moved)
            rows.append(
                HeadTask(
                    len(moved),
                    arm.accuracy,
                    arm.corrected,
                    mean,
                    _tail(mean, error, len(moved) - 1),
                )
            )
            means.append(mean / spreads[number])
            errors.append(error / spreads[number])
        effect = math.fsum(means) / len(means)
        stderr = math.hypot(*errors) / len(errors)
        freedom = sum(row.n - 1 for row in rows)
        accuracy = math.fsum(row.accuracy for row in rows) / len(rows)
        p = _tail(effect, stderr, freedom)
        result.append(HeadEffect(*place, effect, stderr, p, accuracy, tuple(rows)))
    return result


def both_splits(
    first: tuple[Sequence[TaskScores], Mapping[tuple[int, int, int], Sequence[Array]]],
    second: tuple[Sequence[TaskScores], Mapping[tuple[int, int, int], Sequence[Array]]],
) -> tuple[list[TaskScores], dict[tuple[int, int, int], list[Array]]]:
    """Return baselines and changes of two sets of documents of the same tasks as one.

    Args:
        first: baselines, and changes by place as for :func:`head_effects`.
        second: of other documents, the same tasks and places.
    """
    tasks = [one.followed_by(two) for one, two in zip(first[0], second[0], strict=True)]
    changes = {}
    for place, parts in first[1].items():
        changes[place] = [
            np.concatenate([_widened(part, task.scores.shape[1], 0.0) for part in pair])
            for task, *pair in zip(tasks, parts, second[1][place], strict=True)
        ]
    return tasks, changes


def _widened(table: Array, width: int, value: float) -> Array:
    """Return (n, choices) with columns of ``value`` up to ``width``."""
    return np.pad(table, ((0, 0), (0, width - table.shape[1])), constant_values=value)


def _error(values: Array) -> float:
    if len(values) < 2:
        return 0.0
    return float(values.std(ddof=1)) / math.sqrt(len(values))


def _tail(mean: float, error: float, freedom: int) -> float:
    """One-sided p of Student's t; no change at all is no evidence."""
    if error <= 1e-12 * abs(mean):
        return 0.0 if mean > 0 else 1.0
    return float(scipy.special.stdtr(max(freedom, 1), -mean / error))


def as_rows(effects: Sequence[HeadEffect], tasks: Sequence[str]) -> dict[str, Any]:
    """Return the artifact's tables of effects: columns named once, one row a measurement."""
    return {
        "heads": {
            "columns": ["layer", "head", "strength", "effect", "stderr", "p", "accuracy"],
            "rows": [
                [e.layer, e.head, e.strength, *_round(e.effect, e.stderr, e.p, e.accuracy)]
                for e in effects
            ],
        },
        "by_task": {
            "columns": [
                "layer", "head", "strength", "task", "n", "accuracy", "corrected_accuracy",
                "margin_change", "p",
            ],
            "rows": [
                [e.layer, e.head, e.strength, task, row.n,
                 *_round(row.accuracy, row.corrected, row.margin_change, row.p)]
                for e in effects
                for task, row in zip(tasks, e.tasks, strict=True)
            ],
        },
    }  # fmt: skip


def _round(*values: float | None) -> list[float | None]:
    return [None if value is None else float(f"{value:.6g}") for value in values]
