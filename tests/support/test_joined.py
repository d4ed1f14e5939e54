"""Processes without a launcher that would end them: they meet, and notice when one is gone."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time

import pytest
import torch
from installed import REPOSITORY

from act_harness.errors import InfrastructureError, InputError
from act_harness.support.processes import Processes


def start(count):
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
            [sys.executable, str(REPOSITORY / "tests" / "processes_child.py")],
            env={**common, "RANK": str(rank)}, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(count)
    ]  # fmt: skip
    told = [process.communicate(timeout=300) for process in processes]
    return [(p.returncode, out, err) for p, (out, err) in zip(processes, told, strict=True)]


@pytest.mark.slow
def test_all_get_what_each_gave_until_one_is_killed():
    """Without torchrun, which would end them: who waits for one that is gone ends with one line."""
    began = time.monotonic()
    found = start(3)
    assert time.monotonic() - began < 250  # not the half hour of torch, whatever else runs here
    for rank, (code, out, err) in enumerate(found):
        lines = out.splitlines()
        assert lines[0] == f"{rank} [0, 1, 2] [111.0, 111.0]"
        assert lines[1:] == ([f"{rank} [0, -1]"] if rank < 2 else [])
        assert code == (1 if rank < 2 else -signal.SIGKILL), err
        if rank < 2:
            (line,) = [text for text in err.splitlines() if not text.startswith("[")]  # gloo's own
            assert line.startswith("another process of this run has ended or cannot be reached")


STOPPED = (143, "act-harness: interrupted; nothing was saved; go on with: act-harness")
ENDS = {
    "program": (1, "another process of this run has ended or cannot be reached"),
    "command": (3, "act-harness: another process of this run has ended or cannot be reached"),
    "stopped": STOPPED,
    "stopped early": STOPPED,
    "stopped half-way": STOPPED,
    "stopped alone": STOPPED,
}


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="threads are held back as Linux does it")
@pytest.mark.parametrize(
    ("way", "tries"),
    [("program", 10), ("command", 3), ("stopped", 3), ("stopped early", 3), ("stopped half-way", 1),
     ("stopped alone", 1)],
)  # fmt: skip
def test_who_waited_for_one_that_is_killed_ends_in_order(way, tries):
    """gloo's threads let go of tensors late; where Python had begun to end, that was an abort."""
    found = subprocess.run(
        [sys.executable, str(REPOSITORY / "tests" / "ending_child.py"), way, str(tries)],
        env={**os.environ, "PYTHONPATH": str(REPOSITORY), "OMP_NUM_THREADS": "1",
             "CUDA_VISIBLE_DEVICES": "", "TORCH_DEVICE_BACKEND_AUTOLOAD": "0"},
        capture_output=True, text=True, timeout=300, check=True,
    )  # fmt: skip
    ends = [json.loads(line) for line in found.stdout.splitlines()]
    assert len(ends) == tries
    expected, begins = ENDS[way]
    for code, out, err in ends:
        assert (code, out) == (expected, "not flushed\ntidied up\n"), err
        (line,) = [text for text in err.splitlines() if not text.startswith("[")]  # gloo's own
        assert line.startswith(begins)


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


WAITING = """
from act_harness.support.interruption import Terminated, unwind_on_signals
from act_harness.support.processes import Processes

unwind_on_signals()
try:
    Processes.join()
except Terminated:
    print("ended")
"""


def test_a_signal_ends_the_wait_for_the_others():
    """gloo and its store wait in C++, where a handler of Python's is never called."""
    with socket.create_server(("127.0.0.1", 0)) as first:  # takes the call and never answers
        first.settimeout(120)
        given = {"RANK": "1", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1"}
        waiting = subprocess.Popen(
            [sys.executable, "-c", WAITING], stdout=subprocess.PIPE, text=True,
            env={**os.environ, **given, "PYTHONPATH": str(REPOSITORY),
                 "MASTER_PORT": str(first.getsockname()[1]), "CUDA_VISIBLE_DEVICES": "",
                 "TORCH_DEVICE_BACKEND_AUTOLOAD": "0"},
        )  # fmt: skip
        try:
            call, _ = first.accept()
            with call:
                call.recv(1)  # it is in its store now
                waiting.send_signal(signal.SIGTERM)
                said, _ = waiting.communicate(timeout=60)
        finally:
            waiting.kill()
            waiting.wait()
    assert (waiting.returncode, said) == (0, "ended\n")


@pytest.mark.parametrize(
    ("host", "port"), [("", "29500"), ("localhost", ""), ("localhost", "abc"), ("localhost", "0")]
)
def test_an_environment_that_names_no_place_to_meet_is_refused(monkeypatch, host, port):
    """No other process has ended there, and none has said anything."""
    given = {"RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": host, "MASTER_PORT": port}
    for name, value in given.items():
        monkeypatch.setenv(name, value)
    told = f"MASTER_ADDR is '{host}' and MASTER_PORT '{port}' in the environment, expected"
    with pytest.raises(InputError, match=told):
        Processes.join()
