"""Log-likelihoods against stock scoring and against the plain path, on stored requests.

Without calibration the reference is stock at batch size 8; stock at batch size 1 stands beside it,
because what stock itself moves by between batch sizes is the yardstick. With calibration it is the
plain path, one forward for each request. What is reported is the largest absolute difference in
nats and the number of greedy answers that differ.

    python -m act_harness.bench.equality --requests FILE --model DIR --device cuda --limit 200
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from act_harness.attention import Attachment, attach, model_facts
from act_harness.attention.counters import CalibrationCounters
from act_harness.attention.load import load_plain_model
from act_harness.bench.common import BenchmarkReport, Table, command_line, describe_machine
from act_harness.bench.scoring import Requests, random_heads, read_requests
from act_harness.bench.stock import StockChoice, choose_stock
from act_harness.scoring.scorer import Item, Scorer

if TYPE_CHECKING:
    from act_harness.artifact import Artifact

__all__ = ["main", "measure"]

_SIZES = {"batch 1": 1, "batch 8": 8, "auto": None}
_BUDGET = 65536
_COLUMNS = (
    "requests of", "requests", "stock, batch 1", *(f"none, {name}" for name in _SIZES),
    *(f"ACT, {name}" for name in _SIZES), "greedy flips", "prompts near threshold",
)  # fmt: skip

Answers = list[tuple[float, bool]]


def measure(
    model: Any,  # noqa: ANN401 - a PreTrainedModel
    entry: Requests,
    *,
    stock: StockChoice,
    artifact: Artifact,
    engine: str = "auto",
) -> list[Any]:
    """Return the row of one entry; see the module.

    Args:
        model: a causal language model.
        entry: the requests.
        stock: stock scoring.
        artifact: the calibrated heads.
        engine: of the calibration.
    """
    items = [Item(context, answer) for context, answer in entry.pairs]
    counters = CalibrationCounters()

    def ours(attachment: Attachment | None, size: int | None, *, share: bool = True) -> Answers:
        scorer = Scorer(
            model, attachment, batch_size=size, token_budget=None if size else _BUDGET, share=share
        )
        record = None if attachment is None or share else counters.record
        return [(s.loglikelihood, s.is_greedy) for s in scorer.score(items, on_prompt=record)]

    reference = stock.scores(8)(entry.pairs)
    found = [_compared(stock.scores(1)(entry.pairs), reference)]
    found += [_compared(ours(None, size), reference) for size in _SIZES.values()]
    attachment = attach(model, artifact, facts=artifact.model, engine=engine)
    try:
        plain = ours(attachment, 1, share=False)
        found += [_compared(ours(attachment, size), plain) for size in _SIZES.values()]
    finally:
        attachment.detach()
    differences = [difference for difference, _ in found]
    flips = sum(flips for _, flips in found[1:])
    near = counters.summary()["prompts_near_threshold"]
    return [entry.name, len(items), *differences, flips, near]


def _compared(found: Answers, reference: Answers) -> tuple[float, int]:
    pairs = list(zip(found, reference, strict=True))
    return max(abs(a[0] - b[0]) for a, b in pairs), sum(a[1] != b[1] for a, b in pairs)


def main(arguments: Sequence[str] | None = None) -> Path:
    """Compare stored requests from a command line; return the report's path."""
    parser = argparse.ArgumentParser(description="Equality of log-likelihoods.")
    parser.add_argument("--requests", type=Path, required=True)
    parser.add_argument("--model", required=True, help="folder of a model")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--stock", default="auto", help="hf, stand-in, or auto: hf where it is")
    parser.add_argument("--limit", type=int, help="requests of an entry")
    parser.add_argument("--output", type=Path, default=Path("results/benchmarks"))
    parser.add_argument("--name", default="equality")
    given = parser.parse_args(arguments)
    model = load_plain_model(given.model, dtype=given.dtype, device=given.device)
    stock = choose_stock(given.stock, model, tokenizer=given.model)
    artifact = random_heads(model_facts(model), 0.22)
    title = f"Largest difference of a log-likelihood with {Path(given.model).name}, {given.dtype}"
    report = BenchmarkReport(given.name, title, describe_machine(given.device), command_line())
    report.remarks = [
        f"stock: {stock.words}; `stock` and `none` against stock at batch size 8",
        f"ACT: preset paper, {artifact.head_count()} heads at random, against the plain path (one "
        "forward a request)",
        "nats; greedy flips: of all columns but stock's own",
    ]
    table = Table("Largest absolute difference", _COLUMNS)
    report.tables = [table]
    for name, pairs in read_requests(given.requests):
        entry = Requests(name, pairs[: given.limit])
        table.rows.append(measure(model, entry, stock=stock, artifact=artifact))
        report.write(given.output)
    return Path(given.output) / f"{given.name}.md"


if __name__ == "__main__":
    print(main())
