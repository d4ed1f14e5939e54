"""What a launcher says of this process: alone, or one of several; and which of them speaks.

``torchrun`` and ``accelerate launch`` start the same command several times and tell each process
its number in the environment. The first one prints, shows progress and writes; the others keep
quiet but for what ends them. Nothing here imports torch, so that it can be asked before anything
is: see :mod:`act_harness.support.processes` for what the processes do together.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from act_harness.errors import InputError, one_line

__all__ = ["Launched", "keep_quiet", "launched", "too_few_documents"]


@dataclass(frozen=True)
class Launched:
    """A process's place among those that were started together."""

    rank: int = 0
    """Its number over all machines."""
    count: int = 1
    local: int = 0
    """Its number on this machine, which is that of its GPU."""


def launched() -> Launched:
    """Read this process's place from the environment; alone where no launcher said anything.

    Raises:
        InputError: what is said cannot be: no number, or one beyond the count.
    """
    if "RANK" not in os.environ:  # WORLD_SIZE by itself is left over from something else
        return Launched()
    found = Launched(_number("RANK", 0), _number("WORLD_SIZE", 1), _number("LOCAL_RANK", 0))
    if found.rank >= found.count:
        raise InputError(
            f"RANK is {found.rank} and WORLD_SIZE {found.count}, expected a rank below it; start "
            "processes by torchrun or accelerate launch, or unset both"
        )
    return found


def _number(name: str, default: int) -> int:
    text = os.environ.get(name, "").strip()
    if not text:
        return default
    if not (text.isascii() and text.isdecimal() and len(text) <= 9):
        raise InputError(
            f"{name} is {one_line(repr(text))} in the environment, expected a whole number; start "
            "processes by torchrun or accelerate launch, or unset it"
        )
    return int(text)


def too_few_documents(count: int, *, without: int | None = None) -> InputError:
    """Return the error of a task that has no document for one of the processes.

    Args:
        count: how many processes there are.
        without: number of the one that has none, where it is known.
    """
    which = "" if without is None else f" (process {without} has none)"
    return InputError(
        f"{count} processes were started for a task of fewer documents{which}; start fewer, or "
        "raise --limit"
    )


def keep_quiet() -> Callable[[], None]:
    """Let a process other than the first print nothing: no output, log, warning or progress.

    Returns:
        To be called where an error is to be told: standard error is there again.
    """
    said = sys.stderr
    nothing = Path(os.devnull).open("w", encoding="utf-8")  # noqa: SIM115 - until the process ends
    sys.stdout = sys.stderr = nothing

    def speak() -> None:
        sys.stderr = said

    return speak
