"""Plots of a report over several results: both arms' scores by task, and measurements as bars.

Not here: any number (they come from the caller), and differences with their intervals
(:func:`act_harness.evidence.plots.span_plot`).
"""

from __future__ import annotations

import math
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from act_harness.errors import ResultError
from act_harness.evidence.figures import (
    GREY,
    PALETTE,
    figure_text,
    head_figure,
    new_figure,
    save_figure,
)

__all__ = ["Score", "bar_plot", "score_plot"]

# Grey for the arm that is untouched, then Okabe and Ito.
_COLOURS = (GREY, *PALETTE)
_BAR_COLOURS = ("#0072B2", "#E69F00", "#009E73", "#CC79A7", "#56B4E9")


class Score(NamedTuple):
    """One run's score of a task; the ends are None where its interval is not known."""

    task: str
    run: str
    value: float
    low: float | None
    high: float | None


def score_plot(
    panels: Mapping[str, Sequence[Score]], path: str | os.PathLike[str], *, title: str = ""
) -> Path:
    """Draw scores with their intervals: a panel a metric, a line a task, a colour a run.

    Args:
        panels: Metric to scores, tasks from above in the order given.
        path: The file, PNG or SVG by its suffix.
        title: Heading.

    Raises:
        ResultError: There is nothing to draw.
        InfrastructureError: The file cannot be written.
        InputError: matplotlib is not installed.
    """
    if not panels:
        raise ResultError("nothing to draw: no run has a score")
    tasks = {metric: list(dict.fromkeys(one.task for one in own)) for metric, own in panels.items()}
    runs = list(dict.fromkeys(one.run for own in panels.values() for one in own))
    step = 0.8 / max(2, len(runs))
    sizes = [len(names) for names in tasks.values()]
    height = 1.2 + 0.75 * len(panels) + (0.2 + 0.14 * len(runs)) * sum(sizes)
    figure = new_figure(width=8.0, height=height)
    grid = figure.subplots(len(panels), 1, squeeze=False, height_ratios=sizes)
    for axes, (metric, own) in zip(grid.ravel(), panels.items(), strict=True):
        places = {name: place for place, name in enumerate(reversed(tasks[metric]))}
        for one in own:
            number = runs.index(one.run)
            place = places[one.task] + step * ((len(runs) - 1) / 2 - number)
            colour = _COLOURS[number % len(_COLOURS)]
            if one.low is not None and one.high is not None:
                axes.plot((one.low, one.high), (place, place), color=colour, linewidth=2)
            axes.plot(one.value, place, marker="o", markersize=5, color=colour)
        axes.set_yticks(
            range(len(places)), [figure_text(n, longest=40) for n in reversed(tasks[metric])]
        )
        axes.set_ylim(-0.6, len(places) - 0.4)
        axes.set_xlabel(figure_text(metric))
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(axis="x", color="#b8b8b8", linewidth=0.4)
    for number, run in enumerate(runs):
        colour = _COLOURS[number % len(_COLOURS)]
        grid[0, 0].plot([], [], color=colour, marker="o", label=figure_text(run))
    figure.legend(loc="outside lower center", ncols=min(2, len(runs)), fontsize=8.5, frameon=False)
    head_figure(figure, title)
    return save_figure(figure, path)


class Bar(NamedTuple):
    """One measured value."""

    name: str
    """What was measured."""
    series: str
    """Which variant, or which column."""
    value: float


def bar_plot(
    bars: Sequence[tuple[str, str, float]],
    path: str | os.PathLike[str],
    *,
    label: str,
    title: str = "",
    reference: float | None = None,
) -> Path:
    """Draw measurements as bars side by side, those of one name together.

    Args:
        bars: Name, series and value of each, names from above in the order given.
        path: The file, PNG or SVG by its suffix.
        label: What the values are.
        title: Heading.
        reference: A value that all are held against; marked.

    Raises:
        ResultError: There is nothing to draw.
        InfrastructureError: The file cannot be written.
        InputError: matplotlib is not installed.
    """
    given = [Bar(*one) for one in bars if math.isfinite(one[2])]
    if not given:
        raise ResultError("nothing to draw: nothing was measured")
    names = list(dict.fromkeys(one.name for one in given))
    series = list(dict.fromkeys(one.series for one in given))
    thick = 0.8 / len(series)
    figure = new_figure(width=8.0, height=1.4 + (0.16 + 0.18 * len(series)) * len(names))
    axes = figure.subplots()
    places = {name: place for place, name in enumerate(reversed(names))}
    for number, one in enumerate(series):
        own = [bar for bar in given if bar.series == one]
        at = [places[bar.name] + thick * ((len(series) - 1) / 2 - number) for bar in own]
        drawn = axes.barh(
            at, [bar.value for bar in own], height=0.9 * thick, label=figure_text(one),
            color=_BAR_COLOURS[number % len(_BAR_COLOURS)],
        )  # fmt: skip
        axes.bar_label(drawn, fmt="%.3g", fontsize=7.5, padding=2)
    if reference is not None:
        axes.axvline(reference, color="black", linewidth=0.8)
    axes.set_yticks(range(len(names)), [figure_text(name, longest=40) for name in reversed(names)])
    axes.set_xlabel(figure_text(label))
    axes.spines[["top", "right"]].set_visible(False)
    axes.margins(x=0.08)
    if len(series) > 1:
        figure.legend(loc="outside lower center", ncols=3, fontsize=8.5, frameon=False)
    head_figure(figure, title)
    return save_figure(figure, path)
