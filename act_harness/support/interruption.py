"""What an interrupted user is told: what is on the disk already.

Ctrl-C stays a ``KeyboardInterrupt`` for whoever calls this package; it only learns what was saved.
The command line adds the command to go on with, and exit code 130 (143 where it was ended by
SIGTERM, as shells count).
"""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType

__all__ = ["Interrupted", "Terminated", "end_like_ctrl_c", "saved"]


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


def end_like_ctrl_c() -> None:
    """Let SIGTERM unwind this process as Ctrl-C does, so that what is under way is kept.

    A scheduler's SIGTERM would otherwise end it on the spot. Processes that this one forks keep the
    system's own behaviour.
    """
    process = os.getpid()

    def stop(number: int, _: FrameType | None) -> None:
        if os.getpid() != process:
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)
        raise Terminated

    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, stop)
