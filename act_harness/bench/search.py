"""What the head search costs: the loop over heads at batch 1, the exact pass, the screen.

The loop is what the authors' released code does, made kinder: the model is loaded once, a sample
is one forward through the permanent adapter (two where answers have several tokens), and the output
head sees the last rows only. It is measured on some heads and scaled to all. The same documents,
the same machine, one after the other. Needs neither lm-eval nor data sets: documents come from a
file (``act-harness search --prepare``) or are random tokens behind a common instruction.

    python -m act_harness.bench.search --model DIR --documents FILE --device cuda
    python -m act_harness.bench.search --random 7b --device cuda

Where one core would need hours, several processes measure some chunks of documents each, and a last
call adds them up (see ``search_parts``):

    python -m act_harness.bench.search --model DIR --documents FILE --parts FOLDER --slice 3/12
    python -m act_harness.bench.search --join FOLDER --name search-cpu
"""

from __future__ import annotations

import random
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from act_harness.artifact import Artifact, ModelFacts
from act_harness.attention import attach, model_facts
from act_harness.attention.load import load_plain_model
from act_harness.bench.arguments import Arguments, read_count, read_device, read_dtype, read_share
from act_harness.bench.common import (
    Machine,
    Report,
    Table,
    Timing,
    command_line,
    describe_machine,
    ratio,
    synchronize,
)
from act_harness.bench.models import random_llama
from act_harness.engines import select_engine
from act_harness.evidence.stats import spearman
from act_harness.scoring.scorer import Item, Scorer
from act_harness.search.choose.effects import head_effects
from act_harness.search.compute.measure import Measurement
from act_harness.search.compute.workbench import Workbench
from act_harness.search.documents import (
    Document,
    TaskDocuments,
    read_documents,
)
from act_harness.search.ledger import Ledger
from act_harness.search.processes import Processes
from act_harness.search.recipe import Recipe, make_recipe
from act_harness.search.run import kept_heads
from act_harness.support import places

if TYPE_CHECKING:
    from collections.abc import Sequence

    from act_harness.engines.operation import Engine, EngineResult
    from act_harness.evidence.resampling import Array
    from act_harness.search.choose.effects import HeadEffect, TaskScores
    from act_harness.search.choose.sets import Place

__all__ = ["bench_search", "main", "random_documents"]

Grid = dict[int, tuple[int, ...]]


@dataclass
class Pass:
    """One way of searching, measured."""

    seconds: float
    forwards: float
    rows: float
    effects: list[HeadEffect]
    measurement: Measurement
    estimates: dict[Place, float]
    seconds_by_part: dict[str, float]


class _TimedEngine:
    """An engine that notes how long it takes."""

    def __init__(self, engine: Engine, device: str) -> None:
        self.name, self._engine, self._device = engine.name, engine, device
        self.seconds = 0.0

    def __call__(self, *args: Any, **kwargs: Any) -> EngineResult:  # noqa: ANN401 - as the engine
        synchronize(self._device)
        began = time.perf_counter()
        result = self._engine(*args, **kwargs)
        synchronize(self._device)
        self.seconds += time.perf_counter() - began
        return result


def random_documents(
    count: int, *, tasks: int = 1, vocabulary: int, instruction: int = 30, own: int = 60
) -> list[TaskDocuments]:
    """Return questions of random tokens, each task behind an instruction of its own."""
    made = []
    for task in range(tasks):
        draw = random.Random(task)  # noqa: S311 - no secret
        common = tuple(draw.randrange(vocabulary) for _ in range(instruction))
        answers = [(draw.randrange(vocabulary),) for _ in range(4)]
        rows = []
        for number in range(count):
            length = draw.randint(own // 2, own + own // 2)
            context = common + tuple(draw.randrange(vocabulary) for _ in range(length))
            requests = tuple((context, answer) for answer in answers)
            rows.append(Document(f"random{task}", f"{number:08x}", requests, number % 4))
        made.append(TaskDocuments(f"random{task}", tuple(rows), (), "random", "none", 0))
    return made


def bench_search(
    model: Any,  # noqa: ANN401 - a PreTrainedModel
    documents: Sequence[TaskDocuments],
    *,
    loop_heads: int = 8,
    loop_documents: int | None = None,
    keep: float = 0.15,
    recipe: Recipe | None = None,
    rounds: int = 1,
) -> tuple[list[Table], dict[str, Timing]]:
    """Measure the three ways on the documents' search split; return tables and all timings.

    Args:
        model: a loaded causal language model.
        documents: of every task.
        loop_heads: heads that the loop is measured on, spread over the grid.
        loop_documents: documents per task that the loop is measured on; None: all.
        keep: share of the heads that the screen keeps.
        recipe: settings of the search; its tasks, method and share are replaced.
        rounds: how often all three are measured, in turns; medians go into the tables.
    """
    device = str(next(model.parameters()).device)
    facts = model_facts(model)
    base = recipe or make_recipe({"tasks": ["bench"]})
    base = base.model_copy(
        update={"tasks": tuple(d.task for d in documents), "verify_samples": 0, "keep": keep}
    )
    base = base.on(device)
    grid = base.grid(facts)
    seconds: dict[str, list[float]] = {"loop": [], "exhaustive": [], "screened": []}
    for _ in range(rounds):
        exact = measure_way(model, documents, base, grid, device, screened=False)
        screen = measure_way(model, documents, base, grid, device, screened=True)
        loop = measure_loop(model, facts, base, grid, exact, (loop_heads, loop_documents), device)
        for name, one in (("loop", loop), ("exhaustive", exact), ("screened", screen)):
            seconds[name].append(one.seconds)
    timings = {name: Timing(tuple(all_rounds)) for name, all_rounds in seconds.items()}
    sizes = {
        "documents": sum(len(d.search) for d in documents),
        "heads": sum(map(len, grid.values())),
    }
    tables = [
        _cost_table(exact, screen, loop, timings, sizes),
        _quality_table(exact, screen, keep),
        _parts_table(exact, screen),
    ]
    return tables, timings


def measure_way(
    model: Any,  # noqa: ANN401
    documents: Sequence[TaskDocuments],
    recipe: Recipe,
    grid: Grid,
    device: str,
    *,
    screened: bool,
) -> Pass:
    """Run one way of searching over the documents' search split, in a ledger of its own."""
    engine = _TimedEngine(select_engine(recipe.engine, device=torch.device(device).type), device)
    with tempfile.TemporaryDirectory() as folder, Workbench(model) as bench:
        measurement = Measurement(
            recipe,
            {d.task: d.search for d in documents},
            Ledger(Path(folder), identity={}),
            Processes(),
            engine,
        )
        bench.forwards = bench.rows_computed = 0
        parts = {}
        synchronize(device)
        began = time.perf_counter()
        estimates: dict[Place, float] = {}
        if screened:
            measurement.screen(bench, grid, progress=lambda done: None)
            estimates = measurement.estimates(grid)
            grid = kept_heads(estimates, recipe.keep)
            synchronize(device)
            parts["screen"] = time.perf_counter() - began
            parts["engine in the screen"] = engine.seconds
        measurement.run(bench, grid, progress=lambda done: None)
        synchronize(device)
        seconds = time.perf_counter() - began
        parts["exact pass"] = seconds - parts.get("screen", 0.0)
        parts["engine in the exact pass"] = engine.seconds - parts.get("engine in the screen", 0.0)
        stock = measurement.baselines()
        effects = head_effects(stock, measurement.changes(grid, stock))
        return Pass(
            seconds, bench.forwards, bench.rows_computed, effects, measurement, estimates, parts
        )


@dataclass
class Loop:
    seconds: float
    """Scaled to all heads and documents."""
    forwards: float
    rows: float
    heads: int
    documents: int
    worst: float
    """Largest difference of a margin from the exact pass, in nats."""
    predictions: float
    """Share of equal predictions."""


def measure_loop(
    model: Any,  # noqa: ANN401
    facts: ModelFacts,
    recipe: Recipe,
    grid: Grid,
    exact: Pass,
    share: tuple[int, int | None],
    device: str,
    *,
    turn: float = 0.5,
) -> Loop:
    """Time the loop over heads at batch 1 on some of them, and compare it with the exact pass.

    Args:
        model: the model.
        facts: what identifies it.
        recipe: settings of the search.
        grid: heads by layer.
        exact: the exact pass over the same documents.
        share: number of heads, and of documents per task (None: all).
        device: the model's.
        turn: where between one chosen head and the next the first one lies, in [0, 1).
    """
    everything = [(layer, head) for layer, heads in grid.items() for head in heads]
    step = max(1, len(everything) // share[0])
    chosen = everything[int(turn * step) :: step][: share[0]]
    stock = exact.measurement.baselines()
    changes = exact.measurement.changes(grid, stock)
    seconds, worst, equal, seen, forwards, tokens = 0.0, 0.0, 0, 0, 0, 0
    for layer, head in chosen:
        artifact = Artifact(
            name="loop", model=facts, calibration=recipe.calibration, heads={layer: (head,)}
        )
        attachment = attach(model, artifact, facts=facts, engine=recipe.engine)
        try:
            scorer = Scorer(model, attachment)
            for number, task in enumerate(stock):
                ordered = exact.measurement.ordered(task.task)
                picked = _spread(len(ordered), share[1])
                _score(scorer, ordered[:1])  # warm
                before = scorer.work.forwards
                synchronize(device)
                began = time.perf_counter()
                found = _score(scorer, [ordered[place] for place in picked])
                synchronize(device)
                seconds += time.perf_counter() - began
                forwards += scorer.work.forwards - before
                tokens += sum(len(ordered[p].requests[0][0]) for p in picked)
                scores = task.scores + changes[layer, head, 0][number]
                one = _agreement(task, scores, found, picked)
                worst, equal, seen = max(worst, one[0]), equal + one[1], seen + len(picked)
        finally:
            attachment.detach()
    pairs = sum(len(task.right) for task in stock) * len(everything)
    scale = pairs / seen
    return Loop(
        seconds * scale,
        forwards * scale,
        tokens * scale * facts.num_hidden_layers,
        len(chosen),
        seen // len(chosen),
        worst,
        equal / seen,
    )


def _spread(count: int, wanted: int | None) -> list[int]:
    if wanted is None or wanted >= count:
        return list(range(count))
    return [int((n + 0.5) * count / wanted) for n in range(wanted)]


def _score(scorer: Scorer, documents: Sequence[Document]) -> list[list[float]]:
    return [
        [s.loglikelihood for s in scorer.score([Item(*request) for request in document.requests])]
        for document in documents
    ]


def _agreement(
    task: TaskScores,
    scores: Array,
    found: list[list[float]],
    picked: list[int],
) -> tuple[float, int]:
    """Return the largest difference of a margin and the number of equal predictions."""
    import numpy as np

    other = scores.copy()
    for place, row in zip(picked, found, strict=True):
        other[place, : len(row)] = row
    plain = task.__class__(task.task, task.scores, task.right, task.fixed, "margin")
    difference = np.abs(plain.margins(other) - plain.margins(scores))[picked]
    same = other.argmax(axis=-1)[picked] == scores.argmax(axis=-1)[picked]
    return float(difference.max()), int(same.sum())


def _cost_table(
    exact: Pass, screen: Pass, loop: Loop, timings: dict[str, Timing], sizes: dict[str, int]
) -> Table:
    rows: list[Sequence[Any]] = [
        [
            "loop, batch 1 (scaled)" if name == "loop" else name,
            one.forwards,
            one.rows,
            timings[name].median,
            1 / ratio(timings, name, "loop"),
            loop.rows / one.rows,
        ]
        for name, one in (("loop", loop), ("exhaustive", exact), ("screened", screen))
    ]
    return Table(
        "Cost",
        ["way", "forwards", "rows x layers", "seconds", "times faster", "times fewer rows"],
        rows,
        note=(
            f"{sizes['documents']} documents, {sizes['heads']} heads, medians of "
            f"{len(timings['loop'].samples)} rounds. The loop was measured on "
            f"{loop.heads} heads x {loop.documents} documents and scaled. There the exact pass "
            f"gives the same prediction in {100 * loop.predictions:.2f} % and margins within "
            f"{loop.worst:.1e} nats."
        ),
    )


def _quality_table(exact: Pass, screen: Pass, keep: float) -> Table:
    measured = {e.place: e.effect for e in exact.effects}
    places = sorted(measured)
    ranked = sorted(places, key=lambda place: -measured[place])
    kept = {e.place for e in screen.effects}
    rows: list[Sequence[Any]] = [
        [
            "rank correlation of estimate and measured effect",
            spearman([screen.estimates[p] for p in places], [measured[p] for p in places]),
        ]
    ]
    for name, size in (("10 %", max(1, len(ranked) // 10)), ("20", 20), ("40", 40)):
        best = [place for place in ranked[:size] if measured[place] > 0]
        if best:
            rows.append(
                [f"share of the best {name} kept", sum(p in kept for p in best) / len(best)]
            )
    return Table(f"Screen, keep {keep}", ["figure", "value"], rows)


def _parts_table(exact: Pass, screen: Pass) -> Table:
    rows: list[Sequence[Any]] = [
        [way, part, seconds]
        for way, one in (("exhaustive", exact), ("screened", screen))
        for part, seconds in one.seconds_by_part.items()
    ]
    return Table("Where the time goes, in the last round", ["way", "part", "seconds"], rows)


def main(arguments: Sequence[str] | None = None) -> Path:
    """Run the benchmark; return the path of the report."""
    parser = Arguments(
        prog="act-harness bench search", description="Cost of the head search, three ways."
    )
    parser.add_argument("--model", help="folder of a model")
    parser.add_argument("--random", help="7b, 1b or tiny: a random model with planted sinks")
    parser.add_argument("--dtype", type=read_dtype, default="float32")
    parser.add_argument("--device", type=read_device, default="cpu")
    parser.add_argument("--documents", type=Path, help="written by act-harness search --prepare")
    parser.add_argument("--samples", type=read_count, help="documents per task")
    parser.add_argument("--loop-heads", type=read_count, default=8)
    parser.add_argument("--loop-documents", type=read_count)
    parser.add_argument("--rounds", type=read_count, default=1, help="of all three ways, in turns")
    parser.add_argument("--keep", type=read_share, default=0.15)
    parser.add_argument(
        "--chunk-tokens",
        type=read_count,
        help="else by the device, as in a recipe",
    )
    parser.add_argument("--screen-tokens", type=read_count)
    parser.add_argument("--pack-tokens", type=read_count)
    parser.add_argument("--slice", help="I/N: measure only these chunks of documents, into --parts")
    parser.add_argument("--parts", type=Path, help="folder of the slices' results")
    parser.add_argument("--join", type=Path, help="add up the slices in this folder")
    parser.add_argument("--output", type=Path, default=Path("results/benchmarks"))
    parser.add_argument("--name", default="search")
    given = parser.parse_args(arguments)
    if not (given.join or given.random or given.model):
        parser.error("no model was named, expected --model DIR or --random SHAPE")
    places.prepare_folder(given.output)
    if given.join:
        from act_harness.bench.search_parts import join_parts

        return _write(given, *join_parts(given.join))
    if given.random:
        model = random_llama(given.random, dtype=given.dtype, device=given.device)
    else:
        model = load_plain_model(given.model, dtype=given.dtype, device=given.device)
    if given.documents:
        documents = read_documents(given.documents)
        documents = [
            TaskDocuments(d.task, d.search[: given.samples], (), d.source, d.evaluation, 0)
            for d in documents
        ]
    else:
        vocabulary = model.config.vocab_size
        documents = random_documents(given.samples or 32, vocabulary=vocabulary)
    recipe = make_recipe(
        {
            "tasks": ["bench"],
            "chunk_tokens": given.chunk_tokens,
            "screen_tokens": given.screen_tokens,
            "pack_tokens": given.pack_tokens,
        }
    )
    options: dict[str, Any] = {
        "loop_heads": given.loop_heads,
        "loop_documents": given.loop_documents,
        "keep": given.keep,
        "recipe": recipe,
    }
    if given.slice:
        from act_harness.bench.search_parts import measure_parts, read_slice

        share = read_slice(given.slice)
        lock = given.parts / f"lock-{share[0]:03d}-of-{share[1]:03d}"
        refusal = f"slice {given.slice} is being measured by another process; wait for it"
        with places.sole_writer(lock, refusal):
            return measure_parts(model, documents, share, folder=given.parts, **options)
    tables, timings = bench_search(model, documents, **options, rounds=given.rounds)
    return _write(given, tables, describe_machine(given.device), command_line(), timings)


def _write(
    given: Any,  # noqa: ANN401 - an argparse namespace
    tables: list[Table],
    machine: Machine,
    command: str,
    timings: dict[str, Timing] | None = None,
) -> Path:
    report = Report(given.name, "Head search: loop, exhaustive, screened", machine, command, tables)
    if timings:
        report.add_rounds("search", timings)
    path = report.write(given.output)
    print(report.markdown())
    return path


if __name__ == "__main__":
    main()
