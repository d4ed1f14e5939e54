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
from pathlib import Path
from typing import TYPE_CHECKING, Any

from act_harness.attention import model_facts
from act_harness.attention.load import load_plain_model
from act_harness.bench.arguments import Arguments, read_count, read_device, read_dtype, read_share
from act_harness.bench.common import (
    BenchmarkReport,
    Machine,
    Table,
    Timing,
    command_line,
    describe_machine,
    ratio,
)
from act_harness.bench.models import random_llama
from act_harness.bench.search_ways import Loop, Pass, measure_loop, measure_way
from act_harness.evidence.stats import spearman
from act_harness.search.documents import Document, TaskDocuments, read_documents
from act_harness.search.recipe import Recipe, make_recipe
from act_harness.support import places

if TYPE_CHECKING:
    from collections.abc import Sequence


__all__ = ["bench_search", "main", "random_documents"]


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
    report = BenchmarkReport(
        given.name, "Head search: loop, exhaustive, screened", machine, command, tables
    )
    if timings:
        report.add_rounds("search", timings)
    path = report.write(given.output)
    print(report.markdown())
    return path


if __name__ == "__main__":
    main()
