"""Methods at equal strength: how far a head set moves the answers, and moving it as far as another.

A method that moves the answers further has more to win and more to lose, and what an L1 penalty
leaves of its strengths says nothing about its kind. So every strength of a head set is taken to a
common power c (its logarithm times c), found so that the answer distribution is, in the mean, as
far from the untouched model's as that of the other methods.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import scipy.special  # type: ignore[import-untyped]

from act_harness.calibration import HeadStrength
from act_harness.evidence.choices import padded

if TYPE_CHECKING:
    from act_harness.artifact import Artifact

__all__ = ["Match", "divergence", "matching_power", "scaled"]

TOLERANCE = 0.02
"""Share of the wanted divergence by which the found one may miss it."""
MOST = 16.0
"""Largest power that is tried."""
_STEPS = 16
_FARTHEST = 80.0
"""Largest logarithm of a strength: its exponential is a float32."""


class Match(NamedTuple):
    """The power that was found."""

    power: float
    divergence: float
    reached: bool
    """Whether the divergence is the wanted one."""


def divergence(
    untouched: Mapping[str, Sequence[Sequence[float]]],
    calibrated: Mapping[str, Sequence[Sequence[float]]],
) -> float:
    """Return the mean Kullback-Leibler divergence of answers from the untouched model's, in nats.

    Of each document ``sum p log(p / q)``, with ``p`` the softmax of the calibrated scores of its
    choices and ``q`` that of the untouched ones; mean over documents, then over tasks.

    Args:
        untouched: log-likelihoods by task, a row a document.
        calibrated: the same documents' with heads calibrated.
    """
    means = []
    for task, rows in untouched.items():
        q = scipy.special.log_softmax(padded(rows), axis=1)
        p = scipy.special.log_softmax(padded(calibrated[task]), axis=1)
        there = np.isfinite(q)
        terms = np.exp(p) * (np.where(there, p, 0.0) - np.where(there, q, 0.0))
        means.append(float(terms.sum(axis=1).mean()))
    return math.fsum(means) / len(means)


def scaled(artifact: Artifact, power: float) -> Artifact:
    """Return an artifact with the logarithm of each strength times ``power``.

    It is above 0; where all strengths are factors it may be below, which inverts them.

    A share ``beta`` and the factors ``gamma`` and ``factor`` become their powers; ``raise``'s mass
    ``psi`` its root, since there 1 is the strongest. What is 0 stays 0.
    """
    strengths = {
        layer: {
            head: _scaled(strength, power)
            for head, strength in zip(plan.heads, plan.strengths, strict=True)
        }
        for layer, plan in artifact.plans().items()
    }
    update = {"name": f"{artifact.name}^{power:.4g}", "strengths": strengths, "search": None}
    return artifact.model_copy(update=update)


def _scaled(strength: HeadStrength, power: float) -> HeadStrength:
    exponents = {"beta": power, "gamma": power, "gamma_initial": power, "factor": power,
                 "psi": 1.0 / power}  # fmt: skip
    given = strength.model_dump(exclude_none=True)
    new = {
        name: _to_power(given[name], exponent)
        for name, exponent in exponents.items()
        if name in given
    }
    return HeadStrength(**{**given, **new})


def _to_power(value: float, exponent: float) -> float:
    if value <= 0.0:
        return value
    found = exponent * math.log(value)
    return math.exp(max(-_FARTHEST, min(_FARTHEST, found)))


def matching_power(measure: Callable[[float], float], wanted: float) -> Match:
    """Return the power at which a divergence is the wanted one.

    It grows about as the power's square, which says where to look next; where that is outside of
    what is known to be too little and too much, or every third time, their middle is tried.

    Args:
        measure: power to divergence; rising, as far as anything can be found.
        wanted: the divergence, above 0.
    """
    low, high, power = 0.0, math.inf, 1.0
    best = Match(power, math.inf, False)
    for step in range(_STEPS):
        found = measure(power)
        if abs(found - wanted) < abs(best.divergence - wanted):
            best = Match(power, found, abs(found - wanted) <= TOLERANCE * wanted)
        if best.reached or (found < wanted and power >= MOST):
            break
        low, high = (power, high) if found < wanted else (low, power)
        power = _next(low, high, power * math.sqrt(wanted / max(found, wanted / 16)), step)
    return best


def _next(low: float, high: float, guess: float, step: int) -> float:
    if math.isinf(high):
        return min(max(guess, 1.05 * low), MOST)
    if low < guess < high and step % 3 != 2:
        return guess
    return (low + high) / 2
