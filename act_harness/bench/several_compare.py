"""How far what several devices computed is from what one did: scores, counters, artifacts."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from act_harness.artifact import load_artifact
from act_harness.errors import ResultError
from act_harness.search.run import stable_content
from act_harness.support import reading

__all__ = ["Arm", "Difference", "Tolerance", "arms_in", "compare_arms", "compare_artifacts"]


class Tolerance(NamedTuple):
    """What two computations of one number may differ by."""

    absolute: float
    relative: float
    """Of a log-likelihood's size."""
    counters: float
    """Of a counter, or of its size where that is above 1."""
    words: str
    by_rounding: bool = False
    """Whether what rounding decides, near a threshold, may come out otherwise."""

    @classmethod
    def of(cls, dtype: str) -> Tolerance:
        """Return that of a dtype.

        A bfloat16 has 8 significant bits (float16: 11): two roundings are 2^-7 (2^-10) of a number.
        """
        if dtype in ("float32", "float64"):
            return cls(1e-4, 0.0, 1e-4, "1e-4")
        bits = {"bfloat16": 8, "float16": 11}[dtype]
        step = 2.0 ** (1 - bits)
        words = f"2^{1 - bits} of a log-likelihood, two roundings of {dtype}"
        return cls(step, step, 0.02, words, by_rounding=True)

    def of_split_sums(self) -> Tolerance:
        """Return it for layers whose sums are made of one part a process.

        Each part is rounded to the dtype before it is added, in every layer; what a coarse one
        leaves of a log-likelihood is eight times as far off.
        """
        more = self if self.relative == 0 else self._replace(
            absolute=8 * self.absolute, relative=8 * self.relative, words=f"8 x {self.words}"
        )  # fmt: skip
        return more._replace(by_rounding=True)

    def holds(self, found: float, expected: float) -> bool:
        """Whether a log-likelihood is near enough."""
        return abs(found - expected) <= self.absolute + self.relative * abs(expected)


class Difference(NamedTuple):
    """What a comparison found."""

    largest: float
    faults: tuple[str, ...]
    """What is not as it should be; empty: all is."""


class Arm(NamedTuple):
    """One arm as an evaluation wrote it."""

    answers: dict[tuple[str, int], list[Any]]
    """Of (task, document): text, or (log-likelihood, is greedy) of each choice."""
    scores: dict[str, float]
    counters: Mapping[str, Any]
    shares: tuple[int, ...]
    """Requests that each process answered."""


def arms_in(folder: Path) -> dict[str, Arm]:
    """Read the arms of an evaluation by name.

    Raises:
        ResultError: there is none, or a file cannot be read.
    """
    found = {}
    for path in sorted(folder.rglob("results_*.json")):
        data = reading.read_json(path, lenient=True)
        own = data["config"]["act_harness"]
        answers: dict[tuple[str, int], list[Any]] = {}
        for samples in path.parent.glob("samples_*.jsonl"):
            task = samples.name.removeprefix("samples_").rpartition("_")[0]
            for row in reading.read_lines(samples):
                answers[task, row["doc_id"]] = [_answer(one) for one in row["filtered_resps"]]
        scores = {
            f"{task} {metric}": float(value)
            for task, metrics in data["results"].items()
            for metric, value in metrics.items()
            if isinstance(value, (int, float)) and "stderr" not in metric
        }
        shares = tuple(own["requests_by_process"])
        found[own["arm"]] = Arm(answers, scores, own["counters"], shares)
    if not found:
        raise ResultError(f"{folder} holds no results; see the log of what should have written it")
    return found


def _answer(given: Any) -> Any:  # noqa: ANN401 - text, or a pair that may be texts in a file
    if isinstance(given, list) and len(given) == 2 and str(given[1]) in ("True", "False"):
        return float(given[0]), str(given[1]) == "True"
    return given


def compare_arms(
    expected: Mapping[str, Arm], found: Mapping[str, Arm], tolerance: Tolerance, *, exact: bool
) -> Difference:
    """Compare the arms that were found with those of one device.

    Args:
        expected: of one device; it may hold more arms.
        found: of several.
        tolerance: of log-likelihoods and counters.
        exact: whether task scores must agree too. Where the dtype rounds coarsely, near ties fall
            either way.
    """
    largest, faults = 0.0, []
    for name, arm in found.items():
        one = expected[name]
        if arm.answers.keys() != one.answers.keys():
            faults.append(f"{name}: {len(arm.answers)} documents instead of {len(one.answers)}")
            continue
        worst = 0
        for place, answers in arm.answers.items():
            for answer, want in zip(answers, one.answers[place], strict=True):
                if not isinstance(want, tuple):
                    worst += answer != want
                    continue
                largest = max(largest, abs(answer[0] - want[0]))
                worst += not tolerance.holds(answer[0], want[0])
        if worst:
            faults.append(f"{name}: {worst} answers differ by more than {tolerance.words}")
        faults += [f"{name}: {fault}" for fault in _counted(one.counters, arm.counters, tolerance)]
        if exact:
            faults += [
                f"{name}: {metric} is {arm.scores.get(metric)} instead of {score}"
                for metric, score in one.scores.items()
                if not math.isclose(arm.scores.get(metric, math.inf), score, abs_tol=1e-4)
            ]
    return Difference(largest, tuple(faults))


def _counted(
    expected: Mapping[str, Any], found: Mapping[str, Any], tolerance: Tolerance
) -> list[str]:
    return [
        f"counter {name} is {found.get(name)} instead of {value}"
        for name, value in expected.items()
        if not (tolerance.by_rounding and name in _BY_ROUNDING)
        and not _near(found.get(name), value, tolerance.counters)
    ]


_BY_ROUNDING = {"prompts_near_threshold"}
"""Counters of what rounding decides: in a coarse dtype it follows the batch."""


def _near(found: Any, expected: Any, tolerance: float) -> bool:  # noqa: ANN401 - any JSON value
    numbers = (int, float)
    if isinstance(found, numbers) and isinstance(expected, numbers):
        return abs(found - expected) <= tolerance * max(1.0, abs(expected))
    return bool(found == expected)


def compare_artifacts(expected: Path, found: Path, *, tolerance: float) -> Difference:
    """Compare what two searches found, but for their times and what computed them.

    Args:
        expected: the artifact of one device.
        found: that of several.
        tolerance: of every number in it; text, heads and counts must be the same.
    """
    one, other = (stable_content(load_artifact(path)) for path in (expected, found))
    numbers: list[float] = [0.0]
    faults = list(_differences(one, other, "", numbers))
    largest = max(numbers)
    if largest > tolerance:
        faults.append(f"numbers differ by up to {largest:.2g}, more than {tolerance:g}")
    return Difference(largest, tuple(faults[:4]))


def _differences(one: Any, other: Any, place: str, numbers: list[float]) -> list[str]:  # noqa: ANN401
    """Return where two JSON values differ in more than the size of floats, which are collected."""
    if isinstance(one, dict) and isinstance(other, dict) and one.keys() == other.keys():
        pairs = [(f"{place}.{key}", one[key], other[key]) for key in one]
    elif isinstance(one, (list, tuple)) and isinstance(other, (list, tuple)):
        if len(one) != len(other):
            return [f"{place.lstrip('.')} has {len(other)} entries instead of {len(one)}"]
        pairs = [(f"{place}[{n}]", a, b) for n, (a, b) in enumerate(zip(one, other, strict=True))]
    elif isinstance(one, float) or isinstance(other, float):
        if isinstance(one, (int, float)) and isinstance(other, (int, float)):
            numbers.append(abs(one - other))
            return []
        return [f"{place.lstrip('.')} is {other!r} instead of {one!r}"]
    else:
        return [] if one == other else [f"{place.lstrip('.')} is {other!r} instead of {one!r}"]
    return [fault for where, a, b in pairs for fault in _differences(a, b, where, numbers)]
