"""Paired statistics: what may be said about the difference between two arms on the same documents.

Both arms answer the same documents, so the document-by-document differences decide, not the two
scores side by side: most of a score's spread is the documents' difficulty, which the arms share.
Documents that share a passage, a context or a subject are no independent evidence; with cluster ids
they are resampled together.

Also offered from here: what is measured per document (:mod:`act_harness.evidence.choices`), rank
correlation and the correction for several tests. The paper (ICML 2024) reports bare accuracy
differences; nothing in this file stands in it.

Not here: reading results (:mod:`act_harness.evidence.results`), which arms and tasks are compared
(:mod:`act_harness.evidence.compare`). No torch: arrays are numpy's, in float64.
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Sequence
from dataclasses import dataclass, replace
from typing import Literal, NamedTuple

import numpy as np
import numpy.typing as npt
import scipy.stats  # type: ignore[import-untyped]

from act_harness.errors import ResultError
from act_harness.evidence.choices import (
    CorrectedAccuracy,
    answer_margin,
    corrected_accuracy,
    label_prior_corrected,
)
from act_harness.evidence.intervals import degrees_of_freedom, flips_interval, spread
from act_harness.evidence.resampling import (
    Array,
    Interval,
    Part,
    Transform,
    Units,
    same_length,
    sign_flip_p,
    vector,
)

__all__ = [
    "BenjaminiHochberg",
    "CorrectedAccuracy",
    "Estimate",
    "Interval",
    "McNemar",
    "PairedDifference",
    "Part",
    "Verdict",
    "answer_margin",
    "at_level",
    "benjamini_hochberg",
    "combined_difference",
    "corrected_accuracy",
    "estimate_mean",
    "label_prior_corrected",
    "mcnemar",
    "minimum_detectable_effect",
    "one_sided_p",
    "paired_difference",
    "spearman",
    "standard_error",
    "verdict",
]

Verdict = Literal["improved", "regressed", "inconclusive"]

SEED = 0
"""Of every draw, unless told otherwise: the same folders give the same intervals everywhere."""
RESAMPLES = 9999
"""Bootstrap resamples and sign flips where the distribution is drawn and not computed."""
NEGLIGIBLE = 1e-4
"""Differences up to this share of max(1, score) are never a verdict: rounding, not an effect."""


class McNemar(NamedTuple):
    """Exact McNemar test: could as many changes go one way if both ways were equally likely?"""

    gained: int
    """Documents wrong in A and right in B."""
    lost: int
    """Documents right in A and wrong in B."""
    p_value: float
    """Two-sided, exact (binomial with one half over the changed documents)."""


class Estimate(NamedTuple):
    """A mean and how well it is known."""

    mean: float
    stderr: float
    interval: Interval
    documents: int


@dataclass(frozen=True)
class PairedDifference:
    """The difference B minus A over the same documents, and how well it is known."""

    documents: int
    """Documents compared."""
    clusters: int | None
    """Groups of documents that were resampled together; None when each document stands alone."""
    score_a: float
    score_b: float
    difference: float
    """``score_b - score_a``."""
    stderr: float
    """Paired (and clustered) standard error of the difference; infinite for a single unit."""
    interval: Interval
    """Interval of the difference; by which method, see :func:`combined_difference`."""
    confidence: float
    """Level of the interval, for example 0.95."""
    p_value: float
    """Two-sided p of no difference, from ``test``."""
    test: Literal["mcnemar", "sign-flip"]
    """``mcnemar`` for 0/1 values of single documents, otherwise random signs of the units."""
    flips: McNemar | None
    """Changed answers where values are 0/1; with clusters its p ignores them, ``p_value`` not."""
    minimum_detectable: float
    """Smallest true difference that this comparison would find in 80 % of repetitions, as the only
    test or, after :func:`at_level`, as one of several; infinite where none could be found."""
    degrees: float
    """Degrees of freedom of ``stderr``: units less one, by Satterthwaite's rule over tasks."""
    units: int
    """Documents or clusters that were resampled."""


class BenjaminiHochberg(NamedTuple):
    """Which of several tests hold when the share of false discoveries is bounded."""

    adjusted: Array
    """Adjusted p-values, (tests,): to be held against the accepted share of false discoveries."""
    rejected: npt.NDArray[np.bool_]
    """``adjusted <= q``, (tests,)."""


# -- the paired comparison -------------------------------------------------------------------------


def paired_difference(
    a: Sequence[float] | Array,
    b: Sequence[float] | Array,
    *,
    weights: Sequence[float] | Array | None = None,
    clusters: Sequence[Hashable] | None = None,
    transform: Transform | None = None,
    confidence: float = 0.95,
    resamples: int = RESAMPLES,
    seed: int = SEED,
) -> PairedDifference:
    """Compare two arms on the same documents; see :class:`Part` for the arguments' meaning.

    For 0/1 values of single documents there is no chance in the result; otherwise it depends on
    ``seed`` alone. Which interval is given: :func:`combined_difference`.

    Args:
        a: Values of arm A, the reference, (documents,).
        b: Values of arm B, (documents,).
        weights: Weight of each document, (documents,).
        clusters: Cluster id of each document, (documents,).
        transform: Map from the weighted mean to the score.
        confidence: Level of the interval, between 0 and 1.
        resamples: How many resamples and sign flips are drawn.
        seed: Seed of the draws.

    Raises:
        ResultError: No documents, different lengths, values that are not finite, weights that are
            not positive, or a single cluster.
    """
    part = Part(a, b, weights, clusters, transform)
    return combined_difference([part], confidence=confidence, resamples=resamples, seed=seed)


def combined_difference(
    parts: Sequence[Part],
    *,
    weights: Sequence[float] | None = None,
    confidence: float = 0.95,
    resamples: int = RESAMPLES,
    seed: int = SEED,
) -> PairedDifference:
    """Compare two arms on a group of tasks: the score is the weighted mean of the tasks' scores.

    The tasks are taken as given (another draw would have the same tasks and other documents), so
    each is resampled within itself. Where the tasks themselves are the sample, as MMLU's subjects,
    pass their documents as one :class:`Part` with the subject as cluster id.

    The interval, for 0/1 values of single documents of one task: Bonett and Price's, see
    :func:`act_harness.evidence.intervals.flips_interval`. Otherwise, percentiles of the bootstrap
    over documents (clusters where given), further out for the number of units; with fewer than ten,
    Student's. Simulated coverage of 95 % intervals: results/benchmarks/coverage.md.

    Args:
        parts: The tasks.
        weights: Weight of each task, normalised here; None: the unweighted mean.
        confidence: Level of the interval, between 0 and 1.
        resamples: How many resamples and sign flips are drawn.
        seed: Seed of the draws.

    Raises:
        ResultError: As for :func:`paired_difference`.
    """
    if not parts:
        raise ResultError("nothing to compare: no task was given")
    shares = _shares(weights, len(parts))
    units = [Units.of(part) for part in parts]
    score_a = math.fsum(share * one.scores()[0] for share, one in zip(shares, units, strict=True))
    score_b = math.fsum(share * one.scores()[1] for share, one in zip(shares, units, strict=True))
    flips = _flips(parts)
    # One task, single documents, 0/1: everything follows from the two counts of changed answers.
    simple = len(units) == 1 and not units[0].grouped and parts[0].weights is None
    exact = flips if simple else None
    rng = np.random.default_rng(seed)
    changed = (exact.gained, exact.lost) if exact else None
    stderr, interval = spread(units, shares, changed, confidence, rng, resamples)
    number = sum(len(one.sums) for one in units)
    if flips is not None and flips.gained == flips.lost == 0:
        # No answer changed: there is no spread to resample, which does not mean that none can.
        interval = flips_interval(0, 0, number, confidence) if number > 1 else interval
    if exact is None:
        moves = np.concatenate(
            [share * one.moves() for share, one in zip(shares, units, strict=True)]
        )
    documents = sum(one.documents for one in units)
    result = PairedDifference(
        documents=documents,
        clusters=sum(len(u.sums) for u in units) if any(u.grouped for u in units) else None,
        score_a=score_a,
        score_b=score_b,
        difference=score_b - score_a,
        stderr=stderr,
        interval=interval,
        confidence=confidence,
        p_value=exact.p_value if exact else sign_flip_p(moves, rng, resamples),
        test="mcnemar" if exact else "sign-flip",
        flips=flips,
        minimum_detectable=math.inf,
        degrees=degrees_of_freedom(units, shares),
        units=number,
    )
    return at_level(result, 1 - confidence)


def at_level(result: PairedDifference, alpha: float) -> PairedDifference:
    """Return a comparison with the smallest difference that a test at ``alpha`` detects.

    For one of several tests, ``alpha`` over their number: where a single one of them has an effect,
    Benjamini-Hochberg finds it at that level, and where more of them do it finds smaller ones too.
    """
    fewest = _fewest_flips(alpha)  # of documents or of units' signs: fewer are never significant
    found = minimum_detectable_effect(result.stderr, alpha=alpha, degrees=result.degrees)
    if result.flips is not None:
        found = max(found, fewest / result.documents)
    unknown = not math.isfinite(result.stderr)
    if unknown or result.units < fewest or (result.flips is not None and found > 1):
        found = math.inf
    return replace(result, minimum_detectable=found)


def mcnemar(a: Sequence[float] | Array, b: Sequence[float] | Array) -> McNemar:
    """Exact McNemar test of two arms' 0/1 values, (documents,) each; two-sided.

    Raises:
        ResultError: Different lengths, or a value that is neither 0 nor 1.
    """
    first, second = vector(a, "a"), vector(b, "b")
    same_length(first, second)
    if not (_is_binary(first) and _is_binary(second)):
        raise ResultError("McNemar's test needs values that are 0 or 1; use paired_difference")
    gained = int(np.count_nonzero(second > first))
    lost = int(np.count_nonzero(second < first))
    changed = gained + lost
    p_value = float(scipy.stats.binomtest(gained, changed).pvalue) if changed else 1.0
    return McNemar(gained=gained, lost=lost, p_value=p_value)


def verdict(
    result: PairedDifference,
    p_adjusted: float | None = None,
    *,
    higher_is_better: bool | None = True,
    alpha: float = 0.05,
    negligible: float = NEGLIGIBLE,
) -> Verdict:
    """Say whether B improved on A, regressed, or neither can be said.

    A change is claimed only when the p-value (after the correction for several tasks) is at most
    ``alpha``, the interval excludes zero, and the difference is more than rounding: other batch
    sizes shift log-likelihoods in their last digits, all the same way.

    Args:
        result: The comparison.
        p_adjusted: Its p-value after :func:`benjamini_hochberg`; None: its own.
        higher_is_better: Direction of the metric; None (unknown) is always inconclusive.
        alpha: Accepted share of false alarms.
        negligible: Differences up to this share of ``max(1, abs(score_a))`` are no effect.
    """
    p_value = result.p_value if p_adjusted is None else p_adjusted
    small = abs(result.difference) <= negligible * max(1.0, abs(result.score_a))
    unsure = p_value > alpha or result.interval.low <= 0.0 <= result.interval.high
    if higher_is_better is None or small or unsure:
        return "inconclusive"
    return "improved" if (result.difference > 0) == higher_is_better else "regressed"


# -- single quantities -----------------------------------------------------------------------------


def estimate_mean(
    values: Sequence[float] | Array,
    *,
    clusters: Sequence[Hashable] | None = None,
    confidence: float = 0.95,
    resamples: int = RESAMPLES,
    seed: int = SEED,
) -> Estimate:
    """Mean of one arm's values, (documents,), with its interval as for :func:`paired_difference`.

    Raises:
        ResultError: As for :func:`paired_difference`.
    """
    given = vector(values, "values")
    result = paired_difference(
        np.zeros_like(given), given,
        clusters=clusters, confidence=confidence, resamples=resamples, seed=seed,
    )  # fmt: skip
    return Estimate(result.difference, result.stderr, result.interval, result.documents)


def standard_error(
    values: Sequence[float] | Array, *, clusters: Sequence[Hashable] | None = None
) -> float:
    """Standard error of the mean of ``values``, (documents,); infinite for a single unit.

    With clusters: the spread of the clusters' summed deviations (linearised ratio estimate), which
    equals the usual formula when every cluster holds one document.

    Raises:
        ResultError: As for :func:`paired_difference`.
    """
    given = vector(values, "values")
    return Units.of(Part(np.zeros_like(given), given, None, clusters)).stderr()


def minimum_detectable_effect(
    stderr: float, *, alpha: float = 0.05, power: float = 0.8, degrees: float = math.inf
) -> float:
    """Smallest true difference that a two-sided test at ``alpha`` finds with probability ``power``.

    ``(t(1 - alpha/2) + t(power)) * stderr``, in the unit of ``stderr``; Student's t with its
    ``degrees`` of freedom, the normal distribution where they are infinite.
    """
    t = scipy.stats.t
    return float((t.isf(alpha / 2, degrees) + t.ppf(power, degrees)) * stderr)


def benjamini_hochberg(p_values: Sequence[float] | Array, *, q: float = 0.05) -> BenjaminiHochberg:
    """Adjust p-values, (tests,), so that at most a share ``q`` of the discoveries is false.

    Raises:
        ResultError: A p-value is not between 0 and 1.
    """
    given = np.asarray(p_values, dtype=np.float64)
    if given.size == 0:
        return BenjaminiHochberg(given, np.zeros(0, dtype=np.bool_))
    if not bool(np.all((given >= 0) & (given <= 1))):
        raise ResultError("p-values must lie between 0 and 1")
    adjusted: Array = scipy.stats.false_discovery_control(given)
    return BenjaminiHochberg(adjusted, adjusted <= q)


def one_sided_p(changes: Array) -> Array:
    """P-values of "the mean change is not above zero", one a row of ``changes``.

    For the search: paired per-document changes, (heads, documents) to (heads,), by Student's t. A
    row without any change has p = 1, a row of equal positive changes p = 0.

    Raises:
        ResultError: Fewer than two documents, or a value that is not finite.
    """
    given = np.asarray(changes, dtype=np.float64)
    if given.ndim != 2 or given.shape[1] < 2 or not bool(np.isfinite(given).all()):
        raise ResultError("changes must be finite, (heads, documents), with 2 documents or more")
    mean = given.mean(axis=1)
    error = given.std(axis=1, ddof=1) / math.sqrt(given.shape[1])
    # Equal numbers leave a spread of rounding; 1e-12 of the mean is below any float64 t-value.
    constant = error <= 1e-12 * np.abs(mean)
    t_value = np.divide(mean, error, out=np.where(mean > 0, np.inf, -np.inf), where=~constant)
    return np.asarray(scipy.stats.t.sf(t_value, given.shape[1] - 1), dtype=np.float64)


def spearman(x: Sequence[float] | Array, y: Sequence[float] | Array) -> float:
    """Rank correlation of two orders, (items,) each; NaN when one of them is constant.

    Raises:
        ResultError: Different lengths, or fewer than two items.
    """
    first, second = vector(x, "x"), vector(y, "y")
    same_length(first, second)
    if len(first) < 2:
        raise ResultError("a rank correlation needs two items or more")
    if np.ptp(first) == 0 or np.ptp(second) == 0:
        return math.nan
    return float(scipy.stats.spearmanr(first, second).statistic)


# -- helpers ---------------------------------------------------------------------------------------


def _flips(parts: Sequence[Part]) -> McNemar | None:
    """McNemar over all parts' documents, or None where some value is not 0 or 1."""
    columns: tuple[list[Array], list[Array]] = ([], [])
    for part in parts:
        a, b = np.asarray(part.a, dtype=np.float64), np.asarray(part.b, dtype=np.float64)
        if part.transform is not None or not (_is_binary(a) and _is_binary(b)):
            return None
        columns[0].append(a)
        columns[1].append(b)
    return mcnemar(np.concatenate(columns[0]), np.concatenate(columns[1]))


def _fewest_flips(alpha: float) -> int:
    # Fewer changed answers than this cannot be significant even when all go one way.
    return math.ceil(math.log2(2 / alpha))


def _shares(weights: Sequence[float] | None, number: int) -> list[float]:
    given = [1.0] * number if weights is None else [float(weight) for weight in weights]
    if len(given) != number or not all(w > 0 and math.isfinite(w) for w in given):
        raise ResultError(f"{number} positive weights are needed, one a task")
    return [weight / sum(given) for weight in given]


def _is_binary(values: Array) -> bool:
    return bool(np.isin(values, (0.0, 1.0)).all())
