"""Warnings of this package as a command says them: a line each, without file and source line.

Python shows where a warning was raised and the code that raised it, which is for who wrote the
code. Warnings of other packages keep that form: their file says whose they are.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

__all__ = ["plain_warnings"]

_PACKAGE = Path(__file__).resolve().parents[1]


@contextmanager
def plain_warnings() -> Iterator[None]:
    """Show this package's warnings as ``warning: TEXT`` inside the block."""
    usual = warnings.formatwarning

    def shown(
        message: Warning | str,
        category: type[Warning],
        filename: str,
        lineno: int,
        line: str | None = None,
    ) -> str:
        if _PACKAGE in Path(filename).resolve().parents:
            return f"warning: {message}\n"
        return usual(message, category, filename, lineno, line)

    warnings.formatwarning = shown
    try:
        yield
    finally:
        warnings.formatwarning = usual
