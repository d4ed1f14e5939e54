"""Several processes on one piece of work: which one this is, and where they wait for each other.

``torchrun`` or ``accelerate launch`` starts them (:mod:`act_harness.support.launcher`); they share
the requests of an evaluation or the measurements of a search. What they tell each other is small
(counters, sums over heads, numbers of requests), so all of it goes through the CPU and gloo, also
where the models are on GPUs: a process that ends closes its connections, and those that wait for
it know at once. NCCL would let them wait for minutes and then end them with pages of its own.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, Protocol

import torch

from act_harness.errors import InfrastructureError, one_line
from act_harness.support.launcher import launched

__all__ = ["Processes"]

_LONGEST_WAIT = timedelta(days=2)
"""Of one process for another. One that ends is noticed at once; this is for a machine that vanished
without a word, and must not end a run whose first process has more to do than the others."""


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
            InputError: the launcher's environment cannot be read.
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
        with _told_when_one_ends():  # NCCL is set up by its first use, which is none of ours
            torch.distributed.init_process_group(
                "cpu:gloo,cuda:nccl" if gpus else "gloo", timeout=_LONGEST_WAIT
            )
        return cls.here()

    def first(self, count: int) -> Processes | None:
        """Go on with the first ``count`` processes; None in one that is left out.

        Every process must call this.
        """
        if count >= self.count:
            return self
        group = torch.distributed.new_group(range(count), backend="gloo", timeout=_LONGEST_WAIT)
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
            total = values.detach().cpu()
            with _told_when_one_ends():
                torch.distributed.all_reduce(total, group=self.group)
            values.copy_(total)

    def gather(self, value: Any) -> list[Any]:  # noqa: ANN401 - anything that can be pickled
        """Return what each process gave, in their order."""
        if self.count == 1:
            return [value]
        found: list[Any] = [None] * self.count
        with _told_when_one_ends():
            torch.distributed.all_gather_object(found, value, group=self.group)
        return found

    def meet(self) -> None:
        """Wait until all processes are here."""
        if self.count > 1:
            with _told_when_one_ends():  # a barrier of torch's own would be NCCL's on GPUs
                torch.distributed.all_reduce(torch.zeros(1), group=self.group)


@contextmanager
def _told_when_one_ends() -> Iterator[None]:
    """Say in one line that another process is gone."""
    try:
        yield
    except (RuntimeError, ValueError) as error:  # gloo raises bare ones, env:// a ValueError
        said = re.sub(r"^\[\S+\.cc:\d+\] ", "", one_line(error, limit=200))  # a place in gloo
        raise InfrastructureError(
            f"another process of this run has ended or cannot be reached ({said}); see what it "
            "said, and start the same command again"
        ) from error
