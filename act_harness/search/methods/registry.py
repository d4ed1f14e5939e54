"""Every method by its name; a new one is a line here."""

from __future__ import annotations

import fnmatch
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from act_harness.errors import InputError, unknown_name
from act_harness.search.methods.one_strength import OneStrength
from act_harness.search.methods.opposite import OppositeStrengths
from act_harness.search.methods.random_heads import RANDOM_HEADS
from act_harness.search.methods.shuffled import ShuffledStrengths
from act_harness.search.methods.single import SINGLE
from act_harness.search.methods.tuned import TUNED
from act_harness.search.methods.untouched import Untouched

if TYPE_CHECKING:
    from act_harness.search.methods.context import Method

__all__ = ["METHODS", "chosen_methods"]

_ALL: tuple[Method, ...] = (
    Untouched(),
    *SINGLE,
    *TUNED,
    *RANDOM_HEADS,
    ShuffledStrengths(),
    OppositeStrengths(),
    OneStrength(),
)

METHODS: Mapping[str, Method] = {one.name: one for one in _ALL}
"""The order is that of the table; the first is what the others are compared with."""


def chosen_methods(given: Sequence[str]) -> tuple[Method, ...]:
    """Return the methods of some names or patterns, in the order of the table, ``none`` first.

    Args:
        given: names, or patterns as ``random-heads-*``; none: all methods.

    Raises:
        InputError: a name or pattern is that of no method.
    """
    wanted = {"none"}
    for pattern in given or ("*",):
        found = fnmatch.filter(METHODS, pattern)
        if not found:
            raise InputError(unknown_name(f"method {pattern!r}", pattern, METHODS))
        wanted.update(found)
    if wanted == {"none"}:
        raise InputError("--methods names 'none' alone, expected another method to compare with it")
    return tuple(method for name, method in METHODS.items() if name in wanted)
