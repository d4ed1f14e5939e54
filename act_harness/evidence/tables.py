"""Text in reports: tables in Markdown, in which every value is shown as the text that it is.

Names of tasks, models and files come from outside. What our own code means as Markdown (a bold
verdict, a link) says so by its type, :class:`Markup`; all else is text.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Container, Iterable, Sequence

from act_harness.errors import ResultError

__all__ = ["Markup", "markdown_cell", "markdown_table", "p_value_text", "visible"]

_MARKS = re.compile(
    r"""
    \\(?=[!-/:-@\[-`{-~]|$)          # escapes what follows; a Windows path is left as it is
    | <(?=[A-Za-z/!?])                # HTML and addresses; "< 0.05" is none
    | &(?=\#?\w+;)                    # a character by its name
    | (?<=\])[(\[]                    # what makes a link or a picture of brackets
    | [`|$]                           # code, the end of a cell, formulas
    | \*(?=\S) | (?<=\S)\*            # emphasis; "acc *" is none
    | (?P<none>(?<=[^\W_])_+(?=[^\W_])) # within a word it is none: act_sst2
    | _(?=\S) | (?<=\S)_
    | ~(?=\S) | (?<=\S)~              # struck out
    """,
    re.VERBOSE,
)
"""What Markdown takes for more than text, within a line."""
_NOT_SEEN = "\u034f\u115f\u1160\u17b4\u17b5\u3164\uffa0"
_SELECTORS = range(0xFE00, 0xFE10)


class Markup(str):
    """Markdown that our own code wrote; in a table it is not escaped."""

    __slots__ = ()


def visible(text: str) -> str:
    """Return a text in one line, its invisible characters written out by their number.

    Those are controls, marks of direction, spaces other than the common one and halves of pairs;
    ends of lines become spaces.
    """
    return "".join(
        one if _is_seen(one) else f"\u27e8U+{ord(one):04X}\u27e9"
        for one in re.sub(r"\r\n?|\n", " ", text)
    )


def _is_seen(one: str) -> bool:
    if one == " " or "!" <= one <= "~":
        return True
    hidden = unicodedata.category(one)[0] in "CZ" or one in _NOT_SEEN or ord(one) in _SELECTORS
    return not hidden


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
        rows: Cells; floats are written with four digits, :class:`Markup` as it is, all else as
            text (:func:`markdown_cell`).
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
    """Return a value as text of one line that no reader of Markdown takes for more than text.

    For cells of tables, and for every place in a line of a report; :class:`Markup` is left as it
    is, but for what would end the cell.
    """
    if isinstance(value, Markup):
        return re.sub(r"[|]", r"\\|", value.replace("\n", " "))
    text = f"{value:.4f}" if isinstance(value, float) else visible(str(value))
    return _MARKS.sub(_escaped, text)


def p_value_text(value: float, *, digits: int = 4) -> str:
    """Return a p-value; one that would be shown as 0, which none is, by its power of ten."""
    return f"{value:.{digits}f}" if value >= 10**-digits else f"{value:.0e}"


def _escaped(mark: re.Match[str]) -> str:
    if mark["none"]:
        return mark[0]
    # An entity cannot be escaped by a backslash everywhere.
    return "&amp;" if mark[0] == "&" else f"\\{mark[0]}"
