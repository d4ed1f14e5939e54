"""A search in a process of its own, for tests that kill it or start several; not a test itself.

python search_child.py kills METHOD FOLDER WHEN...
    one killed search for each WHEN, then a whole one: a number of writes, or of seconds with an "s"
torchrun ... search_child.py join METHOD FOLDER [WHEN]
    one search in all processes, the last of which dies at its WHEN-th write
"""

from __future__ import annotations

import os
import signal
import sys
import time
from pathlib import Path

import gradient_runs
import torch
from tiny_search import drawn, tiny

from act_harness.errors import InfrastructureError
from act_harness.search.ledger import SearchLedger
from act_harness.search.recipe import make_recipe
from act_harness.search.run import run_search
from act_harness.support.processes import Processes


def search(method: str, folder: Path) -> None:
    if method == "gradient":
        by_gradient(folder)
        return
    torch.set_num_threads(1)
    recipe = make_recipe(
        {
            "name": "child",
            "tasks": ["a", "b"],
            "samples": 8,
            "verify_samples": 8,
            "calibration": {"alpha": 2.0},
            "chunk_tokens": 60,
            "method": "screened",
            "keep": 0.5,
            "objective": "corrected",
            "rule": "top",
            "top": {"sizes": [1, 2, 4], "criterion": "margin", "refit": True},
            "controls": {"random_sets": 2},
        }
    )
    run_search(
        recipe,
        model=tiny(),
        documents=[drawn("a", 7), drawn("b", 8)],
        ledgers=folder / "ledgers",
        output=folder / "out.json",
        show_progress=False,
    )


def by_gradient(folder: Path) -> None:
    torch.set_num_threads(1)
    recipe = gradient_runs.recipe(
        objective="margin", chunk_tokens=60,
        gradient={"epochs": 6, "restarts": 2, "sizes": [2, 4], "criterion": "margin"},
    )  # fmt: skip
    gradient_runs.search(folder, recipe)


def die_while_writing(number: int) -> None:
    """Kill this process at its ``number``-th write to a file, half-way through it."""
    left = [number]
    write = os.write

    def dying(handle: int, data: bytes) -> int:
        left[0] -= 1
        if left[0] == 0:
            write(handle, bytes(data)[: len(data) // 2])
            os.kill(os.getpid(), signal.SIGKILL)
        return write(handle, data)

    os.write = dying


def kills(method: str, folder: Path, moments: list[str]) -> None:
    """Fork a search for each moment and kill it then; the last one is left alone."""
    died = 0
    for moment in [*moments, ""]:
        child = os.fork()  # this process has computed nothing, so no thread is lost
        if child == 0:
            if moment.isdigit():
                die_while_writing(int(moment))
            search(method, folder)
            os._exit(0)
        if moment.endswith("s"):
            time.sleep(float(moment[:-1]))
            os.kill(child, signal.SIGKILL)
        _, status = os.waitpid(child, 0)
        died += os.WIFSIGNALED(status)
        if not moment and status != 0:
            sys.exit(f"the last search ended with status {status}")
    print(f"died {died}")


def dawdle() -> None:
    """Let the first process read the ledger late, when the others would have written more to it."""
    read = SearchLedger.reload

    def late(self: SearchLedger) -> None:
        time.sleep(0.5)
        read(self)

    SearchLedger.reload = late


def join(method: str, folder: Path, moment: int = 0) -> None:
    """Search in all processes; the last one dies at its ``moment``-th write, if there is one."""
    processes = Processes.join()
    if processes.rank == 0:
        dawdle()
    if moment and processes.rank == processes.count - 1:
        die_while_writing(moment)
    try:
        search(method, folder)
    except InfrastructureError as error:
        sys.exit(f"told: {error}")
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    if sys.argv[1] == "kills":
        kills(sys.argv[2], Path(sys.argv[3]), sys.argv[4:])
    else:
        join(sys.argv[2], Path(sys.argv[3]), *map(int, sys.argv[4:]))
