"""Processes without a launcher that would end them: they meet, and notice when one is gone."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time

import pytest
import torch
from installed import REPOSITORY

from act_harness.errors import InfrastructureError
from act_harness.support.processes import Processes


def start(what, count):
    """Run the child in several processes; return their exit codes, outputs and errors."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    common = {
        **os.environ, "PYTHONPATH": str(REPOSITORY), "OMP_NUM_THREADS": "1",
        "CUDA_VISIBLE_DEVICES": "", "TORCH_DEVICE_BACKEND_AUTOLOAD": "0",
        "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "WORLD_SIZE": str(count),
    }  # fmt: skip
    processes = [
        subprocess.Popen(
            [sys.executable, str(REPOSITORY / "tests" / "processes_child.py"), what],
            env={**common, "RANK": str(rank)}, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(count)
    ]  # fmt: skip
    told = [process.communicate(timeout=300) for process in processes]
    return [(p.returncode, out, err) for p, (out, err) in zip(processes, told, strict=True)]


@pytest.mark.slow
def test_all_get_what_each_gave_and_some_go_on():
    found = start("gather", 3)
    assert [code for code, *_ in found] == [0, 0, 0]
    for rank, (_, out, _) in enumerate(found):
        lines = out.splitlines()
        assert lines[0] == f"{rank} [0, 1, 2] [111.0, 111.0]"
        assert lines[1:] == ([f"{rank} [0, -1]"] if rank < 2 else [])


@pytest.mark.slow
def test_who_waits_for_a_killed_process_ends_with_one_line():
    began = time.monotonic()
    *waited, (killed, _, _) = start("die", 3)
    assert killed == -signal.SIGKILL
    assert time.monotonic() - began < 250  # not the half hour of torch, whatever else runs here
    for code, out, err in waited:
        assert (code, out) == (1, "")
        (line,) = [text for text in err.splitlines() if not text.startswith("[")]  # gloo's own
        assert line.startswith("another process of this run has ended or cannot be reached")


def test_more_processes_than_gpus_are_refused(monkeypatch):
    for name, value in {"RANK": "3", "WORLD_SIZE": "4", "LOCAL_RANK": "3"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    with pytest.raises(InfrastructureError, match="process 4 on this machine found 2 GPUs"):
        Processes.join()


def test_alone_nothing_is_waited_for():
    alone = Processes.join()
    values = torch.tensor([1.5])
    alone.sum_together(values)
    alone.meet()
    assert (alone.gather("mine"), values.item(), alone.first(1)) == (["mine"], 1.5, alone)
