"""Tables in Markdown."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from act_harness.errors import ResultError

__all__ = ["markdown_table"]


def markdown_table(header: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    """Return a table in GitHub's Markdown; numbers are aligned to the right.

    Raises:
        ResultError: A row has another number of cells than the header.
    """
    body = [list(row) for row in rows]
    wrong = next((row for row in body if len(row) != len(header)), None)
    if wrong is not None:
        raise ResultError(f"a row of {len(wrong)} cells for {len(header)} columns: {wrong}")
    numeric = [
        bool(body) and all(isinstance(row[i], (int, float)) for row in body)
        for i in range(len(header))
    ]
    lines = [list(header), ["--:" if right else "---" for right in numeric]]
    lines += [[_cell(cell) for cell in row] for row in body]
    return "".join("| " + " | ".join(line) + " |\n" for line in lines)


def _cell(value: object) -> str:
    text = f"{value:.4f}" if isinstance(value, float) else str(value)
    return text.replace("|", "\\|").replace("\n", " ")
