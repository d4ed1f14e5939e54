"""Confidence intervals of paired differences, for many units and for few.

Percentiles of a bootstrap are too narrow where few documents or clusters were resampled: 95 %
intervals cover 0.75 at 3 units and 0.90 at 10. So percentiles are taken further out by what is
known to lack, with fewer than ten units Student's interval is given, and answers that are right
or wrong have an interval of their own. results/benchmarks/coverage.md has what each covers; what
falls short are strongly skewed differences of ten units and fewer, 0.88 to 0.90.

The machinery below :mod:`act_harness.evidence.stats`, which says what the numbers mean.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import scipy.stats  # type: ignore[import-untyped]

from act_harness.evidence.resampling import Array, Interval, Units

__all__ = [
    "degrees_of_freedom",
    "expanded",
    "flips_interval",
    "percentile_interval",
    "spread",
    "student_interval",
]

_FEW_DEGREES = 9
"""With fewer degrees of freedom a bootstrap has too few distinct values in its tails."""


def spread(
    units: Sequence[Units],
    shares: Sequence[float],
    changed: tuple[int, int] | None,
    confidence: float,
    rng: np.random.Generator,
    resamples: int,
) -> tuple[float, Interval]:
    """Standard error and interval of the difference of the weighted mean of the tasks' scores.

    Args:
        units: Of every task.
        shares: Weight of every task, adding up to 1.
        changed: Gained and lost answers, for 0/1 values of single documents of one task.
        confidence: Level of the interval.
        rng: For the resamples.
        resamples: How many are drawn.
    """
    errors = [share * one.stderr() for share, one in zip(shares, units, strict=True)]
    stderr = math.hypot(*errors)
    if not math.isfinite(stderr):  # a single document says nothing about its own spread
        return stderr, Interval(-math.inf, math.inf)
    if changed is not None:
        return stderr, flips_interval(*changed, units[0].documents, confidence)
    degrees = degrees_of_freedom(units, shares)
    drawn = sum(
        share * one.replicates(rng, resamples) for share, one in zip(shares, units, strict=True)
    )
    draws = np.asarray(drawn)
    # What the bootstrap of few units lacks; without any spread there is nothing to widen.
    narrow = math.hypot(
        *(e * math.sqrt(1 - 1 / len(u.sums)) for e, u in zip(errors, units, strict=True))
    )
    widening = stderr / narrow if narrow > 0 else 1.0
    if any(one.transform is not None for one in units):  # the formula holds for means only
        stderr = float(np.std(draws, ddof=1)) * widening
    if degrees < _FEW_DEGREES:
        scores = np.asarray([one.scores() for one in units])
        difference = float(np.asarray(shares) @ (scores[:, 1] - scores[:, 0]))
        return stderr, student_interval(difference, stderr, degrees, confidence)
    return stderr, percentile_interval(draws, expanded(confidence, degrees, widening))


def degrees_of_freedom(units: Sequence[Units], shares: Sequence[float]) -> float:
    """Degrees of freedom of the standard error, by Satterthwaite's rule over the tasks."""
    spreads = [
        ((share * one.stderr()) ** 2, len(one.sums) - 1)
        for share, one in zip(shares, units, strict=True)
    ]
    if any(free < 1 for _, free in spreads):
        return 0.0
    total = math.fsum(spread for spread, _ in spreads)
    if total == 0:
        return float(sum(free for _, free in spreads))
    return total**2 / math.fsum(spread**2 / free for spread, free in spreads)


def flips_interval(gained: int, lost: int, documents: int, confidence: float) -> Interval:
    """Interval of the difference of two paired proportions, from the counts of changed answers.

    Bonett and Price (2012): Wald's interval after one gained and one lost answer are added among
    two more documents. Resampling would say nothing where few answers changed: of 20 documents of
    which 7 % change, every other sample holds no change or changes one way only.

    Args:
        gained: Documents that B alone has right.
        lost: Documents that A alone has right.
        documents: All of them.
        confidence: Level, between 0 and 1.
    """
    up, down = (gained + 1) / (documents + 2), (lost + 1) / (documents + 2)
    error = math.sqrt((up + down - (up - down) ** 2) / (documents + 2))
    half = float(scipy.stats.norm.isf((1 - confidence) / 2)) * error
    return Interval(max(up - down - half, -1.0), min(up - down + half, 1.0))


def student_interval(
    difference: float, stderr: float, degrees: float, confidence: float
) -> Interval:
    """Student's interval of a mean, with fractional degrees of freedom where tasks are combined."""
    half = float(scipy.stats.t.isf((1 - confidence) / 2, degrees)) * stderr
    return Interval(difference - half, difference + half)


def expanded(confidence: float, degrees: float, widening: float) -> float:
    """Return the level at which percentiles of a bootstrap cover ``confidence`` (Hesterberg 2015).

    The bootstrap of n units is too narrow twice: by the square root of ``(n - 1) / n``, and because
    the spread itself was estimated, which Student's t makes up for. Its percentiles are taken
    further out by as much; with many units nothing changes.

    Args:
        confidence: The level wanted.
        degrees: Degrees of freedom of the standard error.
        widening: Standard error over that of the bootstrap distribution, above 1.
    """
    quantile = float(scipy.stats.t.isf((1 - confidence) / 2, degrees))
    return 1 - 2 * float(scipy.stats.norm.sf(quantile * widening))


def percentile_interval(draws: Array, confidence: float) -> Interval:
    """Interval that leaves half of ``1 - confidence`` of the draws out on each side."""
    ordered = np.sort(draws)
    # Mirrored when the arms are. 1 - 0.9 is a little below 0.1, which must not cost a draw.
    skipped = math.floor(len(ordered) * (1 - confidence) / 2 + 1e-9)
    return Interval(float(ordered[skipped]), float(ordered[len(ordered) - 1 - skipped]))
