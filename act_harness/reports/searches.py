"""Sections of a report about the search: head sets, and methods against each other."""

from __future__ import annotations

import math
from collections.abc import Mapping
from functools import partial
from typing import Any

import numpy as np

from act_harness.artifact import Artifact, load_artifact
from act_harness.evidence.plots import Span, span_plot
from act_harness.evidence.tables import p_value_text
from act_harness.exploration.page import settings_line
from act_harness.reports.parts import Figure, Section, Table
from act_harness.reports.sources import Source
from act_harness.search.choose.judgement import describe
from act_harness.search.report import log_strengths, measured_sets, plots_of, ranked_heads

__all__ = ["methods_section", "search_section"]

_TITLES = {
    "map": "Map of heads, layers down and heads across",
    "ranks": "Heads by their effect alone, and sets of them against random ones",
    "curves": "How tuning went: loss by epoch, and what verify chose by",
}


def search_section(source: Source) -> Section:
    """Return what a head set's search found.

    Raises:
        ArtifactError: The artifact is malformed.
    """
    artifact = load_artifact(source.path)
    said = artifact.judgement()[0]
    search = artifact.search
    calibration = settings_line(artifact.calibration.settings())
    lines = [f"Worth: {said}", f"{artifact.head_count()} heads of {artifact.model.id}",
             f"Calibration: {calibration}"]  # fmt: skip
    figures: list[Figure] = []
    tables: list[Table] = []
    if search is not None:
        judged = search.get("judgement")
        lines += [line.strip() for line in describe(judged)] if judged else []
        reason = search["rule"].get("reason")
        lines += [f"Rule {search['rule']['name']}" + (f": {reason}" if reason else "")]
        data = _data(artifact)
        figures = [
            Figure(name, _TITLES[name], plot, *data[name])
            for name, plot in plots_of(artifact).items()
        ]
        tables = [_controls(judged["columns"])] if judged and judged["columns"] else []
    return Section(
        title=f"Head set {artifact.name}",
        source=str(source.path),
        lines=lines,
        figures=figures,
        tables=tables,
        notes=list(search.get("notes", [])) if search is not None else [],
        worst=said,
        order=_gain(search),
    )


def _gain(search: Mapping[str, Any] | None) -> float:
    found = (search or {}).get("held_out") or (search or {}).get("judgement") or {}
    gains = [one["difference"] for one in found.get("columns", {}).values()]
    return float(min(gains, default=math.inf))


def _data(artifact: Artifact) -> dict[str, tuple[list[str], list[list[Any]]]]:
    """Return columns and rows of each plot's data."""
    search = artifact.search or {}
    chosen = {(layer, head) for layer, heads in artifact.heads.items() for head in heads}
    if search["rule"]["name"] == "gradient":
        maps = log_strengths(artifact)
        shape = next(iter(maps.values())).shape
        rows = [
            [layer, head, *(one[layer, head] for one in maps.values()), (layer, head) in chosen]
            for layer, head in np.ndindex(*shape)
        ]
        columns = ["penalty", "restart", "epoch", "loss", "verify", "verify_loss"]
        history = [[one.get(name) for name in columns] for one in search["training"]]
        named = [f"log_strength_{name}" for name in maps]
        return {
            "map": (["layer", "head", *named, "selected"], rows),
            "curves": (columns, history),
        }
    ranked, sets = ranked_heads(artifact), measured_sets(search)
    effects = [[*one, one[:2] in chosen] for one in ranked]
    points: list[list[Any]] = [
        ["single heads", f"{layer}.{head}", rank, effect, effect - error, effect + error]
        for rank, (layer, head, effect, error) in enumerate(ranked, start=1)
    ]
    for name, curve in (("sets on verify", sets.curve), ("taken on judge", sets.judged)):
        if curve is not None:
            points += [[name, "", *one] for one in zip(*curve, strict=True)]
    points += [["random on judge", "", heads, value, None, None] for heads, value in sets.controls]
    return {
        "map": (["layer", "head", "effect", "stderr", "selected"], effects),
        "ranks": (["panel", "head", "rank_or_heads", "value", "low", "high"], points),
    }


def _controls(columns: Mapping[str, Mapping[str, Any]]) -> Table:
    header = ["column", "untouched", "calibrated", "difference", "interval", "random sets",
              "best of them", "verdict"]  # fmt: skip
    rows, verdicts = [], []
    for name, one in sorted(columns.items(), key=lambda pair: pair[1]["difference"]):
        low, high = one["interval"]
        span = "" if low is None else f"{100 * low:+.1f} to {100 * high:+.1f}"
        drawn = one["random_sets"]["scores"]
        mean = f"{100 * math.fsum(drawn) / len(drawn):.1f}" if drawn else ""
        best = f"{100 * max(drawn):.1f}" if drawn else ""
        figures = [f"{100 * one[key]:.1f}" for key in ("untouched", "selected")]
        change = f"{100 * one['difference']:+.1f}"
        rows.append([name, *figures, change, span, mean, best, one["verdict"]])
        verdicts.append(one["verdict"])
    caption = "On documents that neither found nor chose the heads, accuracy in %"
    return Table(header, rows, range(1, 7), verdicts, caption)


# -- methods ---------------------------------------------------------------------------------------


def methods_section(source: Source) -> Section:
    """Return what a comparison of methods says; the method that loses most comes first."""
    content = source.content
    own = content["methods"]
    measured = {name: one for name, one in own.items() if one.get("heads") != 0}
    documents = content["documents"]["evaluation"]
    counts = ", ".join(f"{task} {count}" for task, count in documents.items())
    lines = [f"Documents that neither found nor chose anything: {counts}"]
    title = "Methods against the untouched model"
    figures = _methods_figure("methods", title, content, measured)
    tables = [_methods_table("At their own strength", content, own)]
    equal = content.get("equal_strength")
    if equal:
        title = f"{title}, at the strength of {equal['reference']}"
        figures += _methods_figure("methods-equal", title, content, equal["methods"])
        tables.append(_methods_table(title, content, equal["methods"]))
    cells = [
        (name, column, cell)
        for name, one in (measured or own).items()
        for column, cell in one["columns"].items()
    ]
    name, column, cell = min(cells, key=lambda found: found[2]["difference"])
    recipe = content["recipe"]["name"]
    return Section(
        title=f"Methods: {recipe}",
        source=str(source.path),
        lines=lines,
        figures=figures,
        tables=tables,
        notes=[f"{name}: {one['note']}" + (f" ({one['said']})" if one["said"] else "")
               for name, one in own.items()],
        worst=f"{name}, {column} {cell['difference']:+.4f}"
        f"{_interval(cell, ' ({:+.4f} to {:+.4f})')}, {cell['verdict']}",
        order=cell["difference"],
    )  # fmt: skip


def _methods_figure(
    name: str, title: str, content: Mapping[str, Any], methods: Mapping[str, Any]
) -> list[Figure]:
    panels: dict[str, list[Span]] = {}
    for column, tasks in content["columns"].items():
        count = sum(content["documents"]["evaluation"][task] for task in tasks)
        spans = [
            Span(method, cell["difference"], low, high, cell["verdict"], documents=count)
            for method, one in methods.items()
            for cell in (one["columns"][column],)
            for low, high in (cell["interval"],)
            if low is not None and high is not None  # of a single document
        ]
        if spans:
            axis = f"{column}: method - untouched"
            panels[axis] = sorted(spans, key=lambda span: span.value)
    if not panels:
        return []
    data = [(axis.split(":")[0], *span) for axis, own in panels.items() for span in own]
    draw = partial(span_plot, panels, title=title)
    return [Figure(name, title, draw, ["column", *Span._fields], data)]


def _interval(cell: Mapping[str, Any], form: str, unit: float = 1.0) -> str:
    low, high = cell["interval"]
    return "" if low is None or high is None else form.format(unit * low, unit * high)


def _methods_table(caption: str, content: Mapping[str, Any], methods: Mapping[str, Any]) -> Table:
    columns = list(content["columns"])
    untouched = [
        f"{100 * math.fsum(values.values()) / len(values):.1f}"
        for values in (content["untouched"][column] for column in columns)
    ]
    rows, verdicts = [["none", "0", *untouched]], [""]
    for name in sorted(methods, key=lambda name: _least(methods[name]["columns"])):
        cells = [methods[name]["columns"][column] for column in columns]
        heads = content["methods"].get(name, {}).get("heads", "")
        found = map(_method_cell, cells) if heads != 0 else untouched
        rows.append([name, str(heads), *found])
        said = [cell["verdict"] for cell in cells]
        verdicts.append(next((v for v in ("regressed", "improved") if v in said), ""))
    header = ["method", "heads", *columns]
    return Table(header, rows, range(1, len(header)), verdicts, caption)


def _least(columns: Mapping[str, Mapping[str, Any]]) -> float:
    return float(min(cell["difference"] for cell in columns.values()))


def _method_cell(cell: Mapping[str, Any]) -> str:
    return (
        f"{100 * cell['accuracy']:.1f} ({100 * cell['difference']:+.1f}; "
        f"{_interval(cell, '{:+.1f} to {:+.1f}; ', 100.0)}"
        f"p {p_value_text(cell['p_adjusted'], digits=3)}; "
        f"{cell['verdict']})"
    )
