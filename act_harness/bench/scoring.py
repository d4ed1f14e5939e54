"""``act-harness bench scoring``: stock ``hf`` against ``hf-act`` on the same requests, in turns.

Stock is lm-eval's own ``HFLM._loglikelihood_tokens`` where lm-eval can be imported, and a stand-in
elsewhere (:mod:`act_harness.bench.stock`); the report names it. Requests are token ids, made from
lm-eval tasks once (:func:`requests_of_tasks`) and stored as JSON where they have to travel; there

    python -m act_harness.bench.scoring --requests FILE --model DIR --batch-size 8,64,auto

The report has a table for each batch size, all measured in one process: requests per second, the
ceiling that follows from the tokens (what stock computes over what must be computed), peak memory,
and the largest score difference. The JSON file has the seconds of every round as well.
"""

from __future__ import annotations

import gzip
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch

from act_harness.artifact import Artifact, ModelFacts
from act_harness.attention import Attachment, attach, model_facts
from act_harness.attention.counters import CalibrationCounters
from act_harness.attention.load import load_plain_model
from act_harness.bench.arguments import Arguments, read_count, read_device, read_dtype
from act_harness.bench.common import (
    BenchmarkReport,
    Table,
    Timing,
    alternate,
    command_line,
    describe_machine,
    peak_memory,
    ratio,
)
from act_harness.bench.models import random_llama, spread_heads
from act_harness.bench.stock import STAND_IN, Pair, StockChoice, StockPath, choose_stock
from act_harness.calibration import preset
from act_harness.errors import InputError
from act_harness.scoring.scorer import Item, Scorer
from act_harness.support import atomic, places, reading

if TYPE_CHECKING:
    from collections.abc import Callable

    from transformers import PreTrainedModel

__all__ = [
    "Pair",
    "Requests",
    "ScoringSettings",
    "StockChoice",
    "StockPath",
    "bench_scoring",
    "random_heads",
    "read_requests",
    "requests_of_tasks",
    "token_ceiling",
    "write_requests",
]


class Requests(NamedTuple):
    """One task's requests as token ids."""

    name: str
    pairs: list[Pair]
    """(context, answer) of every request."""


@dataclass(frozen=True)
class ScoringSettings:
    """How to measure."""

    batch_sizes: tuple[int | None, ...] = (8,)
    """Sequences of a forward for both, a table each; None: ours by token budget alone."""
    stock_batch_size: int = 64
    """Sequences of a forward for stock, where ours goes by token budget."""
    token_budget: int | None = None
    rounds: int = 3
    share_of_heads: float = 0.22
    engine: str = "auto"
    device: str = "cpu"
    output: Path = Path("results/benchmarks")
    name: str = "scoring"


def token_ceiling(pairs: Sequence[Pair]) -> float:
    """Tokens stock computes over tokens that must be computed: the speed-up of tokens alone."""
    stock = {context + answer[:-1] for context, answer in pairs}
    contexts = {context for context, _ in pairs}
    longer = {(context, answer) for context, answer in pairs if len(answer) > 1}
    needed = sum(map(len, contexts)) + sum(len(answer) - 1 for _, answer in longer)
    return sum(map(len, stock)) / needed


def random_heads(facts: ModelFacts, share: float, *, seed: int = 0) -> Artifact:
    """Return an artifact of a random share of a model's heads, preset ``paper``."""
    heads = spread_heads(facts.num_hidden_layers, facts.num_attention_heads, share, seed)
    return Artifact(name=f"random-{share:g}", model=facts, calibration=preset("paper"), heads=heads)


def requests_of_tasks(
    tasks: Sequence[str],
    lm: Any,  # noqa: ANN401 - a CalibratedHFLM, not imported where lm-eval may be missing
    *,
    limit: int,
    num_fewshot: int,
    data_dir: Path | None = None,
) -> list[Requests]:
    """Return the requests of lm-eval tasks, tokenised and cut by ``lm`` as in a real run."""
    from act_harness.search.splits import task_requests

    found = []
    for name in tasks:
        contexts: dict[str, list[int]] = {}
        pairs = []
        texts = task_requests(name, limit=limit, num_fewshot=num_fewshot, data_dir=data_dir)
        for context, answer in texts:
            before, after = lm._encode_request(context, answer, contexts)
            surplus = max(0, len(before) + len(after) - (lm.max_length + 1))
            pairs.append((tuple(before[surplus:]), tuple(after)))
        found.append(Requests(f"{name} {num_fewshot}-shot", pairs))
    return found


def bench_tasks(
    pretrained: str,
    tasks: Sequence[str],
    fewshot: Sequence[int],
    settings: ScoringSettings,
    *,
    limit: int,
    dtype: str,
    export: Path | None = None,
    data_dir: Path | None = None,
) -> str:
    """Load a model, make the requests of some tasks and measure; return what is printed."""
    from act_harness.model import CalibratedHFLM

    if export is not None:
        places.prepare_file(export)
    else:
        places.prepare_folder(settings.output)
    lm = CalibratedHFLM(
        pretrained,
        artifact="none",
        dtype=dtype,
        device=settings.device,
        batch_size=settings.batch_sizes[0] or 8,
    )
    requests = [
        entry
        for number in fewshot
        for entry in requests_of_tasks(
            tasks, lm, limit=limit, num_fewshot=number, data_dir=data_dir
        )
    ]
    if export is not None:
        write_requests(requests, export)
        return f"written: {export}"

    stock = choose_stock("hf", lm.model, tokenizer=pretrained)
    title = f"Scoring with {Path(pretrained).name}, {dtype}"
    return bench_scoring(lm.model, requests, settings, stock=stock, title=title).markdown()


def write_requests(requests: Sequence[Requests], path: Path) -> None:
    """Store requests as JSON (compressed where the name ends so), for a machine without lm-eval."""
    text = json.dumps([[name, pairs] for name, pairs in requests]).encode()
    atomic.write_bytes(path, gzip.compress(text, mtime=0) if path.suffix == ".gz" else text)


def read_requests(path: Path) -> list[Requests]:
    """Read what :func:`write_requests` wrote.

    Raises:
        InputError: the file is missing or something else.
    """
    content = reading.read_json(path, error=InputError, advice="write it with --export")
    try:
        return [
            Requests(name, [(tuple(context), tuple(answer)) for context, answer in pairs])
            for name, pairs in content
        ]
    except (ValueError, TypeError) as error:
        raise InputError(f"{path} holds no requests ({error}); write it with --export") from None


_COLUMNS = (
    "requests of", "requests", "token ceiling", "stock requests/s", "none / stock",
    "ACT / stock", "of ceiling", "pairs with a sink", "stock GiB", "ACT GiB", "max difference",
)  # fmt: skip
_NOTE = "Medians over rounds of the ratio within a round; ratios above 1 are faster than stock."


def bench_scoring(
    model: PreTrainedModel,
    requests: Sequence[Requests],
    settings: ScoringSettings,
    *,
    stock: StockChoice | None = None,
    title: str = "Scoring",
) -> BenchmarkReport:
    """Measure stock, baseline and calibrated scoring in turns, and write the report.

    Args:
        model: what is scored with; both paths use the same object.
        requests: one entry for each row of a table.
        settings: how to measure.
        stock: what to measure against; the stand-in when None.
        title: heading of the report.
    """
    stock = stock or StockChoice(lambda size: StockPath(model, size).score, STAND_IN)
    report = BenchmarkReport(
        settings.name, title, describe_machine(settings.device), command_line()
    )
    facts = model_facts(model)
    artifact = random_heads(facts, settings.share_of_heads)
    report.remarks = [
        f"stock: {stock.words}",
        f"ACT: preset paper, {artifact.head_count()} of "
        f"{facts.num_hidden_layers * facts.num_attention_heads} heads at random",
        f"{settings.rounds} rounds, variants in turns, order reversed every other round",
    ]
    for size in settings.batch_sizes:
        sequences = size or settings.stock_batch_size
        table = Table(_heading(size, settings), _COLUMNS, note=_NOTE)
        report.tables.append(table)
        for entry in requests:
            run_stock = stock.scores(sequences)
            row, timings = _row(model, entry, settings, artifact, run_stock, size)
            table.rows.append(row)
            report.add_rounds(f"{table.title}: {entry.name}", timings)
            report.write(settings.output)  # a run that is stopped keeps what it measured
    return report


def _heading(size: int | None, settings: ScoringSettings) -> str:
    if size is not None:
        return f"Batch size {size}"
    budget = f"{settings.token_budget} tokens" if settings.token_budget else "tokens"
    return f"Ours by a budget of {budget}, stock at batch size {settings.stock_batch_size}"


def _row(
    model: PreTrainedModel,
    entry: Requests,
    settings: ScoringSettings,
    artifact: Artifact,
    run_stock: Callable[[list[Pair]], list[tuple[float, bool]]],
    batch_size: int | None,
) -> tuple[list[Any], dict[str, Timing]]:
    items = [Item(context, answer) for context, answer in entry.pairs]
    counters = CalibrationCounters()

    def ours(attachment: Attachment | None) -> list[Any]:
        scorer = Scorer(
            model,
            attachment,
            batch_size=batch_size,
            token_budget=settings.token_budget,
        )
        return scorer.score(items, on_prompt=counters.record)

    attachment = attach(model, artifact, facts=artifact.model, engine=settings.engine)

    def suspended(function: Callable[[], Any]) -> Any:  # noqa: ANN401 - whatever it returns
        with attachment.suspended():
            return function()

    variants: dict[str, Callable[[int], Any]] = {
        "stock": lambda _: suspended(lambda: run_stock(entry.pairs)),
        "none": lambda _: suspended(lambda: ours(None)),
        "act": lambda _: ours(attachment),
    }
    # Scores and peaks come from the calls that warm up.
    found: dict[str, Any] = {}
    memory = {
        name: peak_memory(
            lambda f=function, n=name: found.update({n: f(0)}),  # type: ignore[misc]
            device=settings.device,
        )
        for name, function in variants.items()
    }
    if not found:  # memory cannot be measured here
        found = {name: function(0) for name, function in variants.items()}
    timings = alternate(variants, device=settings.device, rounds=settings.rounds, warmup=0)
    attachment.detach()
    summary = counters.summary()
    ceiling = token_ceiling(entry.pairs)
    faster = 1 / ratio(timings, "act", "stock")
    pairs = zip(found["stock"], found["none"], strict=True)
    difference = max(abs(a[0] - b.loglikelihood) for a, b in pairs)
    row = [
        entry.name, len(items), ceiling, len(items) / timings["stock"].median,
        1 / ratio(timings, "none", "stock"), faster, faster / ceiling,
        summary["share_of_pairs_with_sink"], _gib(memory["stock"]), _gib(memory["act"]), difference,
    ]  # fmt: skip
    return row, timings


def _gib(value: int | None) -> float | None:
    return None if value is None else value / 2**30


def main(arguments: Sequence[str] | None = None) -> Path:
    """Measure stored requests from a command line; return the report's path."""
    parser = Arguments(
        prog="python -m act_harness.bench.scoring", description="Scoring of stored requests."
    )
    parser.add_argument("--requests", type=Path, required=True, help="written with --export")
    parser.add_argument("--only", default="", help="these entries, separated by commas")
    parser.add_argument("--limit", type=read_count, help="requests of an entry")
    parser.add_argument("--model", help="folder of a model")
    parser.add_argument("--random", default="tiny", help="shape of a random Llama instead")
    parser.add_argument("--dtype", type=read_dtype, default="bfloat16")
    parser.add_argument(
        "--device",
        type=read_device,
        default="cuda" if torch.cuda.is_available() else "cpu",
    )
    parser.add_argument("--engine", default="auto")
    parser.add_argument("--batch-size", default="auto", help="by commas; auto: a token budget")
    parser.add_argument(
        "--stock-batch-size",
        type=read_count,
        default=64,
        help="of stock beside auto",
    )
    parser.add_argument("--stock", default="auto", help="hf, stand-in, or auto: hf where it is")
    parser.add_argument("--tokenizer", help="folder, for hf; else the model's")
    parser.add_argument("--token-budget", type=read_count, help="most tokens of a forward of ours")
    parser.add_argument("--rounds", type=read_count, default=3)
    parser.add_argument("--output", type=Path, default=Path("results/benchmarks"))
    parser.add_argument("--name", default="scoring")
    given = parser.parse_args(arguments)
    places.prepare_folder(given.output)
    if given.model:
        model = load_plain_model(given.model, dtype=given.dtype, device=given.device)
    else:
        model = random_llama(given.random, dtype=given.dtype, device=given.device)
    words = model.config.get_text_config().vocab_size
    wanted = [name for name in given.only.split(",") if name]
    requests = [
        Requests(name, [_within(pair, words) for pair in pairs[: given.limit]])
        for name, pairs in read_requests(given.requests)
        if not wanted or name in wanted
    ]
    if not requests:
        raise InputError(f"{given.requests} has no entry of the names {wanted}")
    settings = ScoringSettings(
        batch_sizes=_sizes(given.batch_size),
        stock_batch_size=given.stock_batch_size,
        token_budget=given.token_budget,
        rounds=given.rounds,
        engine=given.engine,
        device=given.device,
        output=given.output,
        name=given.name,
    )
    title = f"Scoring with {Path(given.model).name if given.model else given.random}, {given.dtype}"
    stock = choose_stock(given.stock, model, tokenizer=given.tokenizer or given.model)
    print(bench_scoring(model, requests, settings, stock=stock, title=title).markdown())
    return Path(given.output) / f"{given.name}.md"


def _sizes(text: str) -> tuple[int | None, ...]:
    known = [one.strip() for one in text.split(",")]
    if not all(one == "auto" or (one.isdigit() and int(one)) for one in known):
        raise InputError(f"--batch-size is {text!r}, expected numbers or auto, by commas")
    return tuple(None if one == "auto" else int(one) for one in known)


def _within(pair: Pair, words: int) -> Pair:
    """Map token ids of another vocabulary into one of so many words (random models)."""
    context, answer = pair
    return tuple(t % words for t in context), tuple(t % words for t in answer)


if __name__ == "__main__":
    main()
