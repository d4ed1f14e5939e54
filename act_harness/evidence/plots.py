"""Plots of differences, and report files: what ``eval`` and ``compare`` leave for a reader.

Not here: the canvas (:mod:`act_harness.evidence.figures`) and any number. Effects, intervals and
verdicts come from the caller.
"""

from __future__ import annotations

import math
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from act_harness.errors import ResultError
from act_harness.evidence.comparison import Comparison, Row
from act_harness.evidence.figures import (
    BLUE,
    GREY,
    VERMILION,
    figure_text,
    head_figure,
    new_panels,
    save_figure,
)
from act_harness.support.atomic import write_json, write_text

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = [
    "Span",
    "comparison_files",
    "forest_plot",
    "span_plot",
]

_COLOURS = {"improved": BLUE, "regressed": VERMILION, "inconclusive": GREY}


class Span(NamedTuple):
    """A difference and its interval, a line of a forest plot."""

    name: str
    value: float
    low: float
    high: float
    verdict: str
    """``improved``, ``regressed`` or ``inconclusive``."""
    group: bool = False
    documents: int | None = None


def comparison_files(comparison: Comparison, folder: str | os.PathLike[str]) -> dict[str, Path]:
    """Write a comparison as ``comparison.json``, ``comparison.md`` and ``forest.png``.

    The plot is left out where nothing could be tested.

    Returns:
        File name to path of what was written.

    Raises:
        InfrastructureError: The folder cannot be written.
        InputError: matplotlib is not installed.
    """
    place = Path(folder)
    written = {"comparison.json": write_json(place / "comparison.json", comparison.to_json())}
    text = comparison.to_markdown()
    tested = [row for row in comparison.rows if row.headline and row.tested]
    if tested:
        title = f"{comparison.b.label} against {comparison.a.label}"
        written["forest.png"] = forest_plot(tested, place / "forest.png", title=title)
        text += "\n![differences](forest.png)\n"
    return {**written, "comparison.md": write_text(place / "comparison.md", text)}


def forest_plot(
    rows: Sequence[Row],
    path: str | os.PathLike[str],
    *,
    title: str = "",
    names: tuple[str, str] = ("A", "B"),
) -> Path:
    """Draw differences with their intervals, a line a task or group, a panel a metric.

    Args:
        rows: Rows of a comparison; those without a test are left out.
        path: The PNG file.
        title: Heading.
        names: Names of the two arms on the axis.

    Raises:
        ResultError: No row was tested.
        InfrastructureError: The file cannot be written.
        InputError: matplotlib is not installed.
    """
    panels: dict[str, list[Span]] = {}
    headings: dict[str, str] = {}
    for row in rows:
        found = row.result
        if found is None or not math.isfinite(found.stderr):
            continue
        worse = " (lower is better)" if row.higher_is_better is False else ""
        headings.setdefault(
            row.metric, f"{row.metric}{worse}: {names[1]} - {names[0]}, with interval"
        )
        group = row.kind == "group"
        panels.setdefault(headings[row.metric], []).append(
            Span(row.name, found.difference, *found.interval, row.verdict, group, found.documents)
        )
    return span_plot(panels, path, title=title)


def span_plot(
    panels: Mapping[str, Sequence[Span]], path: str | os.PathLike[str], *, title: str = ""
) -> Path:
    """Draw differences with their intervals, a line each, from above in the order given.

    Args:
        panels: What the axis is, to the lines.
        path: The file, PNG or SVG by its suffix.
        title: Heading.

    Raises:
        ResultError: There is nothing to draw.
        InfrastructureError: The file cannot be written.
        InputError: matplotlib is not installed.
    """
    if not panels:
        raise ResultError("nothing to draw: no task was tested on two documents or more")
    sizes = [len(members) for members in panels.values()]
    figure, all_axes = new_panels(
        len(panels), width=9.0, height=1.0 + 0.75 * len(panels) + 0.3 * sum(sizes), ratios=sizes
    )
    for axes, (heading, members) in zip(all_axes, panels.items(), strict=True):
        _forest(axes, members)
        axes.set_xlabel(figure_text(heading, longest=90))
    head_figure(figure, title)
    _legend(figure)
    return save_figure(figure, path)


# -- parts of the figures --------------------------------------------------------------------------


def _forest(axes: Axes, rows: Sequence[Span]) -> None:
    low, high = [], []
    for place, row in enumerate(reversed(rows)):
        colour = _COLOURS[row.verdict]
        axes.plot((row.low, row.high), (place, place), color=colour, linewidth=2, zorder=2)
        axes.plot(
            row.value, place, marker="D" if row.group else "o", color=colour,
            markersize=7 if row.group else 5.5, zorder=3,
        )  # fmt: skip
        count = "" if row.documents is None else f"  n={row.documents}"
        axes.annotate(
            f"{row.value:+.4f}  [{row.low:+.4f}, {row.high:+.4f}]{count}",
            (1.02, place), xycoords=("axes fraction", "data"),
            va="center", fontsize=8, color=colour if row.verdict != "inconclusive" else "black",
            annotation_clip=False,
        )  # fmt: skip
        low.append(min(row.low, 0.0))
        high.append(max(row.high, 0.0))
    axes.axvline(0.0, color="black", linewidth=0.8, zorder=1)
    axes.set_yticks(
        range(len(rows)),
        [figure_text(row.name, longest=40) + " (group)" * row.group for row in reversed(rows)],
        fontsize=8.5,
    )
    axes.set_ylim(-0.6, len(rows) - 0.4)
    margin = 0.05 * ((max(high) - min(low)) or 1.0)
    axes.set_xlim(min(low) - margin, max(high) + margin)
    axes.grid(axis="x", color="#dddddd", linewidth=0.6)
    axes.set_axisbelow(True)


def _legend(figure: Figure) -> None:
    from matplotlib.lines import Line2D

    marks = [Line2D([], [], color=c, marker="o", label=said) for said, c in _COLOURS.items()]
    marks.append(Line2D([], [], color="black", marker="D", linestyle="none", label="group"))
    figure.legend(
        handles=marks, loc="outside lower center", ncols=4, fontsize=8.5, frameon=False
    )  # fmt: skip
