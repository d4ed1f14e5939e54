"""How far ``hf-act`` without an artifact is from lm-eval's ``hf``, and ``hf`` from itself.

In float32 the two agree to rounding. In bfloat16 a log-likelihood depends on the shape of its batch
and on the dtype of log-softmax (``hf`` takes the model's, hf-act float32), so the yardstick for
``none`` against ``hf`` is ``hf`` against itself: at other batch sizes, in another round, and with
``softmax_dtype=float32``. For each: the largest and the mean absolute difference of a
log-likelihood, the questions whose best choice is another, and the answers whose greediness is
another.

    python -m act_harness.bench.rounding --model DIR --tasks hellaswag --dtype bfloat16 --limit 200

Where task data cannot be had, requests come from ``bench scoring --export`` (``--requests FILE``).
Where lm-eval is not installed, stock is :class:`act_harness.bench.stock.StockPath`.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

import torch

from act_harness.attention.load import load_plain_model
from act_harness.bench.common import BenchmarkReport, Table, command_line, describe_machine
from act_harness.bench.scoring import Requests, read_requests, requests_of_tasks
from act_harness.bench.stock import Pair, StockPath
from act_harness.errors import InputError
from act_harness.scoring.scorer import Item, Scorer

__all__ = ["Gap", "Paths", "bench_rounding", "gap", "main"]

Scores = Sequence[tuple[float, bool]]

_COLUMNS = (
    "requests of", "requests", "questions", "what", "against", "largest difference",
    "mean difference", "other choices", "greedy flips",
)  # fmt: skip


class Gap(NamedTuple):
    """What lies between two scorings of the same requests."""

    largest: float
    """Largest absolute difference of a log-likelihood, in nats."""
    mean: float
    choices: int
    """Questions whose best choice is another."""
    greedy: int
    """Answers that only one of the two calls greedy."""

    def joined(self, other: Gap) -> Gap:
        """Return the larger of each figure."""
        return Gap(
            max(self.largest, other.largest),
            max(self.mean, other.mean),
            max(self.choices, other.choices),
            max(self.greedy, other.greedy),
        )


@dataclass(frozen=True)
class Paths:
    """The two ways of scoring."""

    stock: Callable[[list[Pair], int, torch.dtype | None], Scores]
    """lm-eval's ``hf``, given requests, batch size and the dtype of log-softmax."""
    ours: Callable[[list[Pair], int], Scores]
    """``hf-act`` without an artifact."""
    name: str
    """Whose code stock is."""


def gap(found: Scores, expected: Scores, pairs: Sequence[Pair]) -> Gap:
    """Compare two scorings; the first best choice counts, as in lm-eval."""
    off = [abs(a[0] - b[0]) for a, b in zip(found, expected, strict=True)]
    moved = sum(_best(found, rows) != _best(expected, rows) for rows in questions(pairs))
    greedy = sum(a[1] != b[1] for a, b in zip(found, expected, strict=True))
    return Gap(max(off), sum(off) / len(off), moved, greedy)


def _best(scores: Scores, rows: range) -> int:
    return max(rows, key=lambda n: scores[n][0])


def questions(pairs: Sequence[Pair]) -> list[range]:
    """Return the runs of at least two requests with one context: the choices of a question."""
    found, start = [], 0
    for n in range(1, len(pairs) + 1):
        if n == len(pairs) or pairs[n][0] != pairs[start][0]:
            if n - start > 1:
                found.append(range(start, n))
            start = n
    return found


def bench_rounding(
    requests: Sequence[Requests], paths: Paths, *, batch_sizes: Sequence[int], rounds: int
) -> Table:
    """Compare ``none`` with ``hf``, and ``hf`` with itself, on the same requests.

    Args:
        requests: one entry for each block of rows.
        paths: the two ways of scoring.
        batch_sizes: the first one is what the others are compared with.
        rounds: repetitions; the row of a pair is its largest over them.
    """
    table = Table("Differences of log-likelihoods", _COLUMNS)
    first = batch_sizes[0]
    for entry in requests:
        worst: dict[tuple[str, str], Gap] = {}
        base = paths.stock(entry.pairs, first, None)
        bare = paths.ours(entry.pairs, first)
        for number in range(rounds):
            fine = paths.stock(entry.pairs, first, torch.float32)
            runs: list[tuple[str, str, Scores, Scores]] = [
                (f"hf, batch {first}, softmax float32", f"hf, batch {first}", fine, base)
            ]
            for size in batch_sizes if number % 2 == 0 else batch_sizes[::-1]:
                stock = paths.stock(entry.pairs, size, None)
                again = ", again" if size == first else ""
                runs.append((f"hf, batch {size}{again}", f"hf, batch {first}", stock, base))
                ours = paths.ours(entry.pairs, size)
                runs.append((f"none, batch {size}", f"hf, batch {size}", ours, stock))
                again = f"none, batch {size}{again}"
                runs.append((again, f"none, batch {first}", ours, bare))
                if size == first:
                    what = f"hf, batch {first}, softmax float32"
                    runs.append((f"none, batch {size}", what, ours, fine))
            for what, against, found, expected in runs:
                one = gap(found, expected, entry.pairs)
                before = worst.get((what, against), one)
                worst[what, against] = one.joined(before)
        asked = [entry.name, len(entry.pairs), len(questions(entry.pairs))]
        table.rows += [[*asked, *names, *figures] for names, figures in worst.items()]
    return table


def _plain_paths(model: Any) -> Paths:  # noqa: ANN401 - a PreTrainedModel
    def stock(pairs: list[Pair], batch_size: int, softmax: torch.dtype | None) -> Scores:
        return StockPath(model, batch_size, softmax_dtype=softmax).score(pairs)

    def ours(pairs: list[Pair], batch_size: int) -> Scores:
        return Scorer(model, batch_size=batch_size).score([Item(*pair) for pair in pairs])

    return Paths(stock, ours, "StockPath (no lm-eval here)")


def _lm_eval_paths(lm: Any) -> Paths:  # noqa: ANN401 - a CalibratedHFLM
    def asked(pairs: list[Pair], batch_size: int) -> list[Any]:
        lm.batch_size_per_gpu = batch_size
        return [(("", ""), list(context), list(answer)) for context, answer in pairs]

    def stock(pairs: list[Pair], batch_size: int, softmax: torch.dtype | None) -> Scores:
        from lm_eval.models.huggingface import HFLM

        before, lm.softmax_dtype = lm.softmax_dtype, softmax
        try:
            scores: Scores = HFLM._loglikelihood_tokens(
                lm, asked(pairs, batch_size), disable_tqdm=True
            )
        finally:
            lm.softmax_dtype = before
        return scores

    def ours(pairs: list[Pair], batch_size: int) -> Scores:
        scores: Scores = lm._loglikelihood_tokens(asked(pairs, batch_size), disable_tqdm=True)
        return scores

    return Paths(stock, ours, "lm-eval's own HFLM._loglikelihood_tokens")


def _load(given: argparse.Namespace) -> tuple[list[Requests], Paths]:
    """Return requests and ways of scoring, by lm-eval where it is installed."""
    if find_spec("lm_eval") is None:
        if not given.requests:
            raise InputError("lm-eval is not installed here; give --requests FILE")
        model = load_plain_model(given.model, dtype=given.dtype, device=given.device)
        return read_requests(given.requests), _plain_paths(model)
    from act_harness.model import CalibratedHFLM

    lm = CalibratedHFLM(given.model, artifact="none", dtype=given.dtype, device=given.device)
    if given.requests:
        return read_requests(given.requests), _lm_eval_paths(lm)
    shots = [int(number) for number in given.num_fewshot.split(",")]
    tasks = [name for name in given.tasks.split(",") if name]
    requests = [
        entry
        for number in shots
        for entry in requests_of_tasks(tasks, lm, limit=given.limit, num_fewshot=number)
    ]
    return requests, _lm_eval_paths(lm)


def main(arguments: Sequence[str] | None = None) -> Path:
    """Measure from a command line; return the report's path."""
    parser = argparse.ArgumentParser(description="hf-act without an artifact against hf.")
    parser.add_argument("--model", required=True, help="folder of a model")
    parser.add_argument("--tasks", default="", help="task names by commas")
    parser.add_argument("--num-fewshot", default="0", help="numbers of examples by commas")
    parser.add_argument("--limit", type=int, default=200, help="documents of a task")
    parser.add_argument("--requests", type=Path, help="of bench scoring --export, instead of tasks")
    parser.add_argument("--most", type=int, help="requests of an entry of --requests")
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--batch-sizes", default="1,8,64", help="the first is the yardstick")
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--output", type=Path, default=Path("results/benchmarks"))
    parser.add_argument("--name", default="rounding")
    given = parser.parse_args(arguments)
    if bool(given.tasks) == bool(given.requests):
        raise InputError("give --tasks or --requests FILE, one of them")
    machine = describe_machine(given.device)  # now: the clone may change while this runs
    requests, paths = _load(given)
    requests = [Requests(name, pairs[: given.most]) for name, pairs in requests]
    sizes = [int(size) for size in given.batch_sizes.split(",")]
    table = bench_rounding(requests, paths, batch_sizes=sizes, rounds=given.rounds)
    title = f"hf-act without an artifact against hf: {Path(given.model).name}, {given.dtype}"
    report = BenchmarkReport(given.name, title, machine, command_line(), [table])
    report.remarks = [
        f"stock: {paths.name}; its log-softmax is in the model's dtype unless told, ours float32",
        f"{given.rounds} rounds, batch sizes {given.batch_sizes}, in turns; largest over rounds",
        "a question: requests in a row with one context",
    ]
    return report.write(given.output)


if __name__ == "__main__":
    print(main())
