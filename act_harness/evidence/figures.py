"""Every figure's canvas: made without a display, with no global state of matplotlib, written whole.

Equal input gives an equal file. matplotlib is the extra ``report``.
"""

from __future__ import annotations

import io
import os
import unicodedata
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

from act_harness.errors import InputError, install_command
from act_harness.evidence.tables import visible
from act_harness.support.atomic import write_bytes

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = [
    "BLUE",
    "GREY",
    "PALETTE",
    "VERMILION",
    "figure_text",
    "head_figure",
    "new_figure",
    "new_panels",
    "require_matplotlib",
    "save_figure",
]

BLUE, VERMILION, GREY = "#0072B2", "#D55E00", "#767676"
PALETTE = (BLUE, VERMILION, "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
"""Of Okabe and Ito: told apart by colour-blind readers and in print."""

_LONGEST = 60


def figure_text(text: str, *, longest: int = _LONGEST) -> str:
    """Return a name from outside as a figure can draw it.

    What the font may lack is written out by its number, a dollar is no formula, and of a long text
    both ends are kept, in which names of one kind differ.
    """
    drawn = "".join(
        one
        if one.isascii() or unicodedata.name(one, "").startswith(_DRAWN)
        else f"\\u{ord(one):04x}"
        for one in visible(text).replace("\u27e8", "<").replace("\u27e9", ">")
    )
    if len(drawn) > longest:
        drawn = f"{drawn[: longest * 2 // 3]}...{drawn[-(longest // 3 - 3) :]}"
    return drawn.replace("$", r"\$")


_DRAWN = ("LATIN ", "GREEK ", "CYRILLIC ")
"""Letters of matplotlib's own font, which also has what is below U+0100."""


def head_figure(figure: Figure, title: str, note: str = "") -> None:
    """Write a title, which may hold names from outside, and a note of our own above a figure."""
    text = "\n".join(part for part in (figure_text(title, longest=100), note) if part)
    if text:
        figure.suptitle(text, fontsize=10.5)


def require_matplotlib() -> None:
    """Refuse to draw without matplotlib; what takes long before it draws asks at its start.

    Raises:
        InputError: matplotlib is not installed.
    """
    if find_spec("matplotlib") is None:
        raise InputError(
            f"plots need matplotlib, which is not installed; run: {install_command('report')}"
        )


def new_figure(*, width: float, height: float, dots: int = 150) -> Figure:
    """Return an empty figure.

    Args:
        width: In inches.
        height: In inches.
        dots: Dots per inch of its file.

    Raises:
        InputError: matplotlib is not installed.
    """
    require_matplotlib()
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), dpi=dots, layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def save_figure(figure: Figure, path: str | os.PathLike[str]) -> Path:
    """Write a figure as PNG, or as SVG where the file's name ends so.

    Raises:
        InfrastructureError: The file cannot be written.
    """
    from matplotlib import rc_context

    buffer = io.BytesIO()
    # No version, date or drawn name inside: equal input gives an equal file.
    if Path(path).suffix == ".svg":
        with rc_context({"svg.hashsalt": "act-harness"}):
            figure.savefig(buffer, format="svg", metadata={"Date": None, "Creator": None})
    else:
        figure.savefig(buffer, format="png", metadata={"Software": None})
    return write_bytes(path, buffer.getvalue())


def new_panels(
    panels: int,
    *,
    width: float,
    height: float,
    ratios: Sequence[int] | None = None,
    row: bool = False,
) -> tuple[Figure, list[Axes]]:
    """Return a figure of its own and its panels, below or (``row``) beside each other."""
    figure = new_figure(width=width, height=height)
    shape = (1, panels) if row else (panels, 1)
    grid = figure.subplots(*shape, squeeze=False, height_ratios=None if row else ratios)
    axes: list[Axes] = list(grid.ravel())
    for one in axes:
        one.spines[["top", "right"]].set_visible(False)
    return figure, axes
