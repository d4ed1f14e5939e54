"""What ``--list`` prints: the names that an option or argument takes, with a clause for each."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import groupby
from pathlib import Path
from typing import Annotated, Any

import typer

__all__ = ["ListMethods", "ListPresets", "ListRecipes", "ListSuites", "columns", "suite_list"]

_COUNTS = frozenset({"tasks", "documents", "heads"})


def columns(rows: Sequence[Sequence[str]]) -> str:
    """Return rows as aligned columns, the first row their titles; counts stand to the right."""
    rows = [tuple(map(_printable, row)) for row in rows]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    align = [str.rjust if title in _COUNTS else str.ljust for title in rows[0]]
    lines = [
        "  ".join(put(cell, width) for put, cell, width in zip(align, row, widths, strict=True))
        for row in rows
    ]
    return "\n".join(line.rstrip() for line in lines)


def _printable(text: str) -> str:
    """Return a text with escapes for what would move the cursor: names are of others' files.

    In ASCII, which every terminal can show; reports, which are UTF-8, have
    :func:`act_harness.evidence.tables.visible`.
    """
    return "".join(
        one if one.isprintable() else one.encode("unicode_escape").decode() for one in text
    )


def _recipes() -> str:
    """Return the shipped recipes: how each searches, on what, and what its file says of it."""
    from act_harness.search.recipe import load_recipe, shipped_recipes

    rows = [("recipe", "method", "objective", "samples", "about")]
    for name, path in shipped_recipes().items():
        recipe = load_recipe(path)
        rows.append(
            (name, recipe.method, recipe.objective, str(recipe.samples), _first_sentence(path))
        )
    return columns(rows)


def _first_sentence(path: Path) -> str:
    """Return the first sentence of the comment at the head of a YAML file."""
    lines = []
    for line in path.read_text(encoding="utf-8").splitlines():
        if not line.startswith("# "):
            break
        lines.append(line.removeprefix("# ").strip())
    return " ".join(lines).partition(". ")[0].rstrip(".:")


def suite_list(root: Path | None) -> str:
    """Return the suites of a folder, the shipped ones by default, and whether each can be held.

    Args:
        root: Folder of suites.

    Raises:
        RecipeError: A suite is malformed.
        InputError: The folder holds no suite.
    """
    from act_harness.errors import InputError
    from act_harness.regress.baseline import FILE
    from act_harness.regress.suite import load_suite, shipped_suites

    rows = [("suite", "baseline", "model", "about")]
    for name in shipped_suites(root):
        suite, folder = load_suite(name, root=root)
        stored = "stored" if (folder / FILE).is_file() else "none yet"
        rows.append((name, stored, suite.model.name, suite.description))
    if len(rows) == 1:
        raise InputError(f"--baselines {root} holds no suite; expected NAME/suite.yaml in it")
    return columns(rows)


def _methods() -> str:
    """Return the methods and controls that are compared, with what each does."""
    from act_harness.search.methods.registry import METHODS

    rows = [("method", "what it does")]
    for note, alike in groupby(METHODS.values(), key=lambda method: method.note):
        names = [method.name for method in alike]
        rows.append((names[0] if len(names) == 1 else f"{names[0]} to {names[-1]}", note))
    return columns(rows)


def _presets() -> str:
    """Return the published groups of calibration settings."""
    from act_harness.calibration import PRESETS

    return columns(
        [
            ("preset", "settings"),
            *(
                (name, ", ".join(f"{key}={value}" for key, value in one.settings().items()))
                for name, one in PRESETS.items()
            ),
        ]
    )


def _lister(show: Callable[[], str], what: str) -> Any:  # noqa: ANN401 - an annotation
    """Return the option that prints a list and ends the command, whatever else is missing."""

    def listed(given: bool) -> None:
        if given:
            print(show())
            raise typer.Exit

    return typer.Option("--list", is_eager=True, callback=listed, help=f"List {what}, and stop.")


ListRecipes = Annotated[bool, _lister(_recipes, "the shipped recipes")]
ListMethods = Annotated[bool, _lister(_methods, "the methods and controls")]
ListPresets = Annotated[bool, _lister(_presets, "the presets of --calibration")]
# No callback: which suites there are depends on --baselines.
ListSuites = Annotated[bool, typer.Option("--list", help="List the suites, and stop.")]
