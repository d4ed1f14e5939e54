"""Several processes on one search: who computes what, and where they wait for each other."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from act_harness.search.ledger import MeasuredUnits

__all__ = ["Processes"]


@dataclass(frozen=True)
class Processes:
    """This process among its equals; started by ``accelerate launch`` or ``torchrun``."""

    rank: int = 0
    count: int = 1

    @classmethod
    def here(cls) -> Processes:
        """Read the process group that is set up, or be alone."""
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            return cls(torch.distributed.get_rank(), torch.distributed.get_world_size())
        return cls()

    def read_together(self, ledger: MeasuredUnits) -> None:
        """Read what all processes have written; none writes on before all have read.

        Work is split by what the ledger lacks, so every process must see the same lines: one that
        read late, when another was already writing the next units, would split it differently.
        """
        self._meet()
        ledger.reload()
        self._meet()

    def sum_together(self, values: torch.Tensor) -> None:
        """Add up a tensor over all processes, in place; each gets the sum."""
        if self.count > 1:
            torch.distributed.all_reduce(values)

    def _meet(self) -> None:
        """Wait until all processes are here."""
        if self.count > 1:
            torch.distributed.barrier()
