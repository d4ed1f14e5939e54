"""Options of the benchmarks that read their own command line.

argparse alone: these run where typer may be missing. A wrong option is one line and exit code 2.
"""

from __future__ import annotations

import argparse
import math
from typing import NoReturn

from act_harness.errors import InputError, one_line
from act_harness.support.model_arguments import check_device, check_dtype

__all__ = [
    "Arguments", "read_count", "read_counts", "read_device", "read_dtype", "read_dtypes",
    "read_shapes", "read_share",
]  # fmt: skip

_LONGEST = 9  # digits; memory ends long before


class Arguments(argparse.ArgumentParser):
    """A parser that complains in one line, as the other commands do."""

    def error(self, message: str) -> NoReturn:
        """End with exit code 2 and one line."""
        self.exit(2, f"act-harness: {one_line(message)}; see `{self.prog} --help`\n")


def read_count(text: str) -> int:
    """Read a whole number of 1 or more."""
    if not (text.isascii() and text.isdecimal() and len(text) <= _LONGEST and int(text) > 0):
        raise argparse.ArgumentTypeError(f"found {text!r}, expected a whole number above 0")
    return int(text)


def read_counts(text: str) -> list[int]:
    """Read whole numbers with commas between them; 0 counts, as the number of a layer."""
    parts = text.split(",")
    if not all(p.isascii() and p.isdecimal() and len(p) <= _LONGEST for p in parts):
        raise argparse.ArgumentTypeError(
            f"found {text!r}, expected whole numbers with commas between them"
        )
    return [int(part) for part in parts]


def read_shapes(text: str) -> list[tuple[int, int]]:
    """Read pairs such as ``4x2048,1x8192``."""
    found = []
    for part in text.split(","):
        pair = part.split("x")
        if len(pair) != 2:
            raise argparse.ArgumentTypeError(f"found {part!r}, expected a pair such as 4x2048")
        try:
            found.append((read_count(pair[0]), read_count(pair[1])))
        except argparse.ArgumentTypeError as error:
            raise argparse.ArgumentTypeError(f"in {part!r}: {error}") from None
    return found


def read_share(text: str) -> float:
    """Read a number above 0 and not above 1."""
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not 0 < value <= 1:
        raise argparse.ArgumentTypeError(f"found {text!r}, expected a share above 0, at most 1")
    return value


def read_dtype(text: str) -> str:
    """Read the name of a floating type of torch."""
    try:
        check_dtype(text)
    except InputError as error:
        raise argparse.ArgumentTypeError(str(error)) from None
    if text == "auto":
        raise argparse.ArgumentTypeError("found 'auto', expected the name of a type: float32")
    return text


def read_dtypes(text: str) -> list[str]:
    """Read names of types with commas between them."""
    return [read_dtype(name) for name in text.split(",")]


def read_device(text: str) -> str:
    """Read a device's name; one that this machine lacks is an InfrastructureError."""
    try:
        check_device(text)
    except InputError as error:
        raise argparse.ArgumentTypeError(str(error)) from None
    return text
