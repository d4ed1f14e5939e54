"""Several processes on one search: who computes what, and where they wait for each other."""

from __future__ import annotations

from dataclasses import dataclass

import torch

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

    def meet(self) -> None:
        """Wait until all processes are here."""
        if self.count > 1:
            torch.distributed.barrier()
