"""The figure of a count of sinks: where they stand, in which layers, on which tokens.

Not here: any number. They come from :class:`act_harness.exploration.sinks.SinkStatistics`, whose
tables are the data of each panel.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from act_harness.evidence.figures import (
    BLUE,
    GREY,
    VERMILION,
    figure_text,
    new_figure,
    save_figure,
)

if TYPE_CHECKING:
    from matplotlib.axes import Axes

__all__ = ["draw_sinks"]

_PUBLISHED, _ENOUGH_ROWS, _FIRST = VERMILION, BLUE, GREY
_SHOWN_TOKENS = 15

Rows = Sequence[Mapping[str, Any]]


def draw_sinks(tables: Mapping[str, Rows], path: Path, *, title: str) -> Path:
    """Draw four panels: sinks by position, by layer, masses by layer, and the tokens with most.

    Args:
        tables: ``positions``, ``heads`` and ``tokens``, as they are written.
        path: the file, PNG or SVG by its suffix.
        title: heading.

    Raises:
        InputError: matplotlib is not installed.
        InfrastructureError: the file cannot be written.
    """
    figure = new_figure(width=11.0, height=8.0)
    (positions, layers), (masses, tokens) = figure.subplots(2, 2)
    figure.suptitle(figure_text(title, longest=100))
    _positions(positions, tables["positions"])
    _layers(layers, masses, tables["heads"])
    _tokens(tokens, tables["tokens"][:_SHOWN_TOKENS])
    return save_figure(figure, path)


def _positions(axes: Axes, rows: Rows) -> None:
    middle = [(row["from"] + row["to"]) / 2 for row in rows]
    for name, label, colour in (
        ("flags", "min_rows 1 (published)", _PUBLISHED),
        ("flags_min_rows_auto", "min_rows auto", _ENOUGH_ROWS),
    ):
        axes.plot(middle, [row[name] for row in rows], marker="o", color=colour, label=label)
    axes.set(xlabel="position / length", ylabel="sinks, all heads and documents", ylim=(0, None))
    axes.legend(frameon=False)


def _layers(counts: Axes, masses: Axes, rows: Rows) -> None:
    layers = np.array([row["layer"] for row in rows])
    numbers = np.unique(layers)

    def mean(name: str) -> list[float]:
        values = np.array([row[name] for row in rows])
        return [float(values[layers == layer].mean()) for layer in numbers]

    for axes, names in (
        (counts, (("sinks", "min_rows 1 (published)", _PUBLISHED),
                  ("sinks_min_rows_auto", "min_rows auto", _ENOUGH_ROWS))),
        (masses, (("mass_on_sinks", "on sinks", _PUBLISHED),
                  ("mass_on_first_token", "on the first token", _FIRST))),
    ):  # fmt: skip
        for name, label, colour in names:
            axes.plot(numbers, mean(name), marker="o", color=colour, label=label)
        axes.set(xlabel="layer", ylim=(0, None))
        axes.locator_params(axis="x", integer=True)
        axes.legend(frameon=False)
    counts.set_ylabel("sinks a head and document")
    masses.set_ylabel("share of attention")


def _tokens(axes: Axes, rows: Rows) -> None:
    names = [figure_text(ascii(row["text"])[1:-1], longest=20) for row in rows]
    axes.barh(range(len(rows)), [row["share_of_flags"] for row in rows], color=_PUBLISHED)
    axes.set_yticks(range(len(rows)), [f"'{name}'" for name in names])
    axes.invert_yaxis()
    axes.set_xlabel("share of all sinks (min_rows as calibrated)")
