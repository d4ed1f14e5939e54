"""How often 95 % intervals hold the true difference, by simulation: few and many units.

Every case draws both arms anew, compares them as ``compare`` does, and counts the intervals that
hold the true difference of the distribution, which is known. No model and no data.

    python -m act_harness.bench.coverage --repetitions 2000
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from act_harness.bench.common import BenchmarkReport, Table, command_line, describe_machine
from act_harness.errors import InputError
from act_harness.evidence.resampling import Array
from act_harness.evidence.stats import Part, combined_difference

__all__ = ["CASES", "Case", "main", "simulate"]

Draw = Callable[[np.random.Generator, int], list[Part]]


class Case(NamedTuple):
    """A distribution of both arms' values."""

    words: str
    draw: Draw
    """From a generator and a number of units to the tasks."""
    truth: float
    """The true difference."""


class Coverage(NamedTuple):
    """What a simulation found."""

    inside: float
    """Share of the intervals that hold the truth."""
    width: float
    """Mean width of the finite intervals."""


def _single(a: Array, b: Array) -> list[Part]:
    return [Part(a, b)]


def _normal(rng: np.random.Generator, units: int) -> list[Part]:
    a = rng.normal(0, 3, units)
    return _single(a, a + rng.normal(0.3, 1, units))


def _skewed(rng: np.random.Generator, units: int) -> list[Part]:
    a = rng.normal(0, 3, units)
    return _single(a, a + rng.exponential(1, units))


def _answers(gained: float, lost: float) -> Draw:
    def draw(rng: np.random.Generator, units: int) -> list[Part]:
        moved = rng.choice(3, size=units, p=[1 - gained - lost, gained, lost])
        a = np.where(moved == 0, rng.integers(0, 2, units), moved == 2).astype(float)
        b = np.where(moved == 0, a, moved == 1).astype(float)
        return _single(a, b)

    return draw


def _clusters(rng: np.random.Generator, units: int) -> list[Part]:
    """Right and wrong answers in clusters of 2 to 12 documents that share how hard they are."""
    sizes = rng.integers(2, 13, units)
    owner = np.repeat(np.arange(units), sizes)
    level = np.clip(rng.normal(0.6, 0.15, units), 0.05, 0.95)[owner]
    a = (rng.random(len(owner)) < level).astype(float)
    b = (rng.random(len(owner)) < level + 0.05 * (level < 0.5)).astype(float)
    return [Part(a, b, None, owner.tolist())]


def _clusters_truth() -> float:
    # The share of clusters below one half, of the normal distribution above, times the lift.
    from scipy.stats import norm  # type: ignore[import-untyped]

    return 0.05 * float(norm.cdf((0.5 - 0.6) / 0.15))


def _tasks(rng: np.random.Generator, units: int) -> list[Part]:
    """Three tasks of so many documents each, averaged with equal weight."""
    return [part for _ in range(3) for part in _answers(0.15, 0.1)(rng, units)]


CASES = {
    "normal": Case("normal differences", _normal, 0.3),
    "skewed": Case("exponential differences", _skewed, 1.0),
    "answers": Case("answers, 30 % gained and 10 % lost", _answers(0.3, 0.1), 0.2),
    "rare": Case("answers, 5 % gained and 2 % lost", _answers(0.05, 0.02), 0.03),
    "clusters": Case("clusters of 2 to 12 answers", _clusters, _clusters_truth()),
    "tasks": Case("mean of three tasks, 15 % gained and 10 % lost", _tasks, 0.05),
}


def simulate(case: Case, units: int, *, repetitions: int, seed: int = 0) -> Coverage:
    """Return how often the 95 % interval of ``units`` documents or clusters holds the truth.

    Args:
        case: What is drawn.
        units: Documents, clusters, or documents of each task.
        repetitions: Comparisons that are simulated.
        seed: Of the draws.
    """
    rng = np.random.default_rng([seed, units])
    inside, widths = 0, []
    for number in range(repetitions):
        parts = case.draw(rng, units)
        found = combined_difference(parts, resamples=999, seed=number).interval
        inside += found.low <= case.truth <= found.high
        widths.append(found.high - found.low)
    return Coverage(inside / repetitions, float(np.mean(widths)))


def main(arguments: Sequence[str] | None = None) -> Path:
    """Simulate all cases from a command line; return the report's path.

    Raises:
        InputError: a case that there is not.
    """
    parser = argparse.ArgumentParser(description="Coverage of 95 % intervals, simulated.")
    parser.add_argument("--cases", default=",".join(CASES))
    parser.add_argument("--units", default="3,5,10,20,50,200")
    parser.add_argument("--repetitions", type=int, default=2000)
    parser.add_argument("--output", type=Path, default=Path("results/benchmarks"))
    given = parser.parse_args(arguments)
    units = [int(text) for text in given.units.split(",")]
    table = Table(
        "Share of 95 % intervals that hold the true difference (mean width)",
        ["differences", *(f"{n} units" for n in units)],
    )
    for name in given.cases.split(","):
        if name not in CASES:
            raise InputError(f"there is no case {name!r}, expected some of {', '.join(CASES)}")
        found = [simulate(CASES[name], n, repetitions=given.repetitions) for n in units]
        shown = [f"{one.inside:.3f} ({one.width:.2f})" for one in found]
        table.rows.append([CASES[name].words, *shown])
    report = BenchmarkReport(
        "coverage", "Coverage of intervals", describe_machine(), command_line()
    )
    report.tables = [table]
    report.remarks = [
        f"{given.repetitions} simulated comparisons a cell: 0.95 is met within "
        f"{1.96 * (0.95 * 0.05 / given.repetitions) ** 0.5:.3f}; 999 resamples each"
    ]
    return report.write(given.output)


if __name__ == "__main__":
    print(main())
