"""Peak memory of scoring with a large vocabulary: what exists of the logits at a time.

Stock scoring holds logits and log-probabilities of every position: 16 contexts of 2048 tokens over
128k words are 16.8 GB of float32, twice. Here logits exist for scored rows only, in pieces. A
random Llama with planted sinks, few layers and a full-size vocabulary; on a CUDA device the peak is
the allocator's, on the CPU the process's resident memory.

    python -m act_harness.bench.memory --device cuda --dtype bfloat16
"""

from __future__ import annotations

import functools
import random
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from act_harness.attention import attach, model_facts
from act_harness.attention.counters import CalibrationCounters
from act_harness.bench.arguments import Arguments, read_count, read_device, read_dtype
from act_harness.bench.common import (
    BenchmarkReport,
    Table,
    command_line,
    describe_machine,
    peak_memory,
)
from act_harness.bench.models import random_llama
from act_harness.bench.scoring import StockPath, random_heads
from act_harness.scoring.scorer import Item, Scorer
from act_harness.support import places

if TYPE_CHECKING:
    from collections.abc import Sequence

__all__ = ["main", "measure"]

_GIB = 2**30


def draw_items(
    contexts: int, tokens: int, *, vocabulary: int, answers: int = 4, length: int = 16
) -> list[Item]:
    """Return questions of random tokens, ``answers`` answers of ``length`` tokens each."""
    draw = random.Random(0)  # noqa: S311 - no secret
    items = []
    for _ in range(contexts):
        context = tuple(draw.randrange(vocabulary) for _ in range(tokens))
        for _ in range(answers):
            items.append(Item(context, tuple(draw.randrange(vocabulary) for _ in range(length))))
    return items


def measure(
    model: Any,  # noqa: ANN401 - a PreTrainedModel
    items: Sequence[Item],
    *,
    batch_size: int,
    device: str,
    with_stock: bool,
) -> Table:
    """Return the peak of stock scoring, ours, and ours with 22 % of the heads calibrated.

    Args:
        model: a causal language model.
        items: the requests.
        batch_size: of all three.
        device: where the model lies.
        with_stock: whether stock scoring is run; it needs room for all logits, twice.
    """
    size = torch.tensor([], dtype=model.dtype).element_size()
    tokens = max(len(item.context) + len(item.answer) - 1 for item in items)
    logits = batch_size * tokens * model.config.vocab_size * size
    held = peak_memory(lambda: None, device=device)
    facts = model_facts(model)
    rows: list[Sequence[Any]] = [["the model alone", _shown(held), "", ""]]
    if with_stock:
        stock = StockPath(model, batch_size)
        pairs = [(item.context, item.answer) for item in items]
        peak = peak_memory(lambda: stock.score(pairs), device=device)
        rows.append(["stock", _shown(peak), _over(peak, held), ""])
    for name, artifact in (("none", None), ("ACT", random_heads(facts, 0.22))):
        attachment = attach(model, artifact, facts=facts)
        counters = CalibrationCounters()
        scorer = Scorer(model, attachment, batch_size=batch_size)
        run = functools.partial(scorer.score, items, on_prompt=counters.record)
        peak = peak_memory(run, device=device)
        share = counters.summary().get("share_of_pairs_with_sink") if artifact else ""
        rows.append([name, _shown(peak), _over(peak, held), share])
        attachment.detach()
    note = (
        f"{len({item.context for item in items})} contexts, {len(items)} requests, up to {tokens} "
        f"tokens each, batch size {batch_size}, vocabulary {model.config.vocab_size}. Full logits "
        f"of a stock batch: {logits / _GIB:.2f} GiB, held twice (logits, log-probabilities)"
        + ("." if with_stock else "; stock was not run for lack of memory.")
    )
    columns = ["scoring", "peak GiB", "above the model GiB", "pairs with a sink"]
    return Table("Peak memory", columns, rows, note=note)


def _shown(value: int | None) -> float | str:
    return "unknown" if value is None else value / _GIB


def _over(value: int | None, base: int | None) -> float | str:
    return "unknown" if value is None or base is None else (value - base) / _GIB


def main(arguments: list[str] | None = None) -> Path:
    """Run the benchmark from a command line; return the report's path."""
    parser = Arguments(
        prog="act-harness bench memory", description="Peak memory of scoring, large vocabulary."
    )
    parser.add_argument("--shape", default="vocabulary", help="shape of the random Llama")
    parser.add_argument(
        "--device", type=read_device, default="cuda" if torch.cuda.is_available() else "cpu"
    )
    parser.add_argument("--dtype", type=read_dtype, default="float32")
    parser.add_argument("--contexts", type=read_count, default=16)
    parser.add_argument("--tokens", type=read_count, default=2048)
    parser.add_argument("--batch-size", type=read_count, default=16)
    parser.add_argument("--with-stock", action="store_true", help="run stock scoring as well")
    parser.add_argument("--output", type=Path, default=Path("results/benchmarks"))
    parser.add_argument("--name", default="scoring-memory")
    given = parser.parse_args(arguments)
    places.prepare_folder(given.output)
    model = random_llama(given.shape, dtype=given.dtype, device=given.device)
    items = draw_items(given.contexts, given.tokens, vocabulary=model.config.vocab_size)
    table = measure(
        model,
        items,
        batch_size=given.batch_size,
        device=given.device,
        with_stock=given.with_stock,
    )
    machine = describe_machine(given.device)
    report = BenchmarkReport(given.name, "Peak memory of scoring", machine, command_line())
    report.tables = [table]
    return report.write(given.output)


if __name__ == "__main__":
    print(main())
