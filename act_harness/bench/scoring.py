"""``act-harness bench scoring``: stock ``hf`` against ``hf-act`` on the same requests, in turns.

Stock is lm-eval's own ``HFLM._loglikelihood_tokens`` where lm-eval is installed, and where it is
not (a GPU machine with torch and transformers alone) :class:`StockPath`, which does what that
method does: requests sorted by length, one forward per distinct context + answer[:-1], right pads,
log-softmax over the whole vocabulary at every position. Requests are token ids, made from lm-eval
tasks once (:func:`requests_of_tasks`) and stored as JSON where they have to travel; there

    python -m act_harness.bench.scoring --requests FILE --model DIR --device cuda

The report has requests per second, tokens computed and the ceiling that follows from them (tokens
stock computes over tokens that must be computed), peak memory, and the largest score difference.
"""

from __future__ import annotations

import argparse
import gzip
import json
import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from act_harness.artifact import Artifact, ModelFacts
from act_harness.attention import Attachment, attach, model_facts
from act_harness.bench.common import (
    Report,
    Table,
    alternate,
    command_line,
    describe_machine,
    peak_memory,
    ratio,
)
from act_harness.calibration import preset
from act_harness.counters import CalibrationCounters
from act_harness.data import load_plain_model, random_llama
from act_harness.errors import InputError
from act_harness.scoring import Item, Scorer

if TYPE_CHECKING:
    from collections.abc import Callable

    from transformers import PreTrainedModel

__all__ = [
    "Requests",
    "ScoringSettings",
    "StockPath",
    "bench_scoring",
    "random_heads",
    "read_requests",
    "requests_of_tasks",
    "token_ceiling",
    "write_requests",
]


Pair = tuple[tuple[int, ...], tuple[int, ...]]


class Requests(NamedTuple):
    """One task's requests as token ids."""

    name: str
    pairs: list[Pair]
    """(context, answer) of every request."""


@dataclass(frozen=True)
class ScoringSettings:
    """How to measure."""

    batch_size: int | None = 8
    """Sequences of a forward for both; None: ours by token budget alone."""
    stock_batch_size: int | None = None
    """Sequences of a forward for stock; None: as ours, or 8."""
    token_budget: int | None = None
    rounds: int = 3
    share_of_heads: float = 0.22
    engine: str = "auto"
    device: str = "cpu"
    output: Path = Path("results/benchmarks")
    name: str = "scoring"

    @property
    def stock_sequences(self) -> int:
        """Sequences of a forward for stock."""
        return self.stock_batch_size or self.batch_size or 8


class StockPath:
    """lm-eval's scoring of causal models, for machines without lm-eval; see the module."""

    def __init__(
        self, model: PreTrainedModel, batch_size: int, *, softmax_dtype: torch.dtype | None = None
    ) -> None:
        self.model, self.batch_size, self.softmax_dtype = model, batch_size, softmax_dtype
        self.tokens = 0
        self.forwards = 0

    def score(self, pairs: Sequence[Pair]) -> list[tuple[float, bool]]:
        """Return (log-likelihood, is greedy) in the order of ``pairs``."""
        groups: dict[tuple[int, ...], list[int]] = {}
        order = sorted(
            range(len(pairs)), key=lambda n: (-len(sum(pairs[n], ())), sum(pairs[n], ()))
        )
        for n in order:
            context, answer = pairs[n]
            groups.setdefault(context + answer[:-1], []).append(n)
        results: list[tuple[float, bool]] = [(0.0, False)] * len(pairs)
        waiting = list(groups.items())
        for start in range(0, len(waiting), self.batch_size):
            chunk = waiting[start : start + self.batch_size]
            for (tokens, members), logprobs in zip(chunk, self._forward(chunk), strict=True):
                for n in members:
                    answer = pairs[n][1]
                    rows = logprobs[len(tokens) - len(answer) : len(tokens)]
                    target = torch.tensor(answer, device=rows.device)
                    chosen = rows.gather(1, target[:, None]).sum()
                    results[n] = (float(chosen), bool((rows.argmax(-1) == target).all()))
        return results

    def _forward(self, chunk: list[tuple[tuple[int, ...], list[int]]]) -> Tensor:
        longest = max(len(tokens) for tokens, _ in chunk)
        ids = [[*tokens, *[0] * (longest - len(tokens))] for tokens, _ in chunk]
        self.tokens += sum(len(tokens) for tokens, _ in chunk)
        self.forwards += 1
        with torch.no_grad():
            logits = self.model(torch.tensor(ids, device=self.model.device)).logits
            return torch.log_softmax(logits, dim=-1, dtype=self.softmax_dtype)


def token_ceiling(pairs: Sequence[Pair]) -> float:
    """Tokens stock computes over tokens that must be computed: the speed-up of tokens alone."""
    stock = {context + answer[:-1] for context, answer in pairs}
    contexts = {context for context, _ in pairs}
    longer = {(context, answer) for context, answer in pairs if len(answer) > 1}
    needed = sum(map(len, contexts)) + sum(len(answer) - 1 for _, answer in longer)
    return sum(map(len, stock)) / needed


def random_heads(facts: ModelFacts, share: float, *, seed: int = 0) -> Artifact:
    """Return an artifact of a random share of a model's heads, preset ``paper``."""
    grid = [
        (layer, head)
        for layer in range(facts.num_hidden_layers)
        for head in range(facts.num_attention_heads)
    ]
    heads: dict[int, tuple[int, ...]] = {}
    for layer, head in random.Random(seed).sample(grid, round(share * len(grid))):  # noqa: S311
        heads[layer] = (*heads.get(layer, ()), head)
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
    from act_harness.data import task_requests

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

    lm = CalibratedHFLM(
        pretrained,
        artifact="none",
        dtype=dtype,
        device=settings.device,
        batch_size=settings.batch_size or 8,
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

    def stock(pairs: list[Pair]) -> list[tuple[float, bool]]:
        from lm_eval.models.huggingface import HFLM

        scores: list[tuple[float, bool]] = HFLM._loglikelihood_tokens(
            lm, [(("", ""), list(c), list(a)) for c, a in pairs], disable_tqdm=True
        )
        return scores

    title = f"Scoring with {Path(pretrained).name}, {dtype}"
    return bench_scoring(lm.model, requests, settings, stock=stock, title=title).markdown()


def write_requests(requests: Sequence[Requests], path: Path) -> None:
    """Store requests as JSON (compressed where the name ends so), for a machine without lm-eval."""
    text = json.dumps([[name, pairs] for name, pairs in requests]).encode()
    path.write_bytes(gzip.compress(text, mtime=0) if path.suffix == ".gz" else text)


def read_requests(path: Path) -> list[Requests]:
    """Read what :func:`write_requests` wrote.

    Raises:
        InputError: the file is missing or something else.
    """
    try:
        stored = path.read_bytes()
        content = json.loads(gzip.decompress(stored) if path.suffix == ".gz" else stored)
        return [
            Requests(name, [(tuple(context), tuple(answer)) for context, answer in pairs])
            for name, pairs in content
        ]
    except (OSError, ValueError, TypeError) as error:
        raise InputError(f"{path} holds no requests ({error}); write it with --export") from None


def bench_scoring(
    model: PreTrainedModel,
    requests: Sequence[Requests],
    settings: ScoringSettings,
    *,
    stock: Callable[[list[Pair]], list[tuple[float, bool]]] | None = None,
    title: str = "Scoring",
) -> Report:
    """Measure stock, baseline and calibrated scoring in turns, and write the report.

    Args:
        model: what is scored with; both paths use the same object.
        requests: one entry for each row of the table.
        settings: how to measure.
        stock: lm-eval's own path; :class:`StockPath` when None.
        title: heading of the report.
    """
    machine = describe_machine(settings.device)
    report = Report(settings.name, title, machine, command_line())
    columns = (
        "requests of", "requests", "token ceiling", "stock requests/s", "none / stock",
        "ACT / stock", "of ceiling", "pairs with a sink", "stock GiB", "ACT GiB", "max difference",
    )  # fmt: skip
    note = "Medians over rounds of the ratio within a round; ratios above 1 are faster than stock."
    table = Table("Requests per second", columns, note=note)
    facts = model_facts(model)
    artifact = random_heads(facts, settings.share_of_heads)
    for entry in requests:
        table.rows.append(_row(model, entry, settings, artifact, stock))
        report.tables = [table]
        report.write(settings.output)  # a run that is stopped keeps what it measured
    how = "lm-eval's own HFLM._loglikelihood_tokens" if stock else "StockPath (no lm-eval here)"
    report.remarks = [
        f"stock: {how}, batch size {settings.stock_sequences}; ours: batch size "
        f"{settings.batch_size}, token budget {settings.token_budget}",
        f"ACT: preset paper, {artifact.head_count()} of "
        f"{facts.num_hidden_layers * facts.num_attention_heads} heads at random",
        f"{settings.rounds} rounds, variants in turns, order reversed every other round",
    ]
    report.write(settings.output)
    return report


def _row(
    model: PreTrainedModel,
    entry: Requests,
    settings: ScoringSettings,
    artifact: Artifact,
    stock: Any,  # noqa: ANN401 - see bench_scoring
) -> list[Any]:
    run_stock = stock or StockPath(model, settings.stock_sequences).score
    items = [Item(context, answer) for context, answer in entry.pairs]
    counters = CalibrationCounters()

    def ours(attachment: Attachment | None) -> list[Any]:
        scorer = Scorer(
            model,
            attachment,
            batch_size=settings.batch_size,
            token_budget=settings.token_budget,
        )
        return scorer.score(items, on_prompt=counters.record)

    attachment = attach(model, artifact, facts=artifact.model, engine=settings.engine)

    def suspended(function: Callable[[], Any]) -> Any:  # noqa: ANN401 - whatever it returns
        with attachment.suspended():
            return function()

    base = suspended(lambda: run_stock(entry.pairs))
    mine = suspended(lambda: ours(None))
    variants: dict[str, Callable[[int], Any]] = {
        "stock": lambda _: suspended(lambda: run_stock(entry.pairs)),
        "none": lambda _: suspended(lambda: ours(None)),
        "act": lambda _: ours(attachment),
    }
    timings = alternate(variants, device=settings.device, rounds=settings.rounds, warmup=1)
    memory = {
        name: peak_memory(lambda f=function: f(0), device=settings.device)  # type: ignore[misc]
        for name, function in variants.items()
    }
    attachment.detach()
    summary = counters.summary()
    ceiling = token_ceiling(entry.pairs)
    faster = 1 / ratio(timings, "act", "stock")
    difference = max(abs(a[0] - b.loglikelihood) for a, b in zip(base, mine, strict=True))
    return [
        entry.name, len(items), ceiling, len(items) / timings["stock"].median,
        1 / ratio(timings, "none", "stock"), faster, faster / ceiling,
        summary["share_of_pairs_with_sink"], _gib(memory["stock"]), _gib(memory["act"]), difference,
    ]  # fmt: skip


def _gib(value: int | None) -> float | None:
    return None if value is None else value / 2**30


def main(arguments: Sequence[str] | None = None) -> Path:
    """Measure stored requests from a command line; return the report's path."""
    parser = argparse.ArgumentParser(description="Scoring of stored requests.")
    parser.add_argument("--requests", type=Path, required=True, help="written with --export")
    parser.add_argument("--only", default="", help="these entries, separated by commas")
    parser.add_argument("--limit", type=int, help="requests of an entry")
    parser.add_argument("--model", help="folder of a model")
    parser.add_argument("--random", default="tiny", help="shape of a random Llama instead")
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--engine", default="auto")
    parser.add_argument("--batch-size", type=int, help="contexts of a forward; no limit if missing")
    parser.add_argument("--stock-batch-size", type=int, help="sequences of a stock forward")
    parser.add_argument("--token-budget", type=int, help="most tokens of a forward of ours")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--output", type=Path, default=Path("results/benchmarks"))
    parser.add_argument("--name", default="scoring")
    given = parser.parse_args(arguments)
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
        batch_size=given.batch_size,
        stock_batch_size=given.stock_batch_size,
        token_budget=given.token_budget,
        rounds=given.rounds,
        engine=given.engine,
        device=given.device,
        output=given.output,
        name=given.name,
    )
    title = f"Scoring with {Path(given.model).name if given.model else given.random}, {given.dtype}"
    print(bench_scoring(model, requests, settings, title=title).markdown())
    return Path(given.output) / f"{given.name}.md"


def _within(pair: Pair, words: int) -> Pair:
    """Map token ids of another vocabulary into one of so many words (random models)."""
    context, answer = pair
    return tuple(t % words for t in context), tuple(t % words for t in answer)


if __name__ == "__main__":
    main()
