"""Sections of a report about measurements: attention sinks, and speed and memory of benchmarks."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

from act_harness.evidence.summary_plots import bar_plot
from act_harness.exploration.figures import draw_sinks
from act_harness.reports.parts import Figure, Section, Table
from act_harness.reports.sources import Source

__all__ = ["bench_section", "sinks_section"]

_FASTER = ("none / stock", "ACT / stock", "times faster", "exhaustive x", "screened x")
"""Columns of benchmarks in which more than 1 is a gain."""
_COST = ("ratio", "device_ratio", "peak_ratio")
"""Columns in which more than 1 is a cost."""
_SHOWN = 40
"""Bars of a figure, the weakest; its data holds all."""


def sinks_section(source: Source) -> Section:
    """Return where attention sinks are, as the paper's figures have them."""
    content = source.content
    tables = {name: content[name] for name in ("tasks", "heads", "positions", "tokens", "kinds")}
    model = content.get("model", {}).get("id", "a model")
    title = f"Attention sinks of {model} in {content['documents']} documents"
    tasks = sorted(tables["tasks"], key=lambda row: -row["sinks_per_head"])
    late = [
        f"{name.replace('_', ' ').replace('min rows', 'min_rows')}: {found['flags']:.0f} flags, "
        f"{found['on_last_three_tokens'] or 0:.1%} on the last three tokens"
        for name, found in content["flags"].items()
    ]
    header = ["task", "documents", "tokens", "sinks a head", "heads with sinks", "mass on sinks",
              "mass on the first token"]  # fmt: skip
    names = ("sinks_per_head", "share_of_heads_with_sinks", "mass_on_sinks", "mass_on_first_token")
    rows = [
        [row["task"], str(row["documents"]), f"{row['tokens']:.1f}",
         *(f"{row[name]:.3f}" for name in names)]
        for row in tasks
    ]  # fmt: skip
    kinds = [[row["kind"], f"{row['occurrences']:.0f}", f"{row['share_of_occurrences']:.1%}",
              f"{row['share_of_flags']:.1%}"] for row in tables["kinds"]]  # fmt: skip
    return Section(
        title=title,
        source=str(source.path),
        lines=late,
        figures=[
            Figure("sinks", title, partial(draw_sinks, tables, title=title),
                   ["table", "of", "name", "value"], _long(tables))
        ],
        tables=[
            Table(header, rows, range(1, len(header)), caption="By task"),
            Table(["kind of token", "tokens", "of all tokens", "of all sinks"], kinds,
                  range(1, 4), caption="By kind of token"),
        ],
        worst=f"{title}: {late[0]}",
    )  # fmt: skip


def _long(tables: Mapping[str, Sequence[Mapping[str, Any]]]) -> list[list[Any]]:
    """Return the figure's panels as one long table."""
    keys = {"positions": ("from",), "heads": ("layer", "head"), "tokens": ("text",)}
    return [
        [table, ".".join(str(row[key]) for key in own), name, value]
        for table, own in keys.items()
        for row in tables[table]
        for name, value in row.items()
        if name not in own
    ]


# -- speed and memory ------------------------------------------------------------------------------


def bench_section(source: Source) -> Section:
    """Return a benchmark: its figures of speed and memory, the slowest first, and its tables."""
    content = source.content
    machine = content["machine"]
    versions = ", ".join(f"{name} {one}" for name, one in machine.get("versions", {}).items())
    known = [
        (f"{table['title']}: " if len(content["tables"]) > 1 else "", record)
        for table in content["tables"]
        for record in _records(table)
    ]
    faster, cost = _bars(known, _FASTER), _bars(known, _COST)
    memory = _bars(known, sorted({n for _, r in known for n in r if n.endswith("GiB")}))
    faster.sort(key=lambda bar: bar[2])
    cost.sort(key=lambda bar: -bar[2])
    memory.sort(key=lambda bar: -bar[2])
    figures = [
        *_figure("speed", "Times as fast as what it is held against", faster, 1.0),
        *_figure("cost", "Times the cost of what it is held against", cost, 1.0),
        *_figure("memory", "Memory, GiB", memory, None),
    ]
    weakest = [f"{bar[0]}, {bar[1]} {bar[2]:.3g}" for bar in (*faster[:1], *cost[:1])]
    return Section(
        title=content["title"],
        source=str(source.path),
        lines=[f"{machine.get('chip', 'unknown machine')}; {versions}", content["command"],
               *content.get("remarks", [])],
        figures=figures,
        tables=[_table(table) for table in content["tables"]],
        worst=f"{content['title']}: {'; '.join(weakest)}" if weakest else "",
        order=faster[0][2] if faster else 1 / cost[0][2] if cost else 1.0,
    )  # fmt: skip


def _records(table: Mapping[str, Any]) -> list[dict[str, Any]]:
    return [dict(zip(table["columns"], row, strict=True)) for row in table["rows"]]


def _bars(
    known: Sequence[tuple[str, dict[str, Any]]], columns: Sequence[str]
) -> list[tuple[str, str, float]]:
    return [
        (start + _name(record), column, float(record[column]))
        for start, record in known
        for column in columns
        if isinstance(record.get(column), (int, float)) and record[column] > 0
    ]


def _name(record: Mapping[str, Any]) -> str:
    """Return what a row is of: what stands before its first measurement."""
    parts = []
    for column, value in record.items():
        if isinstance(value, float) or value is None:
            break
        parts.append(value if isinstance(value, str) else f"{column} {value}")
    return ", ".join(parts)


def _figure(
    name: str, title: str, bars: Sequence[tuple[str, str, float]], reference: float | None
) -> list[Figure]:
    if not bars:
        return []
    kept = list(dict.fromkeys(bar[0] for bar in bars))[:_SHOWN]
    shown = [bar for bar in bars if bar[0] in kept]
    draw = partial(bar_plot, shown, label=title, reference=reference)
    return [Figure(name, title, draw, ["of", "what", "value"], bars)]


def _table(table: Mapping[str, Any]) -> Table:
    rows = [[_shown(value) for value in row] for row in table["rows"]]
    numbers = [
        i for i in range(len(table["columns"]))
        if table["rows"] and all(not isinstance(row[i], str) for row in table["rows"])
    ]  # fmt: skip
    note = f". {table['note']}" if table.get("note") else ""
    return Table(table["columns"], rows, numbers, caption=f"{table['title']}{note}")


def _shown(value: Any) -> str:  # noqa: ANN401 - whatever a table holds
    if value is None:
        return "-"
    return f"{value:.4g}" if isinstance(value, float) else str(value)
