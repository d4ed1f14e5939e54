"""Which of several processes this is, and which of them speaks."""

from __future__ import annotations

import sys
from contextlib import contextmanager

import pytest
import torch

from act_harness.cli.app import main
from act_harness.errors import InputError
from act_harness.support import processes
from act_harness.support.launcher import Launched, keep_quiet, launched


@pytest.fixture
def started(monkeypatch):
    """Set what a launcher says; None takes it away."""

    def set_place(rank=None, count=None, local=None):
        for name, value in {"RANK": rank, "WORLD_SIZE": count, "LOCAL_RANK": local}.items():
            if value is None:
                monkeypatch.delenv(name, raising=False)
            else:
                monkeypatch.setenv(name, str(value))

    set_place()
    return set_place


@pytest.mark.parametrize(
    ("said", "place"),
    [
        ((), Launched(0, 1, 0)),
        ((None, 8, 3), Launched(0, 1, 0)),  # left over from something else: no rank
        ((5, 8, 1), Launched(5, 8, 1)),
        ((1, 2, None), Launched(1, 2, 0)),
        ((0, "", ""), Launched(0, 1, 0)),
    ],
)
def test_a_place_is_read_from_the_environment(started, said, place):
    started(*said)
    assert launched() == place


@pytest.mark.parametrize(
    ("said", "told"),
    [
        (("one", 2), "RANK is 'one' in the environment, expected a whole number"),
        ((0, "-2"), "WORLD_SIZE is '-2'"),
        ((2, 2), "RANK is 2 and WORLD_SIZE 2, expected a rank below it"),
    ],
)
def test_what_cannot_be_is_refused(started, said, told):
    started(*said)
    with pytest.raises(InputError, match=told):
        launched()


@contextmanager
def streams():
    """Give the streams back that the block takes away."""
    out, err = sys.stdout, sys.stderr
    try:
        yield
    finally:
        if sys.stdout is not out:
            sys.stdout.close()
        sys.stdout, sys.stderr = out, err


def call(monkeypatch, *arguments):
    monkeypatch.setattr(sys, "argv", ["act-harness", *arguments])
    with streams(), pytest.raises(SystemExit) as ended:
        main()
    return ended.value.code


def test_one_command_prints_once(started, monkeypatch, capfd):
    started(1, 2, 1)
    assert call(monkeypatch, "eval", "--pretrained", "/nowhere", "--tasks", "act_demo_word") == 3
    assert call(monkeypatch, "eval", "--tasks", "act_demo_word", "--limit", "-1") == 2
    assert call(monkeypatch, "eval", "--lmit", "3") == 2
    told = capfd.readouterr()
    assert told.out == ""
    # bad input is told by the first process of the machine; what may be this one's own, by itself
    (line,) = told.err.splitlines()
    assert line.startswith("act-harness (process 2 of 2): no model at /nowhere")


def test_bad_input_in_one_share_is_told_by_its_process(started, monkeypatch, capfd):
    """The first one only knows that another has ended; a line that was told is told once."""
    started(1, 2, 1)
    monkeypatch.setattr(processes, "_boards", [torch.distributed.HashStore()])
    for _ in range(2):
        assert call(monkeypatch, "eval", "--tasks", "act_demo_word", "--limit", "-1") == 2
    (line,) = capfd.readouterr().err.splitlines()
    assert line.startswith("act-harness (process 2 of 2): --limit is -1")


@pytest.mark.parametrize("command", ["methods", "report", "judge", "explore", "doctor"])
def test_what_processes_cannot_share_runs_in_one(started, monkeypatch, capsys, command):
    started(0, 4, 0)
    assert call(monkeypatch, command) == 2
    assert f"4 processes were started, and {command} runs in one" in capsys.readouterr().err


def test_quiet_and_loud_again(capsys):
    with streams():
        speak = keep_quiet()
        print("out")
        print("err", file=sys.stderr)
        speak()
        print("told", file=sys.stderr)
    assert capsys.readouterr() == ("", "told\n")
