"""From effects to a head set: the four rules, and the random sets it is held against.

``top`` takes the k heads of largest effect, k chosen on the verify split. ``paper`` takes every
head whose mean accuracy over the tasks is above the baseline's (the published rule).
``significant`` takes the heads whose margin change holds under Benjamini-Hochberg. ``joint`` adds
heads in the order of their effect while the set improves on the verify split, then drops those
that hurt.
Ties count as no improvement everywhere. What a set is worth is not said here: the documents that
choose it cannot say it (see :mod:`act_harness.search.choose.judgement`).
"""

from __future__ import annotations

import random
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from act_harness.errors import InternalError
from act_harness.evidence.stats import RESAMPLES, benjamini_hochberg
from act_harness.search.choose.sets import chosen_by

if TYPE_CHECKING:
    from collections.abc import Sequence

    from act_harness.search.choose.effects import HeadEffect
    from act_harness.search.choose.sets import Place, Reading, SetMeasurement
    from act_harness.search.recipe import Recipe

__all__ = ["Selection", "best_of_each_head", "random_sets", "refitted", "select_heads"]


@dataclass(frozen=True)
class Selection:
    """The chosen places in the order in which the rule took them, and how it came to that."""

    places: tuple[Place, ...]
    trace: dict[str, Any] = field(default_factory=dict)


def best_of_each_head(effects: Sequence[HeadEffect]) -> list[HeadEffect]:
    """Keep each head's best mass map; return the heads from the largest effect down."""
    best: dict[tuple[int, int], HeadEffect] = {}
    for effect in effects:
        place = effect.layer, effect.head
        if place not in best or effect.effect > best[place].effect:
            best[place] = effect
    return sorted(best.values(), key=lambda e: (-e.effect, e.place))


def select_heads(
    effects: Sequence[HeadEffect],
    recipe: Recipe,
    *,
    baseline_accuracy: float,
    verify: SetMeasurement | None,
    resamples: int = RESAMPLES,
) -> Selection:
    """Apply the recipe's rule.

    Args:
        effects: every measured (layer, head, strength).
        recipe: the rule and its settings.
        baseline_accuracy: mean over the tasks of the untouched model on the search split.
        verify: measures sets on the verify split; None where there is none.
        resamples: of the intervals in the trace of rule ``top``.
    """
    ranked = best_of_each_head(effects)
    if recipe.rule == "paper":
        return _paper(effects, baseline_accuracy)
    if recipe.rule == "significant":
        return _significant(effects, recipe)
    if verify is None:
        raise InternalError(f"rule {recipe.rule!r} needs a verify split")
    if recipe.rule == "top":
        return _top(ranked, recipe, verify, resamples)
    return _joint(ranked, recipe, verify)


def _paper(effects: Sequence[HeadEffect], baseline: float) -> Selection:
    best: dict[tuple[int, int], HeadEffect] = {}
    for effect in effects:  # of several mass maps, the one of highest accuracy
        place = effect.layer, effect.head
        if place not in best or effect.accuracy > best[place].accuracy:
            best[place] = effect
    above = [e for e in best.values() if e.accuracy > baseline + 1e-12]
    above.sort(key=lambda e: (-e.accuracy, e.place))
    return Selection(tuple(e.place for e in above), {"baseline_accuracy": round(baseline, 6)})


def _significant(effects: Sequence[HeadEffect], recipe: Recipe) -> Selection:
    # every mass map of a head is a test of its own
    found = benjamini_hochberg([e.p for e in effects], q=recipe.significant.q)
    kept = [e for e, yes in zip(effects, found.rejected, strict=True) if yes]
    places = tuple(e.place for e in best_of_each_head(kept))
    return Selection(places, {"tests": len(effects), "q": recipe.significant.q})


def _helpful(ranked: Sequence[HeadEffect]) -> list[Place]:
    return [e.place for e in ranked if e.effect > 0]


def _top(
    ranked: Sequence[HeadEffect], recipe: Recipe, verify: SetMeasurement, resamples: int
) -> Selection:
    reading, helpful = chosen_by(recipe), _helpful(ranked)
    sizes = sorted({min(size, len(helpful)) for size in recipe.top.sizes} - {0})
    outcomes = verify.outcomes([helpful[:size] for size in sizes])
    untouched = verify.baseline().score(reading)
    best, chosen, tried = untouched, 0, []
    for size, outcome in zip(sizes, outcomes, strict=True):
        value = outcome.score(reading)
        if value > best + 1e-12:
            best, chosen = value, size
        found = outcome.difference(reading, resamples=resamples)
        interval = [round(end, 6) for end in found.interval]
        tried.append(
            {"heads": size, **outcome.to_json(), "value": round(value, 6), "interval": interval}
        )
    trace = {
        "criterion": reading,
        "untouched": round(untouched, 6),
        "chosen": chosen,
        "reason": _reason(chosen, reading, untouched, best),
        "tried": tried,
    }
    return Selection(tuple(helpful[:chosen]), trace)


_NAMES = {
    "accuracy": "raw accuracy",
    "objective": "label-prior corrected accuracy",
    "margin": "margin",
}


def _reason(chosen: int, reading: Reading, untouched: float, best: float) -> str:
    """Say why a size was taken, for those who look at the curve."""
    name = _NAMES[reading]
    if not chosen:
        return f"no number of heads has a higher {name} on the verify documents than no heads"
    unit = "{:.3f}" if reading == "margin" else "{:.1%}"
    return (
        f"{chosen} heads: the highest {name} on the verify documents, {unit.format(best)} against "
        f"{unit.format(untouched)} without heads (of equals the fewest)"
    )


def refitted(selection: Selection, effects: Sequence[HeadEffect], documents: int) -> Selection:
    """Take as many heads as rule ``top`` chose, in the order of effects on both splits.

    Args:
        selection: of rule ``top``.
        effects: of every measured place on the documents of both splits.
        documents: number of them.
    """
    places = tuple(_helpful(best_of_each_head(effects))[: len(selection.places)])
    record = {
        "documents": documents,
        "before": [list(place) for place in selection.places],
        "kept": len(set(places) & set(selection.places)),
        "columns": ["layer", "head", "strength", "effect", "stderr"],
        "rows": [[*e.place, *(float(f"{v:.6g}") for v in (e.effect, e.stderr))] for e in effects],
    }
    return Selection(places, {**selection.trace, "refit": record})


def _joint(ranked: Sequence[HeadEffect], recipe: Recipe, verify: SetMeasurement) -> Selection:
    reading, candidates = chosen_by(recipe), _helpful(ranked)[: recipe.joint.candidates]

    def value(places: Sequence[Place]) -> float:
        return verify.outcomes([places])[0].score(reading)

    chosen: list[Place] = []
    best, misses, steps = value(()), 0, []
    for place in candidates:
        now = value([*chosen, place])
        taken = now > best + 1e-12
        steps.append({"add": list(place), "value": round(now, 6), "kept": taken})
        if taken:
            chosen.append(place)
            best, misses = now, 0
        else:
            misses += 1
            if misses >= recipe.joint.patience:
                break
    for place in list(chosen[:-1]):  # the last one was judged within the whole set just now
        rest = [other for other in chosen if other != place]
        now = value(rest)
        dropped = now > best + 1e-12
        steps.append({"drop": list(place), "value": round(now, 6), "kept": not dropped})
        if dropped:
            chosen, best = rest, now
    return Selection(tuple(chosen), {"criterion": reading, "steps": steps})


def random_sets(
    selection: Selection, grid: dict[int, tuple[int, ...]], recipe: Recipe
) -> list[tuple[Place, ...]]:
    """Draw head sets of the size of the selection, with its mass maps handed out at random."""
    everything = [(layer, head) for layer, heads in grid.items() for head in heads]
    maps = [place[2] for place in selection.places]
    drawn = []
    for number in range(recipe.controls.random_sets if maps else 0):
        # a string seed: the same draw on every version and machine
        source = random.Random(f"{recipe.controls.seed}/{number}")  # noqa: S311 - no secret
        places = source.sample(everything, len(maps))
        mixed = source.sample(maps, len(maps))
        drawn.append(tuple(sorted((*place, one) for place, one in zip(places, mixed, strict=True))))
    return drawn
