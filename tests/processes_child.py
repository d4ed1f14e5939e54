"""One of several processes that meet, for tests; not a test itself.

python processes_child.py WHAT, with RANK, WORLD_SIZE, MASTER_ADDR and MASTER_PORT set:
    gather   each gives its number, all print what they got, also in a smaller group
    die      the last one ends without a word while the others wait for it
"""

from __future__ import annotations

import os
import signal
import sys

import torch

from act_harness.errors import InfrastructureError
from act_harness.support.processes import Processes


def gather() -> None:
    processes = Processes.join()
    values = torch.full((2,), 10.0**processes.rank, dtype=torch.float64)
    processes.sum_together(values)
    print(processes.rank, processes.gather(processes.rank), values.tolist())
    smaller = processes.first(2)
    if smaller is None:
        return
    print(smaller.rank, smaller.gather(-smaller.rank))
    smaller.meet()


def die() -> None:
    processes = Processes.join()
    processes.meet()
    if processes.rank == processes.count - 1:
        os.kill(os.getpid(), signal.SIGKILL)
    try:
        processes.gather("waiting")
    except InfrastructureError as error:
        sys.exit(str(error))


if __name__ == "__main__":
    {"gather": gather, "die": die}[sys.argv[1]]()
