"""Tables in Markdown."""

from __future__ import annotations

import re
from collections.abc import Container, Iterable, Sequence

from act_harness.errors import ResultError

__all__ = ["markdown_cell", "markdown_table"]

_TAG = re.compile(r"<(?=[A-Za-z/!?])")
"""What Markdown passes on as HTML; "< 0.05" is none."""


def markdown_table(
    header: Sequence[str],
    rows: Iterable[Sequence[object]],
    *,
    right: Container[int] | None = None,
    compact: bool = False,
) -> str:
    """Return a table in GitHub's Markdown, with a final newline.

    Args:
        header: Names of the columns.
        rows: Cells; floats are written with four digits, all else as text.
        right: Columns that are aligned to the right; by default those of numbers.
        compact: Write the line below the header without spaces.

    Raises:
        ResultError: A row has another number of cells than the header.
    """
    body = [list(row) for row in rows]
    wrong = next((row for row in body if len(row) != len(header)), None)
    if wrong is not None:
        raise ResultError(f"a row of {len(wrong)} cells for {len(header)} columns: {wrong}")
    columns = range(len(header))
    if right is None:
        right = [i for i in columns if body and all(isinstance(r[i], (int, float)) for r in body)]
    rule = ["--:" if i in right else "---" for i in columns]
    lines = [" | ".join(map(markdown_cell, row)) for row in [header, *body]]
    lines = [f"| {line} |\n" for line in lines]
    lines.insert(1, "|" + "|".join(rule) + "|\n" if compact else "| " + " | ".join(rule) + " |\n")
    return "".join(lines)


def markdown_cell(value: object) -> str:
    """Return a value as text that neither ends a cell nor its line, nor begins an HTML element."""
    text = f"{value:.4f}" if isinstance(value, float) else str(value)
    return _TAG.sub(r"\\<", text.replace("|", "\\|").replace("\n", " "))
