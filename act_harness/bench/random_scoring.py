"""Random scoring cases: shared, plain and reference scoring must agree, whatever is asked.

A case is a tiny random model of one family, random heads under a random calibration (or none), a
few requests (contexts that are blank, empty, one token, special tokens, longer than the model), a
batch size and an order. Its answers are computed three ways through ``hf-act``: one forward a
request (plain) and every context once (shared) with the torch engine, and shared with the float64
oracle (reference). Where rounding decides about a sink, answers may differ: such a case is counted
as *near* when the same case in float64 agrees.

    act-harness bench random-scoring --cases 5000 --seed 0
"""

from __future__ import annotations

import argparse
import math
import random
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import torch
from tqdm import tqdm

from act_harness.artifact import Artifact
from act_harness.attention.counters import CalibrationCounters
from act_harness.bench.common import BenchmarkReport, Machine, Table, command_line, describe_machine
from act_harness.calibration import Calibration, HeadStrength
from act_harness.errors import InputError, unknown_name

__all__ = ["Case", "Outcome", "Setup", "draw_case", "draw_setup", "main", "run_cases"]

TOLERANCE = 1e-4
"""Largest difference of a log-likelihood, in nats."""

_EACH = 8
"""Cases in a row that share family, heads and calibration: attaching is what costs."""

_MAX_LENGTH = 48
_WORDS = ("the ", "cat", " sat", "A", ".", "\n", "é", "12", "  ", "zz")


class Setup(NamedTuple):
    """What several cases have in common."""

    family: str
    heads: dict[int, tuple[int, ...]]
    """Empty: the baseline."""
    calibration: Calibration
    strengths: dict[int, dict[int, HeadStrength]] | None


class Case(NamedTuple):
    """Requests and how they are batched."""

    number: int
    requests: tuple[tuple[str, str], ...]
    batch_size: int | str


@dataclass
class Outcome:
    """What came of the cases."""

    cases: int = 0
    answers: int = 0
    near: list[str] = field(default_factory=list)
    """Cases in which rounding decides, a line each."""
    failures: list[str] = field(default_factory=list)
    """Cases in which the ways differ, a line each."""
    worst: dict[str, float] = field(default_factory=dict)
    """Largest difference by family, near cases excepted."""
    counts: dict[str, int] = field(default_factory=dict)
    """Cases by family."""
    seen: dict[str, int] = field(default_factory=dict)
    """What the cases held: prompts with sinks, truncated ones, skipped requests, ..."""


# -- drawing ---------------------------------------------------------------------------------------


def draw_setup(number: int, *, seed: int, families: Sequence[str]) -> Setup:
    """Return the setup of cases ``number * 8`` to ``number * 8 + 7``; equal for equal arguments."""
    draw = random.Random(f"setup {seed} {number}")  # noqa: S311 - no secret
    family = families[number % len(families)]
    if draw.random() < 0.1:
        return Setup(family, {}, Calibration(), None)
    grid = [(layer, head) for layer in range(2) for head in range(4)]
    chosen = sorted(draw.sample(grid, draw.choice((1, 2, 4, 8))))
    heads = {
        layer: tuple(head for at, head in chosen if at == layer)
        for layer in sorted({layer for layer, _ in chosen})
    }
    strengths = None
    if draw.random() < 0.3:
        strengths = {
            layer: {head: HeadStrength(**_mass(draw)) for head in own}
            for layer, own in heads.items()
        }
    return Setup(family, heads, _calibration(draw), strengths)


def _calibration(draw: random.Random) -> Calibration:
    settings: dict[str, Any] = {"decode": draw.choice(("frozen", "running", "off")), **_mass(draw)}
    if draw.random() < 0.2:
        return Calibration(target="initial", **settings)
    settings["protect"] = draw.choice(("initial", "first-flagged", "none"))
    settings["min_rows"] = draw.choice((1, 2, 4, "auto"))
    if draw.random() < 0.5:
        return Calibration(rule="relative", alpha=draw.uniform(0.8, 5.0), **settings)
    return Calibration(rule="absolute", tau=draw.uniform(0.05, 0.4), **settings)


def _mass(draw: random.Random) -> dict[str, Any]:
    if draw.random() < 0.5:
        return {"mass": "damp", "beta": draw.choice((0.0, 0.4, 1.0, draw.random()))}
    return {"mass": "reweight", "gamma": draw.choice((0.2, 0.9, 3.0))}


def draw_case(number: int, *, seed: int) -> Case:
    """Return one case; equal for equal arguments."""
    draw = random.Random(f"case {seed} {number}")  # noqa: S311 - no secret
    requests = []
    for _ in range(draw.randint(1, 2)):
        context = _context(draw)
        requests += [(context, _answer(draw)) for _ in range(draw.randint(1, 3))]
    if draw.random() < 0.3:
        requests.append(draw.choice(requests))
    draw.shuffle(requests)
    return Case(number, tuple(requests), draw.choice((1, 2, 3, 8, "auto")))


def _context(draw: random.Random) -> str:
    kind = draw.random()
    if kind < 0.1:
        return ""
    if kind < 0.25:
        return draw.choice((" ", "\n", "\t \n", "  "))
    if kind < 0.35:
        return draw.choice("abc")
    if kind < 0.5:
        return draw.choice(("<s>", "</s>", "<pad>", "<s>a</s>b", "a<pad>", "<s> "))
    if kind < 0.6:
        return _text(draw, 30)
    return _text(draw, draw.randint(1, 8))


def _answer(draw: random.Random) -> str:
    kind = draw.random()
    if kind < 0.06:
        return ""
    if kind < 0.4:
        return draw.choice("xyz ")
    if kind < 0.45:
        return "</s>"
    if kind < 0.47:
        return _text(draw, 40)  # longer than the model takes
    return _text(draw, draw.randint(1, 4))


def _text(draw: random.Random, words: int) -> str:
    return "".join(draw.choice(_WORDS) for _ in range(words))


# -- running ---------------------------------------------------------------------------------------


class _Models:
    """One ``hf-act`` for each family and dtype, made when it is needed."""

    def __init__(self) -> None:
        self._made: dict[tuple[str, torch.dtype], Any] = {}

    def get(self, family: str, dtype: torch.dtype) -> Any:  # noqa: ANN401 - a CalibratedHFLM
        from act_harness.bench.tiny_families import FAMILIES, make_family, make_tokenizer
        from act_harness.model import CalibratedHFLM

        if (family, dtype) not in self._made:
            self._made[family, dtype] = CalibratedHFLM(
                make_family(family, dtype=dtype),
                tokenizer=make_tokenizer(first=FAMILIES[family][1]),
                artifact="none",
                max_length=_MAX_LENGTH,
                device="cpu",
                batch_size=1,
            )
        return self._made[family, dtype]


def run_cases(
    count: int, *, seed: int, families: Sequence[str] | None = None, show: bool = False
) -> Outcome:
    """Run cases 0 to ``count`` - 1 of a seed.

    Args:
        count: how many.
        seed: of all draws.
        families: names of :data:`act_harness.bench.tiny_families.FAMILIES`; None: all.
        show: show a progress bar.

    Raises:
        InputError: a family is unknown.
    """
    from act_harness.bench.tiny_families import FAMILIES

    chosen = list(FAMILIES if families is None else families)
    for name in chosen:
        if name not in FAMILIES:
            raise InputError(unknown_name(f"family {name!r}", name, FAMILIES))
    models, outcome = _Models(), Outcome()
    numbers = range(0, count, _EACH)
    for first in tqdm(numbers, desc="random scoring", unit="setup", disable=not show):
        setup = draw_setup(first // _EACH, seed=seed, families=chosen)
        cases = [draw_case(n, seed=seed) for n in range(first, min(first + _EACH, count))]
        found = _ways(models.get(setup.family, torch.float32), setup, cases, seen=outcome.seen)
        for at, case in enumerate(cases):
            scores = {way: answers[at] for way, answers in found.items()}
            _judge(outcome, setup, case, scores, models)
    return outcome


def _judge(
    outcome: Outcome,
    setup: Setup,
    case: Case,
    scores: dict[str, list[float]],
    models: _Models,
) -> None:
    """Enter one case; a case that disagrees is computed again in float64."""
    outcome.cases += 1
    outcome.answers += len(case.requests)
    outcome.counts[setup.family] = outcome.counts.get(setup.family, 0) + 1
    difference = _difference(scores)
    line = f"case {case.number} ({setup.family}, {setup.calibration.decode}): {difference:.2g} nats"
    if difference <= TOLERANCE:
        outcome.worst[setup.family] = max(outcome.worst.get(setup.family, 0.0), difference)
        return
    exact = _ways(models.get(setup.family, torch.float64), setup, [case])
    if setup.heads and _difference({way: found[0] for way, found in exact.items()}) <= TOLERANCE:
        outcome.near.append(line)
    else:
        outcome.failures.append(f"{line}: {scores}")


def _difference(scores: dict[str, list[float]]) -> float:
    """Return the largest difference between two ways; infinite where only one is a number."""
    plain, *others = scores.values()
    worst = 0.0
    for other in others:
        for a, b in zip(plain, other, strict=True):
            if a != b:
                gap = abs(a - b)
                worst = max(worst, gap if math.isfinite(gap) else math.inf)
    return worst


def _ways(
    lm: Any,  # noqa: ANN401 - a CalibratedHFLM
    setup: Setup,
    cases: Sequence[Case],
    *,
    seen: dict[str, int] | None = None,
) -> dict[str, list[list[float]]]:
    """Return the log-likelihoods of each case's requests by way of computing them."""
    artifact = None
    if setup.heads:
        artifact = Artifact(
            name="random",
            model=lm.facts,
            calibration=setup.calibration,
            heads=setup.heads,
            strengths=setup.strengths,
        )
    found = {}
    for engine, scorings in (("torch", ("plain", "shared")), ("reference", ("shared",))):
        if artifact is None and engine == "reference":
            continue
        lm.engine = engine
        lm.use_artifact(artifact)
        for scoring in scorings:
            lm.scoring = scoring
            name = scoring if engine == "torch" else engine
            found[name] = [_scores(lm, case) for case in cases]
        if engine == "torch" and seen is not None:
            _count(seen, lm.counters)
    lm.use_artifact(None)
    return found


def _count(seen: dict[str, int], counters: CalibrationCounters) -> None:
    """Add what the prompts of a setup were like."""
    figures = {
        "prompts": len(counters.records),
        "prompts with sinks": sum(one.sinks > 0 for one in counters.records.values()),
        "prompts truncated": len(counters.truncated),
        "requests skipped": len(counters.skipped),
        "empty continuations": len(counters.empty_continuation),
        "answers not finite": len(counters.not_finite),
    }
    for name, number in figures.items():
        seen[name] = seen.get(name, 0) + number


def _scores(lm: Any, case: Case) -> list[float]:  # noqa: ANN401 - a CalibratedHFLM
    from lm_eval.api.instance import Instance

    lm.batch_size_per_gpu = case.batch_size
    requests = [
        Instance(request_type="loglikelihood", doc={}, arguments=pair, idx=n)
        for n, pair in enumerate(case.requests)
    ]
    return [answer[0] for answer in lm.loglikelihood(requests, disable_tqdm=True)]


# -- the command -----------------------------------------------------------------------------------


def main(arguments: Sequence[str] | None = None) -> Path:
    """Run cases from a command line; return the report's path.

    Raises:
        SystemExit: with status 1, after the report is written, where the ways differ.
    """
    parser = argparse.ArgumentParser(description="Random scoring cases, three ways.")
    parser.add_argument("--cases", type=int, default=500)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--families", default="", help="names by commas; all if not given")
    parser.add_argument("--output", type=Path, default=Path("results/benchmarks"))
    parser.add_argument("--name", default="scoring-random-cpu")
    given = parser.parse_args(arguments)
    families = [name for name in given.families.split(",") if name] or None
    machine = describe_machine("cpu")  # now: the clone may change while this runs
    outcome = run_cases(given.cases, seed=given.seed, families=families, show=True)
    path = _report(outcome, given, machine).write(given.output)
    print(f"{outcome.cases} cases, {len(outcome.failures)} failures; written: {path}")
    if outcome.failures:
        raise SystemExit(1)
    return path


def _report(outcome: Outcome, given: argparse.Namespace, machine: Machine) -> BenchmarkReport:
    rows: list[Sequence[Any]] = [
        [name, cases, outcome.worst.get(name)] for name, cases in outcome.counts.items()
    ]
    note = "Largest difference of a log-likelihood between the three ways, in nats."
    title = "Random scoring cases: shared, plain and reference"
    report = BenchmarkReport(given.name, title, machine, command_line())
    report.tables = [Table("By family", ["family", "cases", "largest difference"], rows, note=note)]
    report.remarks = [
        f"{outcome.cases} cases, {outcome.answers} answers, seed {given.seed}; float32, tolerated "
        f"{TOLERANCE:g}",
        f"{len(outcome.near)} cases excluded: rounding decides about a sink (they agree in "
        "float64)",
        f"{len(outcome.failures)} cases in which the ways differ",
        ", ".join(f"{number} {name}" for name, number in outcome.seen.items()),
        *outcome.near,
        *outcome.failures,
    ]
    return report


if __name__ == "__main__":
    main()
