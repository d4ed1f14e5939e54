"""Commands in pages: cut into words, and held against the parsers that would read them."""

from __future__ import annotations

import re
import shlex

import typer
from installed import REPOSITORY

from act_harness.cli import app as cli

INSTALL = (
    "pip install -c constraints.txt .",
    "uv pip install -c constraints.txt .",
    "uvx -c constraints.txt --from . act-harness doctor",
    "pipx install --pip-args='-c constraints.txt' .",
)
"""The ways in; the job `install` of CI runs each."""

__all__ = ["INSTALL", "check_line", "check_lm_eval", "command_lines", "parse"]


def command_lines(block: str) -> list[str]:
    """Return the commands of a shell block: lines joined where they go on, remarks left out."""
    lines = re.sub(r"\\\n\s*", " ", block).splitlines()
    told = (re.sub(r"\s+# .*", "", one).strip() for one in lines)
    # a script's first lines, and what it asks of the machine, are none of ours
    return [line for line in told if line and not re.match(r"#|\w+=\$\(", line)]


def parse(words):
    """Hand words to the command that they name; it parses them and is not run."""
    command = typer.main.get_command(cli.app)
    context = command.make_context("act-harness", list(words))
    while hasattr(command, "commands"):
        name, command, words = command.resolve_command(context, words)
        context = command.make_context(name, list(words), parent=context)
    return context


def check_lm_eval(words):
    """Parse as lm-eval would: without a subcommand the words are those of `run`."""
    from lm_eval._cli import HarnessCLI

    given = HarnessCLI()._parser.parse_args(["run", *words])
    assert given.model == "hf-act"
    assert given.tasks


def check_line(line: str) -> str:
    """Raise where a line names a command, an option or a target that is not there."""
    program, *words = shlex.split(line)
    if program == "accelerate":
        assert words[:2] == ["launch", "--num_processes"]
        assert words[3:5] == ["-m", "act_harness"]
        program, words = "act-harness", words[5:]
    if program in ("torchrun", "srun"):  # their own options end where a module begins
        module, *words = words[words.index("-m") + 1 :]
        program = {"act_harness": "act-harness"}.get(module, module)
    if program == "make":
        made = re.findall(r"(?m)^([a-z-]+):", (REPOSITORY / "Makefile").read_text())
        assert words[0] in made
    elif program == "act-harness":
        parse(words)
    elif program == "lm_eval":
        check_lm_eval(words[words[:1] == ["run"] :])
    else:
        assert line in INSTALL
    return program
