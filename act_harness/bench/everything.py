"""Every benchmark that the table of speed in docs names, in one go, on one machine, at one commit.

Each part is a process of its own with a limit of time, and what it measured lies in the output
folder as soon as it is measured: a part that fails, hangs or is killed loses only itself. The
parts' commands stand in their reports; what became of each part goes to ``everything.json``.

    python -m act_harness.bench.everything --model DIR --requests FILE --documents FILE

Where the code is a copy without its repository, ``ACT_HARNESS_COMMIT`` names the commit.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from act_harness.bench.common import command_line, describe_machine
from act_harness.errors import InputError, unknown_name
from act_harness.support import reading
from act_harness.support.atomic import write_json

__all__ = ["PART_NAMES", "Part", "main", "parts_of", "run_part"]


@dataclass(frozen=True)
class Part:
    """A benchmark, its options, and how long it may take."""

    name: str
    module: str
    """Below ``act_harness.bench``."""
    options: tuple[str, ...]
    seconds: int


PART_NAMES = (
    "attention", "prefill", "decode", "scoring", "scoring-7b", "search", "equality", "rounding",
)  # fmt: skip


def parts_of(given: argparse.Namespace) -> list[Part]:
    """Return the parts of a command line, most wanted first.

    Raises:
        InputError: a part that there is not, or a file that one of them needs was not named.
    """
    wanted = given.parts.split(",") if given.parts else list(PART_NAMES)
    for name in wanted:
        if name not in PART_NAMES:
            raise InputError(unknown_name(f"part {name!r}", name, PART_NAMES))
    needs = {
        "scoring": ("model", "requests"), "scoring-7b": ("model", "requests"),
        "search": ("model", "documents"), "equality": ("model", "requests"),
        "rounding": ("model", "requests"),
    }  # fmt: skip
    for name in wanted:
        lacking = [one for one in needs.get(name, ()) if getattr(given, one) is None]
        if lacking:
            raise InputError(f"part {name!r} needs --{lacking[0]}; give it, or leave the part out")
    made = {
        part.name: part for part in (_cuda_parts if given.device == "cuda" else _cpu_parts)(given)
    }
    return [made[name] for name in wanted if name in made]


def _cuda_parts(given: argparse.Namespace) -> list[Part]:
    rounds = ("--rounds", str(given.rounds))
    scoring = ("--requests", str(given.requests), *rounds, "--tokenizer", str(given.model))
    model = ("--model", str(given.model))
    return [
        Part("attention", "attention", ("--shapes", "4x2048,1x8192,1x32768"), 120),
        Part("prefill", "prefill", ("--shapes", "4x2048,1x8192", "--rounds", "10"), 90),
        Part("decode", "decode", ("--shapes", "1x4096,16x4096", "--rounds", "40"), 90),
        Part(
            "scoring",
            "scoring",
            (*model, *scoring, "--batch-size", "8,64,auto", "--stock-batch-size", "64",
             "--token-budget", "65536", "--name", "scoring-smollm2-cuda"),
            240,
        ),
        Part(
            "scoring-7b",
            "scoring",
            ("--random", "7b", *scoring, "--limit", "200", "--batch-size", "8",
             "--name", "scoring-7b-cuda"),
            150,
        ),
        Part("search", "search", (*model, *_search(given), "--name", "search-cuda"), 240),
        Part(
            "equality",
            "equality",
            (*model, "--requests", str(given.requests), "--limit", "200",
             "--name", "equality-cuda"),
            150,
        ),
        Part(
            "rounding",
            "rounding",
            (*model, "--requests", str(given.requests), "--most", "400", "--rounds", "1",
             "--name", "rounding-cuda"),
            150,
        ),
    ]  # fmt: skip


def _search(given: argparse.Namespace) -> tuple[str, ...]:
    return (
        "--documents", str(given.documents), "--samples", "20", "--rounds", "3",
        "--loop-heads", "5", "--loop-documents", "4",
    )  # fmt: skip


def _cpu_parts(given: argparse.Namespace) -> list[Part]:
    """Return what a CPU can measure: whole models and scoring of SmolLM2, in float32."""
    model = ("--model", str(given.model), "--dtype", "float32")
    rounds = ("--rounds", str(given.rounds))
    stored = ("--requests", str(given.requests))
    limit = ("--limit", str(given.limit)) if given.limit else ()
    return [
        Part("prefill", "prefill", (*model, "--shapes", "1x512,1x2048", *rounds), 300),
        Part(
            "scoring",
            "scoring",
            (*model, *stored, *rounds, *limit, "--batch-size", "8", "--name",
             "scoring-smollm2-cpu"),
            1800,
        ),
        Part(
            "search",
            "search",
            (*model, "--documents", str(given.documents), "--samples", "3", "--loop-heads", "3",
             "--loop-documents", "2", "--name", "search-cpu"),
            1800,
        ),
        Part(
            "equality",
            "equality",
            (*model, *stored, "--limit", "40", "--name", "equality-cpu"),
            900,
        ),
    ]  # fmt: skip


def run_part(part: Part, given: argparse.Namespace) -> dict[str, Any]:
    """Run a part in a process of its own; return what became of it."""
    options = [*part.options, "--device", given.device, "--output", str(given.output)]
    command = [sys.executable, "-m", f"act_harness.bench.{part.module}", *options]
    environment = {**os.environ, "PYTHONUNBUFFERED": "1"}
    began = time.monotonic()
    log = given.output / f"{part.name}.log"
    with log.open("wb") as stream:
        try:
            done = subprocess.run(  # noqa: S603 - our own modules
                command,
                stdout=stream,
                stderr=subprocess.STDOUT,
                timeout=part.seconds,
                check=False,
                env=environment,
            )
            fate = "done" if done.returncode == 0 else f"failed with exit code {done.returncode}"
        except subprocess.TimeoutExpired:
            fate = f"stopped after {part.seconds} s"
    if fate == "done":
        log.unlink()
    return {**asdict(part), "fate": fate, "took": round(time.monotonic() - began, 1)}


def main(arguments: Sequence[str] | None = None) -> Path:
    """Run the parts from a command line; return the path of what became of them.

    Raises:
        InputError: see :func:`parts_of`.
    """
    parser = argparse.ArgumentParser(description="All benchmarks of the table of speed, in one go.")
    parser.add_argument("--model", type=Path, help="folder of SmolLM2-135M-Instruct")
    parser.add_argument("--requests", type=Path, help="act-harness bench scoring --export")
    parser.add_argument("--documents", type=Path, help="act-harness search --prepare")
    parser.add_argument("--parts", help=f"by commas, of {', '.join(PART_NAMES)}; all if missing")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--rounds", type=int, default=3, help="of the scoring benchmarks")
    parser.add_argument("--limit", type=int, help="requests of a scoring entry, on a CPU")
    parser.add_argument("--seconds", type=float, default=3600, help="no part begins after these")
    parser.add_argument("--output", type=Path, default=Path("results/benchmarks"))
    given = parser.parse_args(arguments)
    parts = parts_of(given)
    given.output.mkdir(parents=True, exist_ok=True)
    path = Path(given.output) / "everything.json"
    began = time.monotonic()
    for part in parts:
        over = time.monotonic() - began > given.seconds
        fate = {**asdict(part), "fate": "not begun", "took": 0.0} if over else run_part(part, given)
        print(f"{part.name}: {fate['fate']}, {fate['took']} s", flush=True)
        fate |= {"machine": asdict(describe_machine(given.device)), "command": command_line()}
        # What other calls left in this folder stays, so that parts may be run one by one.
        known = reading.read_json(path, lenient=True) if path.exists() else {}
        write_json(path, {**known, part.name: fate})
    return path


if __name__ == "__main__":
    print(main())
