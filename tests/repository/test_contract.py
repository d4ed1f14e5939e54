"""What users and other programs rely on: names, help, schemas, file names; as they were stored.

A difference is a change that somebody outside notices. Where it is meant, renew the stored files
(``ACT_HARNESS_UPDATE_CONTRACT=1 pytest -k test_contract``) and say it in CHANGELOG.md.
"""

import ast
import contextlib
import difflib
import importlib
import io
import os
import re
import sys
from collections.abc import Iterable, Iterator
from importlib.metadata import version

import installed
import pytest
import typer.main
from installed import REPOSITORY

import act_harness
from act_harness.cli.app import app

STORED = REPOSITORY / "tests" / "data" / "contract"
UPDATE = "ACT_HARNESS_UPDATE_CONTRACT"

# Modules that somebody opens by name: lm-eval, torch, the Makefile and the README.
DOORS = {
    "act_harness.autoload": ("autoload",),
    "act_harness.demo_model": None,
    "act_harness.model": ("CalibratedHFLM",),
    "act_harness.plugin": None,
}
"""Module to the names in it that are asked for; None stands for all of its public names."""

SCHEMA = re.compile(r"act-harness/[a-z-]+/\d+")
FILE_NAME = re.compile(r"[^\s/:]*\.(json|jsonl|md|csv|png|html|yaml)")


def compare(name: str, text: str) -> None:
    """Fail with a readable difference unless a text is the stored one."""
    path = STORED / name
    if os.environ.get(UPDATE) == "1":
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
    stored = path.read_text(encoding="utf-8") if path.is_file() else ""
    lines = difflib.unified_diff(
        stored.splitlines(), text.splitlines(), f"stored {name}", f"{name} now", lineterm=""
    )
    difference = "\n".join(lines)
    if stored != text:
        pytest.fail(f"{difference or 'line ends differ'}\n{renew()}", pytrace=False)


def renew() -> str:
    """Return how stored files are renewed."""
    return (
        f"If this is meant: {UPDATE}=1 pytest -k test_contract, and a line in CHANGELOG.md.\n"
        f"Help is laid out by typer, here {version('typer')}, stored by that of constraints.txt."
    )


def listed(names: Iterable[str]) -> str:
    """Return the text of a stored list."""
    return "".join(f"{name}\n" for name in sorted(set(names)))


def entry_points() -> Iterator[tuple[str, str, str]]:
    """Yield group, name and target of the entry points of pyproject.toml."""
    project = installed.pyproject()["project"]
    for group, points in {"scripts": project["scripts"], **project["entry-points"]}.items():
        for name, target in points.items():
            yield group, name, target


def commands() -> dict[tuple[str, ...], object]:
    """Return the command tree: words behind the program's name to the command."""
    tree: dict[tuple[str, ...], object] = {(): typer.main.get_command(app)}
    waiting = [()]
    while waiting:
        words = waiting.pop()
        for name, command in getattr(tree[words], "commands", {}).items():
            tree[(*words, name)] = command
            waiting.append((*words, name))
    return dict(sorted(tree.items()))


COMMANDS = commands()


def help_file(words: tuple[str, ...]) -> str:
    """Return the name of the stored help of a command."""
    return "-".join(("act-harness", *words)) + ".txt"


def strings() -> Iterator[str]:
    """Yield the package's strings that are no docstrings; ``*`` stands for what is filled in."""
    for path in sorted((installed.REPOSITORY / "act_harness").rglob("*.py")):
        waiting: list[ast.AST] = [ast.parse(path.read_text(encoding="utf-8"))]
        while waiting:
            node = waiting.pop()
            if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant):
                continue
            if isinstance(node, ast.JoinedStr):
                yield "".join(
                    str(getattr(part, "value", "")) if isinstance(part, ast.Constant) else "*"
                    for part in node.values
                )
                waiting.extend(part for part in node.values if not isinstance(part, ast.Constant))
                continue
            if isinstance(node, ast.Constant) and isinstance(node.value, str):
                yield node.value
            waiting.extend(ast.iter_child_nodes(node))


def test_the_public_names_are_the_stored_ones():
    names = [f"act_harness.{name}" for name in act_harness.__all__]
    for module, asked in DOORS.items():
        opened = importlib.import_module(module)
        names += [f"{module}.{name}" for name in asked or opened.__all__]
    for name in names:
        module, _, attribute = name.rpartition(".")
        assert hasattr(importlib.import_module(module), attribute), (
            f"{name} is announced, not there"
        )
    compare("names.txt", listed(names))


def test_the_entry_points_are_the_stored_ones_and_lead_somewhere():
    lines = []
    for group, name, target in entry_points():
        module, _, attribute = target.partition(":")
        assert callable(getattr(importlib.import_module(module), attribute, None)), target
        # Where a command lies is our own affair; the other targets are written down elsewhere too.
        lines.append(f"{group}: {name}" + ("" if group == "scripts" else f" = {target}"))
    compare("entry_points.txt", listed(lines))


def test_the_commands_are_those_whose_help_is_stored():
    now = {help_file(words) for words in COMMANDS}
    there = {path.name for path in (STORED / "help").glob("*.txt")}
    if os.environ.get(UPDATE) == "1":
        for name in there - now:
            (STORED / "help" / name).unlink()
        pytest.skip("the next test writes the help of each command")
    assert now == there, f"new: {sorted(now - there)}; gone: {sorted(there - now)}\n{renew()}"


@pytest.mark.parametrize("words", COMMANDS, ids=" ".join)
def test_the_help_is_the_stored_one(words, monkeypatch):
    monkeypatch.setenv("COLUMNS", "100")
    monkeypatch.setenv("NO_COLOR", "1")
    monkeypatch.setattr(sys, "argv", ["__main__.py"])  # benchmarks name themselves by it
    out = io.StringIO()
    with contextlib.redirect_stdout(out), pytest.raises(SystemExit) as stop:
        app([*words, "--help"], prog_name="act-harness")
    assert stop.value.code == 0
    assert " ".join(("act-harness", *words)) in out.getvalue()
    compare(f"help/{help_file(words)}", out.getvalue())


def test_the_schemas_are_the_stored_ones():
    compare("schemas.txt", listed(found for text in strings() for found in SCHEMA.findall(text)))


def test_the_file_names_are_the_stored_ones():
    compare("file_names.txt", listed(text for text in strings() if FILE_NAME.fullmatch(text)))
