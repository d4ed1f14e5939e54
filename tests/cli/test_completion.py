"""Shell completion, as typer writes it: the script of each shell, and what that script asks for."""

from __future__ import annotations

import shutil
import subprocess

import pytest
from own_tasks import caller


@pytest.fixture
def call(monkeypatch, capsys):
    return caller(monkeypatch, capsys)


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_the_script_of_a_shell_is_shown(call, monkeypatch, shell):
    # Else it is the shell that runs the tests.
    monkeypatch.setenv("_TYPER_COMPLETE_TEST_DISABLE_SHELL_DETECTION", "1")
    done = call("--show-completion", shell)
    assert (done.code, done.err) == (0, "")
    assert f"_ACT_HARNESS_COMPLETE=complete_{shell}" in done.out
    program = shutil.which(shell)
    if program is not None:  # it must be able to read it, too
        read = subprocess.run([program, "-n"], input=done.out, text=True, capture_output=True)
        assert (read.returncode, read.stderr) == (0, "")


@pytest.mark.parametrize(
    ("shell", "given", "found"),
    [
        ("bash", {"COMP_WORDS": "act-harness se", "COMP_CWORD": "1"}, "search"),
        ("bash", {"COMP_WORDS": "act-harness artifact ver", "COMP_CWORD": "2"}, "verify"),
        ("zsh", {"_TYPER_COMPLETE_ARGS": "act-harness search --obj"}, "--objective"),
        (
            "fish",
            {"_TYPER_COMPLETE_ARGS": "act-harness ta", "_TYPER_COMPLETE_FISH_ACTION": "get-args"},
            "tasks",
        ),
    ],
)
def test_what_a_shell_asks_for_is_answered(call, monkeypatch, shell, given, found):
    monkeypatch.setenv("_ACT_HARNESS_COMPLETE", f"complete_{shell}")
    for name, value in given.items():
        monkeypatch.setenv(name, value)
    done = call()
    assert (done.code, done.err) == (0, "")
    assert found in done.out
