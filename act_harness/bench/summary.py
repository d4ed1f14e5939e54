"""README's one table: what heads are worth and what they cost, from the stored results.

A row is added to :data:`GAINS` or :data:`COSTS`: what it says, the file, and where in the file its
figures stand. Nothing is typed: gains come with their 95 % intervals, every split or set that was
measured, weakest first; costs with the range over shapes or tasks. Written into README by
``python -m act_harness.bench.readme --write``.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from act_harness.errors import ResultError
from act_harness.evidence.tables import Markup, markdown_table
from act_harness.support import reading

__all__ = ["COSTS", "GAINS", "Cost", "Gain", "summary_table"]

_REPORTS = "results/reports"
_BENCHMARKS = "results/benchmarks"
_JOINT = f"{_REPORTS}/2026-11-29-joint-search.json"
_GENERAL = f"{_REPORTS}/2026-11-29-heldout-general.json"


class Gain(NamedTuple):
    """A change against the untouched model, once for each split of the documents."""

    what: str
    file: str
    places: tuple[tuple[str, ...], ...]
    """Keys down to a change, ``difference`` and ``interval`` in shares of 1."""


class Cost(NamedTuple):
    """Figures of one column of a benchmark."""

    what: str
    file: str
    column: str
    variant: str = ""
    """How the column ``variant`` begins, where the table has one."""


def _splits(column: str, method: str) -> tuple[tuple[str, ...], ...]:
    """Return where the report of joint searches has a method's change with each of its splits."""
    return tuple(("methods", f"{split}/{column}/{method}") for split in (0, 1, 2))


GAINS = (
    Gain(
        "40 heads found one by one, 15 tasks, corrected",
        _GENERAL,
        (("arms", "general", "corrected"),),
    ),
    Gain("multiple choice", _JOINT, _splits("raw_other_tasks", "signed")),
    Gain(
        "multiple choice, beyond scaled scores",
        _JOINT,
        _splits("supervised_other_tasks", "signed"),
    ),
    Gain("multiple choice, first token tuned too", _JOINT, _splits("raw_other_tasks", "both")),
    Gain("classification, corrected", _JOINT, _splits("batch", "signed")),
    Gain("classification, beyond scaled scores", _JOINT, _splits("supervised", "signed")),
    Gain("classification, corrected, first token tuned too", _JOINT, _splits("batch", "both")),
    Gain(
        "control, corrected: random tokens instead of sinks",
        _JOINT,
        _splits("batch", "random-columns"),
    ),
    Gain(
        "control, corrected: the prompt's last tokens instead",
        _JOINT,
        _splits("batch", "last-columns"),
    ),
    Gain("control, corrected: whole heads scaled instead", _JOINT, (("methods", "1/batch/gate"),)),
    Gain(
        "control, corrected: whole heads, moved as far as sinks",
        _JOINT,
        (("methods", "1/batch/gate at the strength of signed"),),
    ),
)

COSTS = (
    Cost(
        "prefill: time over stock's, SmolLM2, CPU",
        f"{_BENCHMARKS}/attention-prefill-cpu.json",
        "ratio",
        "act",
    ),
    Cost(
        "decoding: time over stock's, 7B shape, H200",
        f"{_BENCHMARKS}/attention-decode-cuda.json",
        "ratio",
        "act",
    ),
    Cost(
        "prefill: time over stock's, 7B shape, H200",
        f"{_BENCHMARKS}/attention-prefill-cuda.json",
        "ratio",
        "act",
    ),
    Cost(
        "scoring: speed over lm-eval's `hf`, 7B shape, H200",
        f"{_BENCHMARKS}/scoring-7b-cuda.json",
        "ACT / stock",
    ),
)


def summary_table(root: Path, gains: Sequence[Gain] = GAINS, costs: Sequence[Cost] = COSTS) -> str:
    """Return the table from the results below a checkout, the weakest gain first.

    Raises:
        ResultError: A file has no such figure.
    """
    found = [(_changes(root, gain), gain) for gain in gains]
    found.sort(key=lambda pair: pair[0][0][1])
    rows = [(gain.what, "; ".join(map(_change, changes)), gain.file) for changes, gain in found]
    rows += [(cost.what, _range(root, cost), cost.file) for cost in costs]
    header = ["what", "points against the untouched model (95 % interval); costs: ratios", "file"]
    cells = [[Markup(what), said, _link(file)] for what, said, file in rows]
    return markdown_table(header, cells, compact=True).rstrip()


def _link(file: str) -> Markup:
    name = re.sub(r"^[\d-]+", "", Path(file).stem)  # without a report's date
    return Markup(f"[{name}]({file})")


def _changes(root: Path, gain: Gain) -> list[tuple[float, float, float]]:
    """Return difference, low and high end in points for each place, weakest first."""
    report = reading.read_json(root / gain.file, lenient=True)
    found = []
    for place in gain.places:
        at: Any = report
        for key in place:
            if isinstance(at, list):  # arms
                at = next((one for one in at if one.get("name") == key), None)
            else:
                at = at.get(key)
            if at is None:
                raise ResultError(f"{gain.file} has no {' / '.join(place)}; see bench/summary.py")
        low, high = at["interval"]
        found.append((100 * at["difference"], 100 * low, 100 * high))
    return sorted(found, key=lambda change: change[1])


def _change(change: tuple[float, float, float]) -> str:
    difference, low, high = change
    shown = "" if low > 0 else ", not shown"
    return f"{difference:+.1f} ({low:.1f} to {high:.1f}{shown})"


def _range(root: Path, cost: Cost) -> str:
    """Return the least and the largest figure of the column."""
    tables = reading.read_json(root / cost.file, lenient=True)["tables"]
    found = list(_column(tables, cost))
    if not found:
        raise ResultError(f"{cost.file} has no column {cost.column!r}; see bench/summary.py")
    return f"{min(found):.2f} to {max(found):.2f}"


def _column(tables: Sequence[Mapping[str, Any]], cost: Cost) -> Iterator[float]:
    for table in tables:
        for row in table["rows"]:
            record = dict(zip(table["columns"], row, strict=True))
            if cost.column in record and str(record.get("variant", "")).startswith(cost.variant):
                yield record[cost.column]
