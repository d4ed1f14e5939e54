"""Ctrl-C and SIGTERM, once and again: one line, what was saved, and the code that shells count."""

from __future__ import annotations

import os
import signal
import subprocess
import sys

import pytest
from installed import REPOSITORY

SCRIPT = """
import atexit, sys, time
from act_harness.cli import app as cli
from act_harness.support import interruption
from act_harness.support.interruption import saved

_, slow, seconds, one_press = sys.argv
interruption._ONE_PRESS = float(one_press)
sys.argv = ["act-harness", "nap"]

def pause(place):
    if slow == place:
        print(place, flush=True)
        time.sleep(float(seconds))

def describe():
    pause("describe")
    return "a part is kept"

@cli.app.command("nap")
def nap():
    with saved(describe):
        try:
            print("ready", flush=True)
            time.sleep(60)
        finally:
            pause("clean up")
            print("clean", flush=True)

close_bars = cli._close_bars
cli._close_bars = lambda: (close_bars(), pause("bars"))
cli.print = lambda *a, **k: (pause("tell"), print(*a, **k))
atexit.register(pause, "exit")
cli.main()
"""


class Nap:
    """A command that is slow to end at one place."""

    def __init__(self, place, seconds, *, one_press):
        self.process = subprocess.Popen(
            [sys.executable, "-c", SCRIPT, place, str(seconds), str(one_press)],
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
            env={**os.environ, "PYTHONPATH": str(REPOSITORY)},
        )  # fmt: skip
        self.until("ready")

    def until(self, line):
        for found in self.process.stdout:
            if found.strip() == line:
                return
        raise AssertionError(self.process.stderr.read())

    def end(self):
        _, said = self.process.communicate(timeout=60)
        return self.process.returncode, said.strip().splitlines()


KEPT = "act-harness: interrupted; a part is kept; go on with: act-harness nap"


@pytest.mark.parametrize("place", ["describe", "tell", "exit"])
def test_two_interrupts_at_once_are_one(place):
    nap = Nap(place, 0.2, one_press=3600)  # whatever else runs here
    nap.process.send_signal(signal.SIGINT)
    nap.until(place)
    nap.process.send_signal(signal.SIGINT)
    assert nap.end() == (130, [KEPT])


def test_a_later_interrupt_ends_the_wait_and_not_the_line():
    nap = Nap("bars", 30, one_press=0)
    nap.process.send_signal(signal.SIGINT)
    nap.until("bars")
    nap.process.send_signal(signal.SIGTERM)
    code, said = nap.end()
    assert (code, said[-1]) == (143, KEPT)
    assert not any("Traceback" in line for line in said)


def test_once_all_is_said_an_interrupt_ends_the_process():
    nap = Nap("exit", 30, one_press=0)
    nap.process.send_signal(signal.SIGINT)
    nap.until("exit")
    nap.process.send_signal(signal.SIGINT)
    assert nap.end() == (-signal.SIGINT, [KEPT])
