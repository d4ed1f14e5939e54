"""How the threads of a command wait for one another: asleep, not spinning.

torch's OpenMP threads spin for milliseconds when they have nothing to do. Alone that costs
nothing; beside other work on the same cores (a CI runner, a login node) each waits for one that
has no core, and a search took thirty times as long. Asleep they are slow only in proportion.
"""

from __future__ import annotations

import os

__all__ = ["wait_passively"]


def wait_passively() -> None:
    """Ask OpenMP for threads that sleep; without effect once torch is imported.

    What the user has set stays: ``OMP_WAIT_POLICY`` is the standard's name, ``KMP_BLOCKTIME`` that
    of Intel's and LLVM's runtimes, in milliseconds.
    """
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    os.environ.setdefault("KMP_BLOCKTIME", "0")
