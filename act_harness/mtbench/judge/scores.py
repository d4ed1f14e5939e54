"""From ratings to scores: means with intervals over questions, and the paired difference of arms.

An answer's score is the mean of its ratings (``--rejudge``). The two turns of a question are no
independent evidence, so intervals resample questions, and the arms are compared on the same
(question, turn) pairs. A missing judgment is left out of the mean and counted; it is never 0.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from act_harness.evidence.stats import (
    PairedDifference,
    Verdict,
    benjamini_hochberg,
    estimate_mean,
    paired_difference,
    verdict,
)
from act_harness.mtbench.judge.plan import Place

__all__ = ["ArmScores", "Difference", "Missing", "Score", "compare_arms", "score_arm"]

Rating = tuple[Place, float | None, str]
"""Where it belongs, the rating (None: missing), and why it is missing."""

_Answers = dict[tuple[str, int], tuple[str, float]]
"""(question, turn) to (category, mean rating); missing ones are not in it."""


@dataclass(frozen=True)
class Score:
    """A mean rating and how well it is known."""

    mean: float
    low: float | None
    """Ends of the confidence interval; None where a single question allows none."""
    high: float | None
    questions: int
    answers: int
    """Answers with a rating."""


@dataclass(frozen=True)
class Missing:
    """Judgments that could not be had."""

    judgments: int
    missing: int
    reasons: Mapping[str, int]

    @property
    def rate(self) -> float:
        """Share of missing judgments, 0..1."""
        return self.missing / self.judgments if self.judgments else 0.0


@dataclass(frozen=True)
class ArmScores:
    """Everything about one arm; a score is None where no judgment is left."""

    arm: str
    overall: Score | None
    turns: Mapping[int, Score | None]
    categories: Mapping[str, Score | None]
    missing: Mapping[int, Missing]
    """By turn."""
    repeat_spread: float | None
    """Mean standard deviation of an answer's repeated ratings; None with one judgment each."""


@dataclass(frozen=True)
class Difference:
    """One arm against another on the answers that both have a rating for."""

    what: str
    """``overall``, ``turn 1``, ``turn 2`` or a category."""
    a: str
    b: str
    result: PairedDifference
    p_adjusted: float | None
    """Corrected over the categories; None for overall and turns."""
    verdict: Verdict
    """Whether ``b`` is better than ``a``."""


def score_arm(arm: str, ratings: Iterable[Rating], *, confidence: float, seed: int) -> ArmScores:
    """Return the scores of one arm from all of its ratings."""
    own = [rating for rating in ratings if rating[0].arm == arm]
    answers = _answers(own)
    turns = sorted({place.turn for place, _, _ in own})
    categories = list(dict.fromkeys(place.category for place, _, _ in own))

    def score(chosen: _Answers) -> Score | None:
        return _score(chosen, confidence=confidence, seed=seed)

    return ArmScores(
        arm=arm,
        overall=score(answers),
        turns={turn: score(_pick(answers, turn=turn)) for turn in turns},
        categories={name: score(_pick(answers, category=name)) for name in categories},
        missing={turn: _missing(own, turn) for turn in turns},
        repeat_spread=_spread(own),
    )


def compare_arms(
    a: str, b: str, ratings: Iterable[Rating], *, confidence: float, seed: int
) -> list[Difference]:
    """Return the differences ``b - a``: overall, by turn, by category.

    A line with fewer than two questions in common is left out.
    """
    kept = list(ratings)
    first = _answers(rating for rating in kept if rating[0].arm == a)
    second = _answers(rating for rating in kept if rating[0].arm == b)
    common = {place: first[place] for place in first if place in second}
    turns = sorted({turn for _, turn in common})
    categories = list(dict.fromkeys(category for category, _ in common.values()))
    chosen = {
        "overall": common,
        **{f"turn {turn}": _pick(common, turn=turn) for turn in turns},
        **{category: _pick(common, category=category) for category in categories},
    }
    results: dict[str, PairedDifference] = {}
    for what, places in chosen.items():
        questions = [question for question, _ in places]
        if len(set(questions)) >= 2:
            results[what] = paired_difference(
                [first[place][1] for place in places],
                [second[place][1] for place in places],
                clusters=questions,
                confidence=confidence,
                seed=seed,
            )
    tested = [name for name in categories if name in results]
    adjusted = benjamini_hochberg([results[name].p_value for name in tested]).adjusted.tolist()
    by_name: dict[str, float] = dict(zip(tested, adjusted, strict=True))
    return [
        Difference(
            what, a, b, result, by_name.get(what),
            verdict(result, by_name.get(what), alpha=1 - confidence),
        )
        for what, result in results.items()
    ]  # fmt: skip


def _answers(ratings: Iterable[Rating]) -> _Answers:
    values: dict[tuple[str, int], list[float]] = {}
    categories: dict[str, str] = {}
    for place, rating, _ in ratings:
        if rating is not None:
            values.setdefault((place.question, place.turn), []).append(rating)
            categories[place.question] = place.category
    return {
        place: (categories[place[0]], math.fsum(known) / len(known))
        for place, known in values.items()
    }


def _pick(answers: _Answers, *, turn: int | None = None, category: str | None = None) -> _Answers:
    return {
        place: value
        for place, value in answers.items()
        if turn in (None, place[1]) and category in (None, value[0])
    }


def _score(answers: _Answers, *, confidence: float, seed: int) -> Score | None:
    if not answers:
        return None
    questions = [question for question, _ in answers]
    values = [value for _, value in answers.values()]
    distinct = len(set(questions))
    if distinct < 2:
        return Score(math.fsum(values) / len(values), None, None, distinct, len(values))
    found = estimate_mean(values, clusters=questions, confidence=confidence, seed=seed)
    return Score(found.mean, found.interval.low, found.interval.high, distinct, len(values))


def _missing(ratings: Sequence[Rating], turn: int) -> Missing:
    own = [rating for rating in ratings if rating[0].turn == turn]
    reasons: dict[str, int] = {}
    for _, rating, reason in own:
        if rating is None:
            # What a server said differs from call to call; its kind stands before the colon.
            kind = reason.partition(":")[0]
            reasons[kind] = reasons.get(kind, 0) + 1
    return Missing(len(own), sum(reasons.values()), reasons)


def _spread(ratings: Sequence[Rating]) -> float | None:
    repeated: dict[tuple[str, int], list[float]] = {}
    for place, rating, _ in ratings:
        if rating is not None:
            repeated.setdefault((place.question, place.turn), []).append(rating)
    spreads = []
    for values in repeated.values():
        if len(values) > 1:
            mean = math.fsum(values) / len(values)
            spreads.append(
                math.sqrt(math.fsum((v - mean) ** 2 for v in values) / (len(values) - 1))
            )
    return math.fsum(spreads) / len(spreads) if spreads else None
