"""How resampling is done: the units, their bootstrap, and the random signs of a paired test.

The machinery below :mod:`act_harness.evidence.stats`, which says what the numbers mean and is what
other modules import. Every draw comes from the generator that is passed in.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from act_harness.errors import ResultError

__all__ = [
    "Array",
    "Interval",
    "Part",
    "Transform",
    "Units",
    "same_length",
    "sign_flip_p",
    "vector",
]

Array = npt.NDArray[np.float64]
Transform = Callable[[Array], Array]

_CELLS = 1 << 22  # numbers held at once while drawing: 32 MiB of float64
_FEW_KINDS = 64  # up to so many distinct units, counts are drawn and not the units themselves
_EXACT_UNITS = 12  # up to so many non-zero differences all sign patterns are enumerated


class Interval(NamedTuple):
    """A confidence interval, both ends included."""

    low: float
    high: float


class Part(NamedTuple):
    """Both arms' values on the documents of one task, document i being the same in both."""

    a: Sequence[float] | Array
    """Values of arm A, (documents,)."""
    b: Sequence[float] | Array
    """Values of arm B, (documents,)."""
    weights: Sequence[float] | Array | None = None
    """Weight of each document in the score (words of a text, say), (documents,); None: equal."""
    clusters: Sequence[Hashable] | None = None
    """Which documents belong together, one id a document; None: each stands alone."""
    transform: Transform | None = None
    """Monotone map from the weighted mean to the score (exp for a perplexity); None: the mean."""


@dataclass(frozen=True)
class Units:
    """What is resampled: documents or clusters, as sums of a, b and weight, (units, 3)."""

    sums: Array
    documents: int
    grouped: bool
    transform: Transform | None

    @classmethod
    def of(cls, part: Part) -> Units:
        """Check a task's values and sum them up by cluster.

        Raises:
            ResultError: See :func:`act_harness.evidence.stats.paired_difference`.
        """
        a, b = vector(part.a, "a"), vector(part.b, "b")
        same_length(a, b)
        if len(a) == 0:
            raise ResultError("nothing to compare: there are no documents")
        weight = np.ones_like(a) if part.weights is None else vector(part.weights, "weights")
        same_length(a, weight)
        if not bool((weight > 0).all()):
            raise ResultError("weights must be positive")
        sums = np.stack([a * weight, b * weight, weight], axis=1)
        grouped = False
        if part.clusters is not None:
            codes = _codes(part.clusters)
            same_length(a, codes)
            number = int(codes.max()) + 1
            if number == 1 and len(a) > 1:
                raise ResultError(
                    "all documents are in one cluster, so there is nothing to resample; "
                    "compare without clusters"
                )
            grouped = number < len(a)
            if grouped:
                columns = [np.bincount(codes, sums[:, i], number) for i in range(3)]
                sums = np.stack(columns, axis=1)
        return cls(sums, len(a), grouped, part.transform)

    def scores(self) -> tuple[float, float]:
        """Return the scores of both arms over all units."""
        total = self.sums.sum(axis=0)
        pair = total[:2] / total[2]
        if self.transform is not None:
            pair = self.transform(pair)
        return float(pair[0]), float(pair[1])

    def stderr(self) -> float:
        """Standard error of the difference of the (untransformed) weighted means."""
        count = len(self.sums)
        if count < 2:
            return math.inf
        a, b, weight = self.sums.T
        total = weight.sum()
        residual = (b - a) - weight * ((b - a).sum() / total)
        return float(math.sqrt(count / (count - 1) * float(residual @ residual)) / total)

    def moves(self) -> Array:
        """Each unit's share of the difference, (units,); they add up to it."""
        return np.asarray((self.sums[:, 1] - self.sums[:, 0]) / self.sums[:, 2].sum())

    def replicates(self, rng: np.random.Generator, resamples: int) -> Array:
        """Differences of the scores in bootstrap resamples of the units, (resamples,)."""
        kinds, counts = np.unique(self.sums, axis=0, return_counts=True)
        units = len(self.sums)
        drawn = np.empty((resamples, 3))
        step = max(1, _CELLS // units)
        for start in range(0, resamples, step):
            rows = min(step, resamples - start)
            if len(kinds) <= _FEW_KINDS:
                # How often each kind of unit is drawn is one multinomial number a kind.
                times = rng.multinomial(units, counts / units, size=rows)
                drawn[start : start + rows] = times @ kinds
            else:
                index = rng.integers(0, units, size=(rows, units))
                index += units * np.arange(rows)[:, None]
                times = np.bincount(index.ravel(), minlength=rows * units).reshape(rows, units)
                drawn[start : start + rows] = times @ self.sums
        mean_a, mean_b = drawn[:, 0] / drawn[:, 2], drawn[:, 1] / drawn[:, 2]
        if self.transform is not None:
            mean_a, mean_b = self.transform(mean_a), self.transform(mean_b)
        return np.asarray(mean_b - mean_a)


def sign_flip_p(moves: Array, rng: np.random.Generator, resamples: int) -> float:
    """Two-sided p of a sum of ``moves`` when each one's sign could as well be the other."""
    moves = moves[moves != 0]
    observed = abs(float(moves.sum())) * (1 - 1e-9)
    if len(moves) <= _EXACT_UNITS:
        bits = np.arange(1 << len(moves))[:, None] >> np.arange(len(moves)) & 1
        return float(np.mean(np.abs((2 * bits - 1) @ moves) >= observed))
    reached, step = 0, max(1, _CELLS // len(moves))
    for start in range(0, resamples, step):
        rows = min(step, resamples - start)
        signs = rng.integers(0, 2, size=(rows, len(moves)), dtype=np.int8) * 2 - 1
        reached += int(np.count_nonzero(np.abs(signs @ moves) >= observed))
    return (reached + 1) / (resamples + 1)


def vector(values: Sequence[float] | Array, name: str) -> Array:
    """Return finite values as (documents,) in float64.

    Raises:
        ResultError: Another shape, or a value that is not finite.
    """
    given = np.asarray(values, dtype=np.float64)
    if given.ndim != 1:
        raise ResultError(f"{name} must be one value a document; found shape {given.shape}")
    bad = np.flatnonzero(~np.isfinite(given))
    if len(bad):
        raise ResultError(f"{name}: document {bad[0]} has the value {given[bad[0]]}; leave it out")
    return given


def same_length(first: npt.NDArray[Any], second: npt.NDArray[Any]) -> None:
    """Check that there is one value a document in both.

    Raises:
        ResultError: The lengths differ.
    """
    if len(first) != len(second):
        raise ResultError(f"one value a document is needed: found {len(first)} and {len(second)}")


def _codes(clusters: Sequence[Hashable]) -> npt.NDArray[np.int64]:
    known: dict[Hashable, int] = {}
    return np.asarray([known.setdefault(one, len(known)) for one in clusters], dtype=np.int64)
