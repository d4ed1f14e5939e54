"""What an interrupted user is told: what is on the disk already.

Ctrl-C stays a ``KeyboardInterrupt`` for whoever calls this package; it only learns what was saved.
The command line adds the command to go on with, and exit code 130 (143 where it was ended by
SIGTERM, as shells count).
"""

from __future__ import annotations

import math
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType

__all__ = ["Interrupted", "Terminated", "saved", "unwind_on_signals", "unwinds_on_signals"]


class Interrupted(KeyboardInterrupt):
    """Ctrl-C; the text says what was saved."""

    signal = signal.SIGINT


class Terminated(Interrupted):
    """The same by SIGTERM."""

    signal = signal.SIGTERM


@contextmanager
def saved(describe: Callable[[], str]) -> Iterator[None]:
    """Let an interrupt of the block say what is kept.

    Args:
        describe: Called when it happens; what is on the disk by then, for people.

    Raises:
        Interrupted: In place of ``KeyboardInterrupt``.
    """
    try:
        yield
    except KeyboardInterrupt as error:
        if isinstance(error, Interrupted) and str(error):
            raise  # a block within this one knows better
        kind = type(error) if isinstance(error, Interrupted) else Interrupted
        raise kind(describe()) from error


_ONE_PRESS = 0.5
"""Seconds in which further signals belong to the first: what unwinds by then is let through."""


class _Stop:
    """What Ctrl-C and SIGTERM do to the process of a command."""

    def __init__(self) -> None:
        self.process = os.getpid()
        self.last = -math.inf
        self.told = False

    def __call__(self, number: int, frame: FrameType | None) -> None:
        if os.getpid() != self.process:  # a child that was forked keeps the system's behaviour
            if number == signal.SIGINT:
                signal.default_int_handler(number, frame)
            return _die_by(number)
        since, self.last = time.monotonic() - self.last, time.monotonic()
        if since < _ONE_PRESS:
            return None
        if self.told:
            return _die_by(number)
        raise Terminated if number == signal.SIGTERM else Interrupted


def _die_by(number: int) -> None:
    signal.signal(number, signal.SIG_DFL)
    os.kill(os.getpid(), number)


def unwind_on_signals() -> Callable[[], None]:
    """Let Ctrl-C and SIGTERM unwind this process, so that what is under way is kept.

    A scheduler's SIGTERM would otherwise end it on the spot, and a second Ctrl-C at once behind the
    first (a key held down; a terminal and a launcher that both pass it on) would break into what
    the first has begun to tidy up. One that comes later still raises: it ends a wait.

    Returns:
        To be called when all is said and the process only has to exit; a signal then ends it on the
        spot, as no one is left to catch an exception.
    """
    stop = _Stop()
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, stop)
        if signal.getsignal(signal.SIGINT) is signal.default_int_handler:  # not behind nohup
            signal.signal(signal.SIGINT, stop)

    def told() -> None:
        stop.told = True

    return told


def unwinds_on_signals() -> bool:
    """Whether this is the process of a command, which a signal unwinds and which ends its own way.

    See :func:`unwind_on_signals`.
    """
    return isinstance(signal.getsignal(signal.SIGTERM), _Stop)
