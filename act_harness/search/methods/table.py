"""From arms' scores to one table: every column's accuracy, and its difference from the untouched.

Columns are raw accuracy, accuracy by length where choices differ by document, and every calibration
of scores that asks the model nothing more (:mod:`act_harness.evidence.calibrators`), apart for
tasks whose choices are the same for every document and tasks where they differ. Differences are
paired by document, p-values adjusted over the methods of a column that found heads: whether one did
was decided by other documents, and one that did not is the untouched model.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from act_harness.errors import InternalError
from act_harness.evidence.calibrators import (
    CALIBRATORS,
    CalibratorInputs,
    LabelledScores,
    calibrated_hits,
    lengths_of,
)
from act_harness.evidence.choices import padded
from act_harness.evidence.samples import ChoiceScores
from act_harness.evidence.stats import (
    RESAMPLES,
    PairedDifference,
    Part,
    Verdict,
    benjamini_hochberg,
    combined_difference,
    verdict,
)

if TYPE_CHECKING:
    from act_harness.evidence.resampling import Array
    from act_harness.search.methods.arms import Arm, Parts

__all__ = ["Cell", "Column", "Table", "make_table"]


class Answers(NamedTuple):
    """An arm's scores of a task, and what its readings need beside them."""

    choices: ChoiceScores
    inputs: CalibratorInputs
    tokens: Array
    """Tokens of each choice, (documents, choices); minus infinity where there is none."""


Hits = Callable[[Answers], "Array"]


class Column(NamedTuple):
    """One reading of the answers, of some tasks."""

    name: str
    title: str
    tasks: tuple[str, ...]
    hits: Hits
    says: str
    """Which choice it takes for the answer, in a clause."""


class Cell(NamedTuple):
    """A method's accuracy in a column."""

    result: PairedDifference
    """Against the untouched model."""
    p_adjusted: float
    """After Benjamini-Hochberg over the methods of the column that found heads; 1 without heads."""
    verdict: Verdict
    by_task: dict[str, float]
    """Accuracy by task."""

    def to_json(self) -> dict[str, Any]:
        """Return the figures."""
        found = self.result
        return {
            "accuracy": found.score_b,
            "difference": found.difference,
            "interval": list(found.interval),
            "p": found.p_value,
            "p_adjusted": self.p_adjusted,
            "verdict": self.verdict,
            "by_task": self.by_task,
        }


@dataclass(frozen=True)
class Table:
    """Methods against the untouched model, on the same documents."""

    columns: tuple[Column, ...]
    untouched: dict[str, dict[str, float]]
    """Column to task to accuracy."""
    cells: dict[str, dict[str, Cell]]
    """Method to column to cell."""

    def level(self, column: Column) -> float:
        """Return the untouched model's accuracy in a column, mean over its tasks."""
        return float(np.mean(list(self.untouched[column.name].values())))


def make_table(
    untouched: Arm, arms: Sequence[Arm], parts: Parts, *, resamples: int = RESAMPLES
) -> Table:
    """Compare arms with the untouched model.

    Args:
        untouched: of the stock model.
        arms: of the methods.
        parts: the documents that all of them scored.
        resamples: bootstrap resamples and sign flips of each interval and p.
    """
    columns = _columns(parts)
    base = {column.name: _all_hits(untouched, column, parts) for column in columns}
    cells: dict[str, dict[str, Cell]] = {arm.method: {} for arm in arms}
    for column in columns:
        hits = {arm.method: _all_hits(arm, column, parts) for arm in arms}
        results = [
            combined_difference(
                [Part(base[column.name][task], own[task]) for task in column.tasks],
                resamples=resamples,
            )
            for own in hits.values()
        ]
        tested = [number for number, arm in enumerate(arms) if arm.heads]
        adjusted = np.ones(len(arms))
        if tested:
            found = benjamini_hochberg([results[number].p_value for number in tested])
            adjusted[tested] = found.adjusted
        for (name, own), result, p in zip(hits.items(), results, adjusted.tolist(), strict=True):
            cells[name][column.name] = Cell(result, p, verdict(result, p), _means(own))
    return Table(columns, {name: _means(own) for name, own in base.items()}, cells)


def _columns(parts: Parts) -> tuple[Column, ...]:
    same = {task: _same_choices(parts, task) for task in parts["evaluation"]}
    fixed = tuple(task for task, alike in same.items() if alike)
    loose = tuple(task for task, alike in same.items() if not alike)
    found = []
    for tasks, any_choices, ending, words in (
        (fixed, False, "", ""),
        (loose, True, "_other_tasks", ", choices differ by document"),
    ):
        if not tasks:
            continue
        readings: list[tuple[str, Hits, str]] = [("raw", _raw, "scores as the model gives them")]
        if any_choices:
            readings += [
                ("by_characters", _by_characters, "scores divided by characters (acc_norm)"),
                ("by_tokens", _by_tokens, "scores divided by tokens"),
            ]
        readings += [
            (one.name, partial(_calibrated, one.name), one.says)
            for one in CALIBRATORS.values()
            if one.needs in (None, "labelled") and (one.any_choices or not any_choices)
        ]
        found += [
            Column(f"{name}{ending}", _title(name) + words, tasks, hits, says)
            for name, hits, says in readings
        ]
    return tuple(found)


def _raw(answers: Answers) -> Array:
    return _hits(answers, answers.choices.scores)


def _by_characters(answers: Answers) -> Array:
    """Score a character of a choice, as lm-eval's ``acc_norm`` has it."""
    rows = [[float(len(text)) for text in row] for row in answers.choices.choices]
    return _hits(answers, _normalised(answers, padded(rows)))


def _by_tokens(answers: Answers) -> Array:
    return _hits(answers, _normalised(answers, answers.tokens))


def _normalised(answers: Answers, lengths: Array) -> Array:
    """Divide scores by lengths of at least 1; a choice that does not exist stays the worst."""
    there = np.isfinite(lengths)
    scores = np.where(there, answers.choices.scores, 0.0)
    return np.where(there, scores / np.maximum(np.where(there, lengths, 1.0), 1.0), -np.inf)


def _hits(answers: Answers, scores: Array) -> Array:
    return np.asarray(scores.argmax(axis=1) == answers.choices.labels, dtype=np.float64)


def _title(name: str) -> str:
    """Return a reading's words: a calibrator's are those of the metric that ``eval`` shows."""
    metric = CALIBRATORS[name].metric if name in CALIBRATORS else name
    return metric.removeprefix("acc_").replace("_", " ")


def _calibrated(name: str, answers: Answers) -> Array:
    found = calibrated_hits(CALIBRATORS[name], answers.choices, answers.inputs)
    if found is None:
        raise InternalError(f"calibration {name!r} has a column of tasks that it does not apply to")
    return found


def _all_hits(arm: Arm, column: Column, parts: Parts) -> dict[str, Array]:
    return {task: column.hits(_read(arm, task, parts)) for task in column.tasks}


def _read(arm: Arm, task: str, parts: Parts) -> Answers:
    documents, same = parts["evaluation"][task], _same_choices(parts, task)
    labelled = [*parts["search"][task], *parts["verify"][task]]
    rows = [*arm.scores["search"][task], *arm.scores["verify"][task]]
    choices = ChoiceScores(
        scores=padded(arm.scores["evaluation"][task]),
        labels=np.array([one.right for one in documents], dtype=np.int64),
        same_choices=same,
        choices=tuple(one.choices for one in documents),
    )
    known = LabelledScores(
        scores=tuple(map(tuple, rows)),
        labels=tuple(one.right for one in labelled),
        lengths=tuple(lengths_of(one.choices) for one in labelled),
        same_choices=same,
    )
    tokens = [[float(len(answer)) for _, answer in one.requests] for one in documents]
    return Answers(choices, CalibratorInputs(labelled=known), padded(tokens))


def _same_choices(parts: Parts, task: str) -> bool:
    """Say whether all documents of a task, of every split, have the same choices."""
    return len({one.choices for split in parts.values() for one in split[task]}) == 1


def _means(hits: dict[str, Array]) -> dict[str, float]:
    return {task: float(found.mean()) for task, found in hits.items()}
