"""Whether a number that a user gave can be used: each rule once, for every command.

The classes of settings call these when they are made, so that the command line and the Python API
refuse the same values in the same words, before a model or a data set is touched.
"""

from __future__ import annotations

import math

from act_harness.errors import InputError, one_line

__all__ = [
    "LARGEST_SEED",
    "check_batch_size",
    "check_count",
    "check_kind",
    "check_limit",
    "check_seed",
    "check_share",
]

LARGEST_SEED = 2**32 - 1  # numpy's
_LARGEST_COUNT = 10**12


def check_kind(value: object, kind: type, name: str) -> None:
    """Refuse an argument of a function that is of another kind than it takes.

    Raises:
        InputError: It is.
    """
    if not isinstance(value, kind):
        raise InputError(
            f"{name} was given as {type(value).__name__}, expected {kind.__name__}; make one of "
            f"its fields: {kind.__name__}(...)"
        )


def check_limit(limit: float | None, name: str = "--limit") -> None:
    """Refuse a limit that is neither a share below 1 nor a whole number of documents.

    Raises:
        InputError: It is not.
    """
    if limit is None:
        return
    usable = _is_number(limit) and math.isfinite(limit) and 0 < limit <= _LARGEST_COUNT
    if not usable or (limit >= 1 and limit != int(limit)):
        raise InputError(
            f"{name} is {one_line(str(limit))}, expected a whole number of documents of 1 or more, "
            "or a share of them above 0 and below 1"
        )


def check_count(value: int | None, name: str, *, least: int = 0) -> None:
    """Refuse what is no whole number of ``least`` or more; None stands for "not given".

    Raises:
        InputError: It is not.
    """
    whole = isinstance(value, int) and not isinstance(value, bool)
    if value is not None and not (whole and least <= value <= _LARGEST_COUNT):
        raise InputError(
            f"{name} is {one_line(_text(value))}, expected a whole number of {least} or more"
        )


def check_seed(seed: int | None, name: str = "--seed") -> None:
    """Refuse what numpy takes for no seed; None stands for "not given".

    Raises:
        InputError: It is not.
    """
    whole = isinstance(seed, int) and not isinstance(seed, bool)
    if seed is not None and not (whole and 0 <= seed <= LARGEST_SEED):
        raise InputError(
            f"{name} is {one_line(_text(seed))}, expected a whole number from 0 to {LARGEST_SEED}"
        )


def check_share(value: float, name: str) -> None:
    """Refuse what does not lie between 0 and 1, the ends left out.

    Raises:
        InputError: It does not.
    """
    if not (_is_number(value) and 0 < value < 1):  # nan fails both
        raise InputError(f"{name} is {one_line(_text(value))}, expected a number between 0 and 1")


def check_batch_size(size: int | str | None, name: str = "--batch-size") -> None:
    """Refuse what is neither a number above 0 nor ``auto`` or ``auto:N``; None: not given.

    Raises:
        InputError: It is not.
    """
    if size is None:
        return
    text = _text(size)
    kind, colon, times = text.partition(":")
    number = times if kind == "auto" and colon else "1" if kind == "auto" else text
    counts = number.isascii() and number.isdecimal() and len(number) <= 9 and int(number) > 0
    if isinstance(size, bool) or not counts:
        raise InputError(f"{name} is {one_line(repr(text))}, expected a number above 0, or 'auto'")


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _text(value: object) -> str:
    try:
        return str(value)
    except ValueError:  # Python refuses to print an integer of more than 4,300 digits
        return "a number of thousands of digits"
