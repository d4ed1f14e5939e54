"""The search benchmark in slices: chunks of documents dealt out to processes, then added up.

An exhaustive search takes a core more than an hour on the documents of the benchmark. A chunk is
what the search itself computes at a time, and costs the same beside any other chunks, so processes
can measure some chunks each, all three ways on each, and seconds may be added. What is finished is
on the disk at once: slices that were cut short report the chunks that they got to. The screen keeps
its share of the heads by each chunk's own estimates here, since it sees no others.
"""

from __future__ import annotations

import json
import math
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from act_harness.attention import model_facts
from act_harness.bench.common import Machine, Table, command_line, describe_machine
from act_harness.bench.search_ways import measure_loop, measure_way
from act_harness.errors import InputError
from act_harness.search.compute.layout import Chunk, chunks_of
from act_harness.search.documents import TaskDocuments
from act_harness.search.recipe import Recipe, make_recipe
from act_harness.support import atomic, reading

if TYPE_CHECKING:
    from collections.abc import Sequence

__all__ = ["join_parts", "measure_parts", "read_slice"]

_WAYS = ("loop", "exhaustive", "screened")


def read_slice(text: str) -> tuple[int, int]:
    """Read ``I/N``, the slice I of N, counted from 0.

    Raises:
        InputError: it is no such pair.
    """
    number, _, count = text.partition("/")
    if not (number.isdigit() and count.isdigit() and int(number) < int(count)):
        raise InputError(f"--slice is {text!r}, expected I/N with I from 0 to N - 1")
    return int(number), int(count)


def measure_parts(
    model: Any,  # noqa: ANN401 - a PreTrainedModel
    documents: Sequence[TaskDocuments],
    share: tuple[int, int],
    *,
    folder: Path,
    loop_heads: int,
    loop_documents: int | None,
    keep: float,
    recipe: Recipe | None = None,
) -> Path:
    """Measure a slice's chunks one by one; return the file that has a line for each.

    Args:
        model: a loaded causal language model.
        documents: of every task; all slices must be given the same.
        share: (slice, number of slices).
        folder: of the results; chunks that are there are not measured again.
        loop_heads: heads of each chunk that the loop is measured on, others in other chunks.
        loop_documents: documents of each chunk that the loop is measured on; None: all.
        keep: share of the heads that the screen keeps.
        recipe: settings of the search.
    """
    device = str(next(model.parameters()).device)
    facts = model_facts(model)
    base = (recipe or make_recipe({"tasks": ["bench"]})).on(device)
    path = folder / f"slice-{share[0]:03d}-of-{share[1]:03d}.jsonl"
    known = {(row["task"], row["chunk"]) for row in reading.read_lines(path, missing_ok=True)}
    every = [c for d in documents for c in chunks_of(d.search, base.size("chunk_tokens"))]
    every.sort(key=lambda c: (-_weight(c), c.task, c.number))  # like sizes to every slice
    for number, chunk in enumerate(every):
        if number % share[1] != share[0] or (chunk.task, chunk.number) in known:
            continue
        own = [TaskDocuments(chunk.task, chunk.documents, (), "", "", 0)]
        settings = base.model_copy(
            update={"tasks": (chunk.task,), "verify_samples": 0, "keep": keep}
        )
        grid = settings.grid(facts)
        exact = measure_way(model, own, settings, grid, device, screened=False)
        screen = measure_way(model, own, settings, grid, device, screened=True)
        wanted = (loop_heads, loop_documents)
        turn = (number * 0.618034) % 1.0  # other heads in every chunk
        loop = measure_loop(model, facts, settings, grid, exact, wanted, device, turn=turn)
        record = {
            "task": chunk.task,
            "chunk": chunk.number,
            "chunks": len(every),
            "documents": len(chunk.documents),
            "heads": sum(map(len, grid.values())),
            "keep": keep,
            "slices": share[1],
            "machine": asdict(describe_machine(device)),
            "command": command_line(),
            "loop": asdict(loop),
            "exhaustive": _figures(exact),
            "screened": _figures(screen),
        }
        atomic.append_line(path, record)
        print(json.dumps({key: record[key] for key in ("task", "chunk", "documents")}), flush=True)
    return path


def _weight(chunk: Chunk) -> int:
    return sum(len(document.requests[0][0]) for document in chunk.documents)


def _figures(found: Any) -> dict[str, Any]:  # noqa: ANN401 - a Pass
    return {
        "seconds": found.seconds,
        "forwards": found.forwards,
        "rows": found.rows,
        "parts": found.seconds_by_part,
    }


def join_parts(folder: Path) -> tuple[list[Table], Machine, str]:
    """Add up the chunks of all slices; return the tables, the machine and the command.

    Raises:
        InputError: there are no results in the folder.
    """
    rows = [row for p in sorted(folder.glob("slice-*.jsonl")) for row in reading.read_lines(p)]
    if not rows:
        raise InputError(
            f"{folder} holds no results of --slice; run the slices first, with --parts"
        )
    total = {way: _sum(rows, way) for way in _WAYS}
    cost: list[Sequence[Any]] = [
        [
            "loop, batch 1 (scaled)" if way == "loop" else way,
            *(total[way][key] for key in ("forwards", "rows", "seconds")),
            total["loop"]["seconds"] / total[way]["seconds"],
            total["loop"]["rows"] / total[way]["rows"],
        ]
        for way in _WAYS
    ]
    first = rows[0]
    left = first["chunks"] - len(rows)
    pairs = sum(row["loop"]["heads"] * row["loop"]["documents"] for row in rows)
    equal = math.fsum(
        row["loop"]["predictions"] * row["loop"]["heads"] * row["loop"]["documents"] for row in rows
    )
    worst = max(row["loop"]["worst"] for row in rows)
    note = (
        f"{sum(row['documents'] for row in rows)} documents in {len(rows)} of {first['chunks']} "
        f"chunks, {first['heads']} heads, keep {first['keep']}; seconds added up over "
        f"{_processes(first)}. The loop was measured on {pairs} (head, document) pairs, other "
        f"heads in every chunk, and scaled. "
        f"There the exact pass gives the same prediction in {100 * equal / pairs:.2f} % and "
        f"margins within {worst:.1e} nats."
    )
    if left:
        note += f" {left} chunks were not reached."
    tables = [
        Table(
            "Cost",
            ["way", "forwards", "rows x layers", "seconds", "times faster", "times fewer rows"],
            cost,
            note=note,
        ),
        _task_table(rows),
        _parts_table(rows),
    ]
    return tables, Machine(**first["machine"]), first["command"]


def _processes(row: dict[str, Any]) -> str:
    threads = row["machine"]["threads"]
    each = "1 thread" if threads == 1 else f"{threads} threads"
    if row["slices"] == 1:
        return f"one process of {each}"
    return f"{row['slices']} processes of {each} each"


def _sum(rows: Sequence[dict[str, Any]], way: str) -> dict[str, float]:
    keys = ("forwards", "rows", "seconds")
    return {key: math.fsum(row[way][key] for row in rows) for key in keys}


def _task_table(rows: Sequence[dict[str, Any]]) -> Table:
    lines: list[Sequence[Any]] = []
    for task in dict.fromkeys(sorted(row["task"] for row in rows)):
        mine = [row for row in rows if row["task"] == task]
        seconds = [_sum(mine, way)["seconds"] for way in _WAYS]
        ratios = [seconds[0] / one for one in seconds[1:]]
        lines.append([task, sum(row["documents"] for row in mine), *seconds, *ratios])
    columns = ["task", "documents", *(f"{way}, s" for way in _WAYS)]
    return Table("By task", [*columns, "exhaustive x", "screened x"], lines)


def _parts_table(rows: Sequence[dict[str, Any]]) -> Table:
    lines: list[Sequence[Any]] = []
    for way in _WAYS[1:]:
        for part in rows[0][way]["parts"]:
            lines.append([way, part, math.fsum(row[way]["parts"][part] for row in rows)])
    return Table("Where the time goes", ["way", "part", "seconds"], lines)
