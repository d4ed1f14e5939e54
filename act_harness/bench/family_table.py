"""The table of architectures, and what changed in it: a new transformers, or a change of ours.

The stored table is JSON, by model type: a class has another name once it can be built, and Markdown
is for readers. Two tables differ where a cell does, numbers in it left aside: they are rounding,
and others on another machine.
"""

from __future__ import annotations

import os
import re
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Literal, NamedTuple, get_args

import torch
import transformers
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from act_harness.bench.families import FamilyRow, architectures, try_family
from act_harness.errors import ResultError
from act_harness.evidence.tables import markdown_table
from act_harness.support.atomic import write_json, write_text
from act_harness.support.reading import read_json, validated

__all__ = ["Changes", "FamilyTable", "compare", "make_table", "read_table", "write_table"]

Column = Literal["architecture", "route", "engines", "search", "generation", "result"]
_ROUTES = ("packed", "over the cache", "one forward at a time")
_GOOD = {"search": ("yes",), "generation": ("yes",), "result": ("works",)}
_NUMBER = re.compile(r"-?\d+(\.\d+)?(e[-+]?\d+)?")
_ADVICE = "make it with: act-harness doctor --families --output families.md"


class FamilyTable(BaseModel):
    """What was found about each model type, and with which versions."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    schema_: Literal["act-harness/families/1"] = Field(
        default="act-harness/families/1", alias="schema"
    )
    transformers: str
    torch: str
    rows: dict[str, dict[Column, str]]
    """Model type to the cells of its row."""

    def markdown(self) -> str:
        """Return the table for readers, with the numbers of results above it."""
        rows = [tuple(row[column] for column in get_args(Column)) for row in self.rows.values()]
        counts = Counter(row["result"].split(":")[0] for row in self.rows.values())
        told = ", ".join(f"{number} {result}" for result, number in counts.most_common())
        table = markdown_table(FamilyRow._fields, rows)
        return f"# Causal architectures\n\n{self._versions()}: {told}.\n\n{table}"

    def _versions(self) -> str:
        return f"transformers {self.transformers}, torch {self.torch}"


class Changes(NamedTuple):
    """What two tables differ in."""

    worse: int
    """Number of cells that told of something that works, and no longer do."""
    markdown: str


def make_table(
    kinds: Sequence[str] | None = None, *, progress: Callable[[str], None] | None = None
) -> FamilyTable:
    """Try model types, and return what was found.

    Args:
        kinds: model types; all when None.
        progress: called with each model type before it is tried.
    """
    rows: dict[str, dict[Column, str]] = {}
    for kind in architectures() if kinds is None else kinds:
        if progress is not None:
            progress(kind)
        found = try_family(kind)
        rows[kind] = dict(zip(get_args(Column), found, strict=True))
    version = torch.__version__.split("+")[0]
    return FamilyTable(transformers=transformers.__version__, torch=version, rows=rows)


def write_table(path: Path, table: FamilyTable) -> None:
    """Write the Markdown file ``path``, and beside it the JSON file of its name."""
    write_json(path.with_suffix(".json"), table.model_dump(by_alias=True))
    write_text(path, table.markdown())


def read_table(path: str | os.PathLike[str]) -> FamilyTable:
    """Read the JSON file of a table.

    Raises:
        ResultError: there is none, or it is no table.
    """
    content = read_json(path, advice=_ADVICE)
    try:
        table = validated(FamilyTable, content)
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(map(str, first["loc"])) or "the file"
        raise ResultError(
            f"{path} is no table of architectures ({place}: {first['msg']}); {_ADVICE}"
        ) from None
    for kind, row in table.rows.items():
        if missing := set(get_args(Column)) - set(row):
            raise ResultError(f"{path}: {kind} lacks {', '.join(sorted(missing))}; {_ADVICE}")
    return table


def compare(before: FamilyTable, after: FamilyTable) -> Changes:
    """Return what differs, model types that are new or gone among it.

    Worse is a model type that worked and does not (or is gone), a search or generation that did,
    a slower route of scoring, and an engine less.
    """
    changed: list[tuple[str, ...]] = []
    for kind in sorted(before.rows.keys() | after.rows.keys()):
        old, new = before.rows.get(kind), after.rows.get(kind)
        if old is None or new is None:
            bad = old is not None and old["result"] == "works"
            was, now = (row["result"] if row else "-" for row in (old, new))
            changed.append((kind, "gone" if old else "new", was, now, _verdict(bad)))
            continue
        broken = old["result"] == "works" != new["result"]
        for column in get_args(Column):
            if _NUMBER.sub("#", old[column]) == _NUMBER.sub("#", new[column]):
                continue
            if new[column] == "-" and broken:  # follows from the result, which is named
                continue
            bad = _is_worse(column, old[column], new[column])
            changed.append((kind, column, old[column], new[column], _verdict(bad)))
    worse = sum(row[-1] == "worse" for row in changed)
    head = f"{before._versions()} -> {after._versions()}: "
    if not changed:
        return Changes(0, f"{head}no architecture changed.\n")
    table = markdown_table(("model type", "what", "before", "after", ""), changed)
    return Changes(worse, f"{head}{len(changed)} changes, {worse} for the worse.\n\n{table}")


def _verdict(bad: bool) -> str:
    return "worse" if bad else ""


def _is_worse(column: Column, old: str, new: str) -> bool:
    if column == "route" and old in _ROUTES:
        return new not in _ROUTES[: _ROUTES.index(old) + 1]
    if column == "engines":
        return not set(old.split(", ")) - {"-"} <= set(new.split(", "))
    return old in _GOOD.get(column, ())  # and the cell changed
