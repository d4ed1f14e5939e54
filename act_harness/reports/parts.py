"""What a report is made of: sections of text, tables and figures, each figure with its data."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

__all__ = ["Figure", "Section", "Table"]


@dataclass(frozen=True)
class Table:
    """One table; cells are shown as text."""

    header: Sequence[str]
    rows: Sequence[Sequence[str]]
    numbers: Collection[int] = ()
    """Columns that are aligned to the right."""
    verdicts: Sequence[str] = ()
    """Of each row, what it says: ``improved``, ``regressed`` or anything else; empty: of none."""
    caption: str = ""


@dataclass(frozen=True)
class Figure:
    """One figure and its data."""

    name: str
    """What its files are called, without a suffix."""
    title: str
    """What it shows, for who does not see it."""
    draw: Callable[[Path], object]
    """Writes the file, PNG or SVG by its suffix."""
    columns: Sequence[str]
    rows: Sequence[Sequence[Any]]
    """The data as its CSV file holds it."""


@dataclass(frozen=True)
class Section:
    """What one result says."""

    title: str
    source: str
    """The file that it was read from."""
    lines: Sequence[str] = ()
    """What it says in words, the most important first."""
    figures: Sequence[Figure] = ()
    tables: Sequence[Table] = ()
    notes: Sequence[str] = ()
    """Legends, and what a reader should know."""
    worst: str = ""
    """The weakest figure in a line, for the head of the report; empty: none."""
    order: float = 0.0
    """The smaller, the further up among sections of its kind."""
