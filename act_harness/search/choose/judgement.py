"""What a chosen head set is worth: judged on documents that neither found nor chose it.

A set that was picked because it did best on some documents looks better on those than it is: where
every head is noise, all sets chosen on ``verify`` "beat" the untouched model there. So the split
``judge`` is scored once, after every choice, and nothing is chosen by it. Two comparisons are
recorded, each in every column that exists (raw accuracy, label-prior corrected accuracy of the same
tasks, raw accuracy of the tasks whose choices differ by document):

- against the untouched model: paired by document, two-sided at :data:`LEVEL`
  (:func:`act_harness.evidence.stats.verdict`), so that noise "beats" it in at most half of that
  share.
- against random head sets of the same size on the same documents: the selected set's rank among
  them. Noise comes first among R of them with probability 1/(R+1), which is the level unless more
  sets allow :data:`LEVEL`. Equal scores count for the random set.

:mod:`act_harness.bench.null_search` simulates searches without any effect and holds the flags to
that.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from act_harness.evidence.stats import RESAMPLES, verdict
from act_harness.search.choose.select import Selection, random_sets, select_heads
from act_harness.search.choose.sets import chosen_by

if TYPE_CHECKING:
    from act_harness.evidence.stats import PairedDifference
    from act_harness.search.choose.effects import HeadEffect
    from act_harness.search.choose.sets import Outcome, Reading, SetMeasurement
    from act_harness.search.recipe import Recipe

__all__ = ["LEVEL", "NOT_JUDGED", "conclude", "describe", "judged", "judgement"]

LEVEL = 0.05
"""Accepted share of false alarms of each comparison."""

BEATS = "beats the untouched model"
NOT_SHOWN = "not shown to beat the untouched model"
WORSE = "worse than the untouched model"
NOT_JUDGED = "not judged"

_WORDS: dict[str, str] = {
    "raw": "raw accuracy",
    "corrected": "label-prior corrected accuracy",
    "raw_other_tasks": "raw accuracy of the tasks whose choices differ by document",
}


def conclude(
    effects: Sequence[HeadEffect],
    recipe: Recipe,
    *,
    baseline_accuracy: float,
    grid: dict[int, tuple[int, ...]],
    verify: SetMeasurement | None,
    judge: SetMeasurement | None,
    refit: Callable[[Selection], Selection],
    resamples: int = RESAMPLES,
) -> tuple[Selection, dict[str, Any]]:
    """Choose a head set, then judge it: the whole way from effects to what an artifact says.

    Args:
        effects: of every measured (layer, head, mass map) on the search split.
        recipe: rule and controls.
        baseline_accuracy: mean over the tasks of the untouched model on the search split.
        grid: heads that were searched, by layer; random sets are drawn from them.
        verify: measures sets on the documents that choose; None where there are none.
        judge: measures sets on documents that do nothing else; None where there are none.
        refit: orders the heads anew by both splits; called for rule ``top`` with ``refit``.
        resamples: bootstrap resamples and sign flips of each interval and p.
    """
    selection = select_heads(
        effects, recipe, baseline_accuracy=baseline_accuracy, verify=verify, resamples=resamples
    )
    if recipe.rule == "top" and recipe.top.refit and selection.places:
        selection = refit(selection)
    return selection, judged(
        selection, recipe, grid=grid, judge=judge, reading=chosen_by(recipe), resamples=resamples
    )


def judged(
    selection: Selection,
    recipe: Recipe,
    *,
    grid: dict[int, tuple[int, ...]],
    judge: SetMeasurement | None,
    reading: Reading,
    resamples: int = RESAMPLES,
) -> dict[str, Any]:
    """Return what the artifact says about a selection: see :func:`judgement`.

    Args:
        selection: what was chosen; random sets get its mass maps, handed out at random.
        recipe: controls.
        grid: heads that were searched, by layer; random sets are drawn from them.
        judge: measures sets on documents that do nothing else; None where there are none.
        reading: what the selection was chosen by.
        resamples: of each interval and p.
    """
    if not selection.places:
        return _unjudged("no head was selected: the artifact is the untouched model")
    if judge is None:
        return _unjudged("no documents were left to judge the set on")
    outcome, *others = judge.outcomes([selection.places, *random_sets(selection, grid, recipe)])
    return judgement(
        outcome, others, chosen_by=reading, heads=len(selection.places), resamples=resamples
    )


def judgement(
    outcome: Outcome,
    drawn: Sequence[Outcome],
    *,
    chosen_by: Reading,
    heads: int,
    resamples: int = RESAMPLES,
) -> dict[str, Any]:
    """Return what the artifact says about a set that other documents have chosen.

    Args:
        outcome: of the set on the judge split.
        drawn: of random sets of as many heads on the same documents.
        chosen_by: what the set was chosen by; recorded of all tasks, without a verdict.
        heads: number of heads in each.
        resamples: of each interval and p.
    """
    columns, verdicts = {}, {}
    chosen = outcome.column_of(chosen_by)
    differences = {
        name: outcome.difference(name, resamples=resamples)
        for name in dict.fromkeys([*outcome.readings(), "margin", chosen])
    }
    for name in outcome.readings():
        found = differences[name]
        verdicts[name] = verdict(found, alpha=LEVEL)
        columns[name] = {
            "tasks": outcome.tasks_of(name),
            **_difference(found),
            "interval_includes_zero": _includes_zero(found),
            "verdict": verdicts[name],
            "random_sets": _against_random(found.score_b, [one.score(name) for one in drawn]),
        }
    return {
        "verdict": _sentence(verdicts),
        "level": LEVEL,
        "documents": {task: len(arm.hits) for task, arm in outcome.arms.items()},
        "heads": heads,
        "columns": columns,
        "margin": _difference(differences["margin"]),
        "chosen_by": {
            "reading": chosen_by,
            **_difference(differences[chosen]),
            "random_sets": [round(one.score(chosen_by), 6) for one in drawn],
        },
        "beats_untouched": {name: found == "improved" for name, found in verdicts.items()},
        "beats_random": {name: one["random_sets"]["beaten"] for name, one in columns.items()},
        "interval_includes_zero": any(one["interval_includes_zero"] for one in columns.values()),
        "untouched_by_task": outcome.untouched().by_task(),
        "selected_by_task": outcome.by_task(),
    }


def _unjudged(reason: str) -> dict[str, Any]:
    return {"verdict": NOT_JUDGED, "reason": reason, "level": LEVEL, "columns": {}}


def _difference(found: PairedDifference) -> dict[str, Any]:
    return {
        "untouched": round(found.score_a, 6),
        "selected": round(found.score_b, 6),
        "difference": round(found.difference, 6),
        "interval": [round(end, 6) if math.isfinite(end) else None for end in found.interval],
        "confidence": found.confidence,
        "p": float(f"{found.p_value:.4g}"),
    }


def _includes_zero(found: PairedDifference) -> bool:
    return found.interval.low <= 0.0 <= found.interval.high


def _against_random(mine: float, scores: Sequence[float]) -> dict[str, Any]:
    """Return the rank of a set among random ones as a p-value, and whether it beats them."""
    count = len(scores)
    not_below = sum(score >= mine - 1e-12 for score in scores)
    p, level = (1 + not_below) / (count + 1), max(LEVEL, 1 / (count + 1))
    return {
        "scores": [round(score, 6) for score in scores],
        "p": round(p, 6),
        "level": round(level, 6),
        "beaten": p <= level if count else None,
    }


def _sentence(verdicts: Mapping[Reading, str]) -> str:
    better = [_WORDS[name] for name, found in verdicts.items() if found == "improved"]
    worse = [_WORDS[name] for name, found in verdicts.items() if found == "regressed"]
    lost = f"worse in {' and '.join(worse)}"
    if not better:
        return f"{WORSE} in {' and '.join(worse)}" if worse else NOT_SHOWN
    if len(better) == len(verdicts):
        return BEATS
    return f"{BEATS} in {' and '.join(better)} only" + (f", {lost}" if worse else "")


def describe(found: Mapping[str, Any]) -> list[str]:
    """Return a judgement as lines for a terminal, the verdict first."""
    if not found["columns"]:
        return [f"{found['verdict']}: {found['reason']}"]
    count = sum(found["documents"].values())
    lines = [f"{found['verdict']} ({count} documents that chose nothing, level {found['level']:g})"]
    for name, one in found["columns"].items():
        lines += [f"  {_WORDS[name]}: {_figures(one)}", *_random_lines(one["random_sets"])]
    if not any(one["random_sets"]["scores"] for one in found["columns"].values()):
        lines.append("  held against no random head sets")
    if len(found["columns"]) > 2:  # neither column is of all tasks
        one = found["chosen_by"]
        if one["reading"] != "margin":
            lines.append(f"  all tasks, what the set was chosen by: {_figures(one)}")
    return lines


def _figures(one: Mapping[str, Any]) -> str:
    low, high = one["interval"]
    span = "unknown" if low is None else f"{100 * low:+.1f} to {100 * high:+.1f}"
    return (
        f"{100 * one['untouched']:.1f} %, calibrated {100 * one['selected']:.1f} % "
        f"({100 * one['difference']:+.1f}; {100 * one['confidence']:g} % interval {span})"
    )


def _random_lines(found: Mapping[str, Any]) -> list[str]:
    scores = found["scores"]
    if not scores:
        return []
    mean = 100 * math.fsum(scores) / len(scores)
    said = "beats" if found["beaten"] else "does not beat"
    return [
        f"    {said} {len(scores)} random sets of that size (mean {mean:.1f} %, best "
        f"{100 * max(scores):.1f} %; p {found['p']:.2g}, level {found['level']:.2g})"
    ]
