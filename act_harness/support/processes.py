"""Several processes on one piece of work: which one this is, and where they wait for each other.

``torchrun`` or ``accelerate launch`` starts them (:mod:`act_harness.support.launcher`); they share
the requests of an evaluation or the measurements of a search. What they tell each other is small
(counters, sums over heads, numbers of requests), so all of it goes through the CPU and gloo, also
where the models are on GPUs: a process that ends closes its connections, and those that wait for
it know at once. NCCL would let them wait for minutes and then end them with pages of its own.

gloo answers from threads of its own, which let go of their tensors only after the answer is there.
Where such a tensor is Python's and Python has begun to end, that aborts the process (SIGABRT), so a
process that has waited for others leaves them before: :func:`end` in a command, which does not let
Python end at all, and an ``atexit`` function in any other program.
"""

from __future__ import annotations

import atexit
import os
import re
import sys
import threading
import traceback
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from datetime import timedelta
from queue import SimpleQueue
from typing import Any, Protocol, TypeVar

import torch

from act_harness.errors import InfrastructureError, InputError, one_line
from act_harness.support.interruption import unwinds_on_signals
from act_harness.support.launcher import launched
from act_harness.support.provenance import sha256_text

__all__ = ["Processes", "end", "leave_word"]

_LONGEST_WAIT = timedelta(days=2)
"""Of one process for another. One that ends is noticed at once; this is for a machine that vanished
without a word, and must not end a run whose first process has more to do than the others."""

_LONGEST_START = timedelta(minutes=15)
"""Until all processes are there, the last of which may still read its tasks' data."""


_boards: list[Any] = []
"""Where processes that have met leave word for one another: torch's store."""


_Found = TypeVar("_Found")


class _Rereadable(Protocol):
    def reload(self) -> None:
        """Read what other processes have written."""


@dataclass(frozen=True)
class Processes:
    """This process among its equals; started by ``accelerate launch`` or ``torchrun``."""

    rank: int = 0
    count: int = 1
    group: Any = None
    """torch's group of those that take part; None: all of them."""

    @classmethod
    def here(cls) -> Processes:
        """Read the process group that is set up, or be alone."""
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            return cls(torch.distributed.get_rank(), torch.distributed.get_world_size())
        return cls()

    @classmethod
    def join(cls) -> Processes:
        """Meet the other processes that a launcher has started; alone where there are none.

        On GPUs each process takes the one of its number on this machine.

        Raises:
            InfrastructureError: there are more processes on this machine than GPUs, or the others
                cannot be reached.
            InputError: the launcher's environment cannot be read, or names no place to meet.
        """
        place = launched()
        if place.count == 1 or torch.distributed.is_initialized():
            return cls.here()
        gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
        if gpus and place.local >= gpus:
            raise InfrastructureError(
                f"process {place.local + 1} on this machine found {gpus} GPUs; start as many "
                "processes as there are GPUs (--nproc-per-node)"
            )
        if gpus:
            torch.cuda.set_device(place.local)
        from torch.distributed.rendezvous import rendezvous  # not there in every build of torch

        def meet() -> None:
            store, rank, count = next(rendezvous("env://", timeout=_LONGEST_START))
            _boards[:] = [store]
            torch.distributed.init_process_group(  # NCCL begins with its first use, none of ours
                "cpu:gloo,cuda:nccl" if gpus else "gloo",
                store=store, rank=rank, world_size=count, timeout=_LONGEST_WAIT,
            )  # fmt: skip

        _check_address()
        _wait(meet, interruptible=True)  # others may not come for minutes
        return cls.here()

    def first(self, count: int) -> Processes | None:
        """Go on with the first ``count`` processes; None in one that is left out.

        Every process must call this.
        """
        if count >= self.count:
            return self
        group = _wait(
            lambda: torch.distributed.new_group(range(count), backend="gloo", timeout=_LONGEST_WAIT)
        )
        return Processes(self.rank, count, group) if self.rank < count else None

    def read_together(self, ledger: _Rereadable) -> None:
        """Read what all processes have written; none writes on before all have read.

        Work is split by what the ledger lacks, so every process must see the same lines: one that
        read late, when another was already writing the next units, would split it differently.
        """
        self.meet()
        ledger.reload()
        self.meet()

    def sum_together(self, values: torch.Tensor) -> None:
        """Add up a tensor over all processes, in place; each gets the same sum."""
        if self.count > 1:
            # A copy: gloo may write on behind an interrupt. Made here, where an error of the device
            # that comes up is told as what it is.
            total = values.detach().cpu().clone()
            _wait(lambda: torch.distributed.all_reduce(total, group=self.group))
            values.copy_(total)

    def gather(self, value: Any) -> list[Any]:  # noqa: ANN401 - anything that can be pickled
        """Return what each process gave, in their order."""
        if self.count == 1:
            return [value]
        found: list[Any] = [None] * self.count
        _wait(lambda: torch.distributed.all_gather_object(found, value, group=self.group))
        return found

    def meet(self) -> None:
        """Wait until all processes are here."""
        if self.count > 1:  # a barrier of torch's own would be NCCL's on GPUs
            _wait(lambda: torch.distributed.all_reduce(torch.zeros(1), group=self.group))


def leave_word(text: str) -> bool | None:
    """Note that this process tells a line that ends the run.

    Returns:
        Whether it is the first to do so; None where the processes have not met, so that what one
        finds about the command all others find, too.
    """
    if not _boards:
        return None
    if _still_waiting():  # behind an interrupt; it may hold the board
        return True
    try:
        return bool(_boards[0].add(f"told {sha256_text(text)}", 1) == 1)
    except RuntimeError:  # the process that kept it is gone, and may have gone without a word
        return True


def _check_address() -> None:
    """Refuse an environment that does not say where the processes meet."""
    host, port = (os.environ.get(name, "") for name in ("MASTER_ADDR", "MASTER_PORT"))
    if not host or not (port.isascii() and port.isdecimal() and 0 < int(port[:9]) < 1 << 16):
        raise InputError(
            f"MASTER_ADDR is {one_line(repr(host))} and MASTER_PORT {one_line(repr(port))} in the "
            "environment, expected the host and port where the processes of RANK and WORLD_SIZE "
            "meet; start processes by torchrun or accelerate launch, or unset all four"
        )


def end(code: int | str | None) -> None:
    """End this process at once with an exit code if it may have waited for others, else return.

    What ``atexit`` knows is done and the streams are written first; Python's own end is left out,
    as threads that have waited, or still do behind an interrupt, may abort it.

    Args:
        code: as ``sys.exit`` takes it.
    """
    if not (_waited.is_set() or _has_group()):
        return
    try:
        if isinstance(code, str):
            print(code, file=sys.stderr)
        threading._shutdown()  # type: ignore[attr-defined] # in this order at Python's own end, too
        atexit._run_exitfuncs()
        _leave()
    finally:
        for stream in (sys.stdout, sys.stderr, sys.__stdout__, sys.__stderr__):
            with suppress(OSError, ValueError):  # nobody reads it, or it is closed
                if stream is not None:
                    stream.flush()
        os._exit(code if isinstance(code, int) else int(code is not None))


def _has_group() -> bool:
    return torch.distributed.is_available() and torch.distributed.is_initialized()


def _leave() -> None:
    """End the process groups with their threads, as long as Python lets these end.

    Not beside a wait that a signal left behind: NCCL's end would wait for it.
    """
    if _has_group() and not _still_waiting():
        torch.distributed.destroy_process_group()


_waited = threading.Event()
"""Whether this process may have threads of gloo's."""

_waiting: list[threading.Thread] = []
"""The last thread that was left to wait."""


def _still_waiting() -> bool:
    return any(thread.is_alive() for thread in _waiting)


def _wait(work: Callable[[], _Found], *, interruptible: bool = False) -> _Found:
    """Do what waits for other processes.

    Args:
        work: waits outside of Python, where no signal reaches the thread it is in.
        interruptible: leave the wait on a signal, as any wait of a command. It then goes on in a
            thread, beside which only :func:`end` is safe, so other programs wait it out.

    Raises:
        InfrastructureError: another process is gone.
    """
    if not _waited.is_set():
        _waited.set()
        atexit.register(_leave)
    try:
        return _in_a_thread(work) if interruptible or unwinds_on_signals() else work()
    except (RuntimeError, ValueError) as error:  # gloo raises bare ones, env:// a ValueError
        traceback.clear_frames(error.__traceback__)  # they hold on to the group, hence its threads
        said = re.sub(r"^\[\S+\.cc:\d+\] ", "", one_line(error, limit=200))  # a place in gloo
        raise InfrastructureError(
            f"another process of this run has ended or cannot be reached ({said}); see what it "
            "said, and start the same command again"
        ) from error


def _in_a_thread(work: Callable[[], _Found]) -> _Found:
    found: list[_Found] = []
    ends: SimpleQueue[Exception | None] = SimpleQueue()
    # Each thread has a current device of its own, the first at its start; NCCL takes that one.
    device = torch.cuda.current_device() if torch.cuda.is_initialized() else None

    def run() -> None:
        try:
            if device is not None:
                torch.cuda.set_device(device)
            found.append(work())
        except Exception as error:  # noqa: BLE001 - raised again in the thread that waits
            ends.put(error)
        else:
            ends.put(None)

    _waiting[:] = [threading.Thread(target=run, daemon=True)]
    _waiting[0].start()
    failure = ends.get()
    _waiting[0].join()
    try:
        if failure is not None:
            raise failure
    finally:
        del failure  # it and this frame would hold each other
    return found[0]
