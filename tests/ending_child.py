"""Pairs of processes, the second of which is killed while the first waits; not a test itself.

python ending_child.py WAY TRIES
    prints a line of JSON for each try: the first process's exit code, output and error output

WAY is how the first one is written: "program" as any Python program, "command" as a command of the
command line, "stopped" as a command that gets SIGTERM before the second one is killed, "stopped
early" as one that gets it before they have met. In "stopped half-way", where they have begun to
meet, and "stopped alone", where they have met, the second one goes on until the first one is gone.

The threads in which gloo answers get a processor only while nothing else wants it. So they let go
of their tensors late, as now and then they do on a busy machine.
"""

from __future__ import annotations

import atexit
import json
import os
import signal
import socket
import sys
import time
from contextlib import suppress
from pathlib import Path

from torch.distributed.rendezvous import rendezvous  # once, for all that are forked

from act_harness.cli import app
from act_harness.errors import InfrastructureError
from act_harness.support.processes import Processes

READY = os.pipe()
"""Where the first process says that it is about to meet the second one."""


def hold_back_threads() -> None:
    processor = {max(os.sched_getaffinity(0))}
    for thread in [int(task.name) for task in Path("/proc/self/task").iterdir()]:
        with suppress(ProcessLookupError):  # one that has just ended
            os.sched_setaffinity(thread, processor)
            if thread != os.getpid():
                os.sched_setscheduler(thread, os.SCHED_IDLE, os.sched_param(0))


def first(**_: object) -> None:
    """Wait for the second process, with things left to do at the end."""
    atexit.register(print, "tidied up")
    print("not flushed")
    os.write(READY[1], b"!")
    processes = Processes.join()
    processes.gather("here")
    hold_back_threads()
    processes.gather("waiting")


def second(way: str, other: int) -> None:
    os.read(READY[0], 1)
    if way == "stopped early":
        time.sleep(0.5)  # the other one waits by now
        os.kill(other, signal.SIGTERM)
        time.sleep(0.05)  # it is on its way out
        signal.alarm(1)  # the end of this one, which finds nobody any more
    if way == "stopped half-way":
        _meeting = next(rendezvous("env://"))  # the first step, which is kept and goes no further
    else:
        processes = Processes.join()
        processes.gather("here")
    time.sleep(0.2)  # the other one waits by now
    if way == "stopped":
        os.kill(other, signal.SIGTERM)
        time.sleep(0.1)  # by now it is on its way out, where the end of this one finds it
    elif way in ("stopped half-way", "stopped alone"):
        os.kill(other, signal.SIGTERM)
        until = time.monotonic() + 60
        while Path(f"/proc/{other}/stat").exists():
            time.sleep(0.02)
            if time.monotonic() > until:
                sys.exit("the other process still waits")
    os.kill(os.getpid(), signal.SIGKILL)


def run(way: str, other: int | None = None) -> None:
    if other is not None:
        second(way, other)
    elif way == "program":
        try:
            first()
        except InfrastructureError as error:
            sys.exit(str(error))
    else:
        app.app = first
        app.main()


def attempt(way: str) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    out, err = os.memfd_create("out"), os.memfd_create("err")
    os.environ.update(WORLD_SIZE="2", MASTER_ADDR="127.0.0.1", MASTER_PORT=port)
    pids: list[int] = []
    for rank in range(2):
        pid = os.fork()
        if pid == 0:
            if rank == 0:
                os.dup2(out, 1)
                os.dup2(err, 2)
            os.environ["RANK"] = str(rank)
            run(way, *pids)
            sys.exit()
        pids.append(pid)
    codes = [os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in pids]
    assert codes[1] == -signal.SIGKILL or way == "stopped early"
    told = [os.pread(file, 1 << 16, 0).decode() for file in (out, err)]
    print(json.dumps([codes[0], *told]), flush=True)


if __name__ == "__main__":
    for _ in range(int(sys.argv[2])):
        attempt(sys.argv[1])
