"""Writing a report: one page that asks no network for anything, Markdown, and the figures' files.

Every text from outside is text: the page's template escapes all of it, Markdown has one door
(:func:`act_harness.evidence.tables.markdown_cell`), figures another
(:func:`act_harness.evidence.figures.figure_text`). The page runs no script at all.
"""

from __future__ import annotations

import base64
import csv
import io
import re
from collections.abc import Sequence
from importlib import resources
from pathlib import Path
from typing import Any

from jinja2 import Environment, StrictUndefined

from act_harness._version import __version__
from act_harness.errors import ResultError, one_line
from act_harness.evidence.tables import markdown_cell, markdown_table, visible
from act_harness.exploration.page import asset as page_asset
from act_harness.reports.parts import Figure, Section
from act_harness.support import atomic, places, provenance

__all__ = ["write_report"]

FIGURES = "figures"


def write_report(sections: Sequence[Section], folder: Path, *, title: str) -> list[Path]:
    """Write ``report.html``, ``report.md`` and each figure as PNG, SVG and CSV.

    Returns:
        The files, the page first.

    Raises:
        InfrastructureError: The folder cannot be written to.
        InputError: matplotlib is not installed.
        ResultError: A figure cannot be drawn of what a file holds.
    """
    drawn = [
        [_drawn(one, folder, f"{number}-{one.name}") for one in section.figures]
        for number, section in enumerate(sections, start=1)
    ]
    created = provenance.now()
    page = _page(sections, drawn, folder, title=title, created=created)
    text = _markdown(sections, drawn, title=title, created=created)
    return [
        atomic.write_text(folder / "report.html", page),
        atomic.write_text(folder / "report.md", text),
        *(folder / file for files in drawn for found in files for file in found),
    ]


def _drawn(figure: Figure, folder: Path, name: str) -> tuple[str, ...]:
    """Write a figure's files; return their names below the folder."""
    stem = places.file_name(name)
    files = tuple(f"{FIGURES}/{stem}.{kind}" for kind in ("png", "svg", "csv"))
    places.prepare_folder(folder / FIGURES)
    try:
        for file in files[:2]:
            figure.draw(folder / file)
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        # The file's form was right, its numbers are not: edited, or a later version's.
        raise ResultError(
            f"{figure.title!r} cannot be drawn ({one_line(error, limit=200)}); repeat the command "
            "that wrote its result"
        ) from error
    table = io.StringIO()
    writer = csv.writer(table, lineterminator="\n")
    writer.writerow(figure.columns)
    writer.writerows([_written(cell) for cell in row] for row in figure.rows)
    atomic.write_text(folder / files[2], table.getvalue())
    return files


def _written(cell: Any) -> Any:  # noqa: ANN401 - whatever a figure is drawn from
    # Half a pair of surrogates is no text that a file can hold.
    return cell.encode("utf-8", "backslashreplace").decode() if isinstance(cell, str) else cell


# -- the page --------------------------------------------------------------------------------------


def _page(
    sections: Sequence[Section],
    drawn: Sequence[Sequence[tuple[str, ...]]],
    folder: Path,
    *,
    title: str,
    created: str,
) -> str:
    environment = Environment(autoescape=True, undefined=StrictUndefined)
    environment.filters["visible"] = lambda text: visible(str(text))
    shown = [
        {
            **vars(section),
            "figures": [
                {"title": figure.title, "files": files} | _picture(folder / files[1])
                for figure, files in zip(section.figures, found, strict=True)
            ],
        }
        for section, found in zip(sections, drawn, strict=True)
    ]
    return environment.from_string(_asset("report.html")).render(
        title=title,
        version=__version__,
        created=created,
        sections=shown,
        style=page_asset("page.css") + _asset("report.css"),
    )


def _asset(name: str) -> str:
    return (resources.files("act_harness.reports") / "assets" / name).read_text("utf-8")


_INK = (
    "<style>svg{color:#1b1f24;fill:currentColor}"
    "@media(prefers-color-scheme:dark){svg{color:#e6edf3}}</style>"
)
_COLOURS = {
    "#000000": "currentColor",
    "#444444": "currentColor",
    "#ffffff": "none",
    "#dddddd": "#80808066",
}
"""Of drawings on white, and what they are on the page: its ink, its ground, a grid on either."""


def _picture(file: Path) -> dict[str, Any]:
    """Return a figure for the page: its address with the drawing inside, and its width in pixels.

    Black becomes the page's ink and white its ground, so that it is read in the dark as well.
    """
    text = file.read_text(encoding="utf-8")
    width = re.search(r'<svg [^>]*?width="([\d.]+)pt"', text)
    for drawn, shown in _COLOURS.items():
        text = text.replace(drawn, shown)
    text = re.sub(r"<defs>", f"{_INK}<defs>", text, count=1)
    data = base64.b64encode(text.encode()).decode("ascii")
    points = float(width[1]) if width else 600.0
    return {"picture": f"data:image/svg+xml;base64,{data}", "width": round(points * 4 / 3)}


# -- Markdown --------------------------------------------------------------------------------------


def _markdown(
    sections: Sequence[Section],
    drawn: Sequence[Sequence[tuple[str, ...]]],
    *,
    title: str,
    created: str,
) -> str:
    lines = [f"# {markdown_cell(title)}", "", f"act-harness {__version__}, {created}. Weak figures "
             "come first.", ""]  # fmt: skip
    lines += [
        f"- {markdown_cell(one.title)}: {markdown_cell(one.worst)}" for one in sections if one.worst
    ]
    for section, found in zip(sections, drawn, strict=True):
        lines += ["", f"## {markdown_cell(section.title)}", ""]
        lines += [f"{markdown_cell(line)}  " for line in section.lines]
        for figure, files in zip(section.figures, found, strict=True):
            name = markdown_cell(figure.title)
            others = ", ".join(f"[{file.rpartition('.')[2].upper()}]({file})" for file in files)
            lines += ["", f"![{name}]({files[0]})", "", f"{name}: {others}"]
        for table in section.tables:
            lines += ["", *([markdown_cell(table.caption), ""] if table.caption else [])]
            lines.append(markdown_table(table.header, table.rows, right=table.numbers))
        lines += ["", *(f"- {markdown_cell(note)}" for note in section.notes), ""]
        lines.append(f"Source: {markdown_cell(section.source)}")
    return "\n".join(lines).rstrip() + "\n"
