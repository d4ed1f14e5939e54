"""What a comparison of methods leaves for a reader: Markdown, JSON, forest plots, a tracked run."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from act_harness.evidence.comparison import Row
from act_harness.evidence.tables import Markup, markdown_cell, markdown_table, p_value_text
from act_harness.search.methods.registry import METHODS
from act_harness.search.methods.table import Cell, Column, Table, make_table
from act_harness.support import atomic, provenance
from act_harness.support.places import file_name
from act_harness.tracking.wandb_run import open_tracker

if TYPE_CHECKING:
    from act_harness.search.methods.arms import Arm
    from act_harness.search.methods.comparison import MethodArms
    from act_harness.search.recipe import Recipe
    from act_harness.tracking.tracker import TrackingSettings

__all__ = ["MethodsReport", "track_methods", "write_report"]

_LABELLED = 50
"""Labelled documents of a task below which a fitted scaling is called noise: with 16, arc_easy fell
from 33 % to 17 % (SmolLM2)."""
_SCHEMA = "act-harness/methods/1"
_MARKS = {"improved": "**", "regressed": "_", "inconclusive": ""}


@dataclass(frozen=True)
class MethodsReport:
    """The tables of a comparison, and where they were written."""

    recipe: Recipe
    arms: MethodArms
    table: Table
    equal: Table | None
    """At equal strength; None: not asked for, or nothing moved an answer."""
    files: dict[str, Path] = field(default_factory=dict)

    def markdown(self) -> str:
        """Return the report."""
        parts = self.arms.parts["evaluation"]
        counts = ", ".join(f"{markdown_cell(task)} {len(found)}" for task, found in parts.items())
        lines = [
            f"# Methods: {markdown_cell(self.recipe.name)}\n",
            self._what(),
            f"Documents that neither found nor chose anything: {counts}. Mean accuracy over tasks "
            "in %; in brackets the difference from the untouched model, paired by document, its "
            "95 % interval, and p adjusted over the methods of a column that found heads "
            "(Benjamini-Hochberg). "
            "Bold: improved; italic: regressed. KL: mean divergence of the answers on verify from "
            "the untouched model's, in nats.\n",
            self._columns_text(),
            "## At their own strength\n",
            self._table(self.table, self.arms.arms),
        ]
        bare = [f"`{arm.method}`" for arm in self.arms.arms if not arm.heads]
        if bare:
            lines.append(
                f"Found no heads: {', '.join(bare)}. Nothing they tried did better on verify than "
                "the untouched model (or there was nothing to copy), whose figures stand in their "
                "rows. No head set was measured, so what such a method or control would gain is "
                "not known.\n"
            )
        if self.equal is not None:
            reference = self.arms.reference
            lines += [
                "## At equal strength\n",
                f"Every strength to the power that moves the answers on verify as far as "
                f"{reference} does, KL {self.arms.divergences[str(reference)]:.3g}; a power with "
                "a star did not get there.\n",
                self._table(self.equal, [one.arm for one in self.arms.equal], equal=True),
            ]
        rank = self._rank()
        lines += [rank] if rank else []
        lines += ["## What they are\n", *self._notes()]
        return "\n".join(lines)

    def _what(self) -> str:
        """Say of which model, recipe and documents the head sets are."""
        model, recipe, parts = self.arms.model, self.recipe, self.arms.parts
        counts = ", ".join(
            f"{markdown_cell(task)} {len(found)} + {len(parts['verify'][task])}"
            for task, found in parts["search"].items()
        )
        said = (
            f"Model {markdown_cell(model.id)} ({model.architecture}, {model.dtype or 'no dtype'}), "
            f"objective {recipe.objective}, seed {recipe.seed}; documents to find and to choose "
            f"heads by: {counts}.\n"
        )
        if recipe.objective == "entropy":
            said += (
                "\nObjective entropy is that of methods without labels alone; all others have the "
                "labels, and objective corrected.\n"
            )
        return said

    def _columns_text(self) -> str:
        return "Columns (the answer is the choice of the best score):\n\n" + "".join(
            f"- {column.title}: {column.says}{self._few(column)}; "
            f"{', '.join(map(markdown_cell, column.tasks))}\n"
            for column in self.table.columns
        )

    def _few(self, column: Column) -> str:
        """Say that a scaling was fitted on too few documents to be worth anything."""
        parts = self.arms.parts
        fitted = [len(parts["search"][task]) + len(parts["verify"][task]) for task in column.tasks]
        if not column.name.startswith("supervised") or min(fitted) >= _LABELLED:
            return ""
        return f" (fitted on as few as {min(fitted)} of a task: mostly noise below {_LABELLED})"

    def _table(self, table: Table, arms: Sequence[Arm], *, equal: bool = False) -> str:
        columns = table.columns
        level = [f"{100 * table.level(column):.1f}" for column in columns]
        powers = {one.arm.method: one.match for one in self.arms.equal} if equal else {}
        rows: list[list[str]] = [
            ["none", "0", *([""] if equal else []), "0", *level],
        ]
        for arm in arms:
            own, match = table.cells[arm.method], powers.get(arm.method)
            moved = self.arms.divergences[arm.method] if match is None else match.divergence
            power = [] if match is None else [f"{match.power:.3g}{'' if match.reached else '*'}"]
            figures = [_figure(own[column.name]) for column in columns] if arm.heads else level
            rows.append([arm.method, str(arm.heads), *power, f"{moved:.3g}", *figures])
        head = ["method", "heads", *(["power"] if equal else []), "KL"]
        return markdown_table([*head, *(column.title for column in columns)], rows)

    def measured(self) -> list[str]:
        """Return the methods that found heads; the others' differences are none."""
        return [arm.method for arm in self.arms.arms if arm.heads]

    def _rank(self) -> str:
        """Say where ``signed`` stands among random head sets, by column."""
        drawn = [name for name in self.table.cells if name.startswith("random-heads-")]
        found = any(arm.method == "signed" and arm.heads for arm in self.arms.arms)
        if not found or not drawn:  # without heads its controls have none: all are untouched
            return ""
        said = []
        for column in self.table.columns:
            own = self.table.cells["signed"][column.name].result.score_b
            better = sum(self.table.cells[n][column.name].result.score_b >= own for n in drawn)
            said.append(f"{column.title} {better + 1} of {len(drawn) + 1}")
        return f"Place of signed among {len(drawn)} random head sets: {'; '.join(said)}.\n"

    def _notes(self) -> list[str]:
        notes = []
        for arm in (self.arms.untouched, *self.arms.arms):
            engine = f"; engine {arm.engine}" if arm.engine not in (None, "auto") else ""
            said = f" ({markdown_cell(arm.note)})" if arm.note else ""
            notes.append(f"- `{arm.method}`: {METHODS[arm.method].note}{engine}{said}")
        return [*notes, ""]

    def to_json(self) -> dict[str, Any]:
        """Return everything the tables say."""
        found: dict[str, Any] = {
            "schema": _SCHEMA,
            "model": self.arms.model.model_dump(exclude_none=True),
            "recipe": self.recipe.content(),
            "documents": {
                split: {task: len(documents) for task, documents in tasks.items()}
                for split, tasks in self.arms.parts.items()
            },
            "columns": {column.name: list(column.tasks) for column in self.table.columns},
            "untouched": self.table.untouched,
            "methods": {
                arm.method: {
                    "note": METHODS[arm.method].note,
                    "said": arm.note,
                    "heads": arm.heads,
                    "artifact_sha256": arm.artifact_sha256,
                    "engine": arm.engine,
                    "divergence": self.arms.divergences[arm.method],
                    "columns": _columns_json(self.table, arm.method),
                }
                for arm in self.arms.arms
            },
            "provenance": provenance.collect(seed=self.recipe.seed).to_json(),
        }
        if self.equal is not None:
            found["equal_strength"] = {
                "reference": self.arms.reference,
                "methods": {
                    one.arm.method: {
                        **one.match._asdict(),
                        "columns": _columns_json(self.equal, one.arm.method),
                    }
                    for one in self.arms.equal
                },
            }
        return found


def write_report(recipe: Recipe, arms: MethodArms, folder: Path) -> MethodsReport:
    """Make the tables and write ``methods.md``, ``methods.json`` and the forest plots.

    The plots show what has heads; they are left out where matplotlib is not installed, and one of
    an earlier call that is not drawn again is removed.

    Raises:
        InfrastructureError: a file cannot be written.
    """
    table = make_table(arms.untouched, arms.arms, arms.parts)
    equal = None
    if arms.reference is not None:
        equal = make_table(arms.untouched, [one.arm for one in arms.equal], arms.parts)
    report = MethodsReport(recipe, arms, table, equal)
    files = {"methods.json": atomic.write_json(folder / "methods.json", report.to_json())}
    text = report.markdown()
    plots = find_spec("matplotlib") is not None
    for name, one in (("forest.png", table), ("forest-equal.png", equal)):
        rows = _rows(one, report.measured()) if one is not None and plots else []
        if not rows:
            (folder / name).unlink(missing_ok=True)
            continue
        from act_harness.evidence.plots import forest_plot

        said = ", at equal strength" if one is equal else ""
        title = f"{recipe.name}: methods against the untouched model{said}"
        files[name] = forest_plot(rows, folder / name, title=title, names=("none", "method"))
        text += f"\n![{markdown_cell(title)}]({name})\n"
    files["methods.md"] = atomic.write_text(folder / "methods.md", text)
    return MethodsReport(recipe, arms, table, equal, files)


def track_methods(report: MethodsReport, settings: TrackingSettings, *, folder: Path) -> list[str]:
    """Log a comparison as one run of job type ``methods``.

    Returns:
        Where the run is, as a line; nothing where nothing was logged.

    Raises:
        InfrastructureError: W&B cannot be reached or refuses the key (strict only).
    """
    content = report.to_json()
    with open_tracker(
        settings,
        job_type="methods",
        name=f"methods-{report.recipe.name}",
        config={"recipe": content["recipe"], "documents": content["documents"]},
        folder=folder,
        identity={"recipe": report.recipe.sha256(), "group": settings.group},
    ) as tracker:
        for kind, table in (("methods", report.table), ("methods_equal", report.equal)):
            if table is None:
                continue
            names, rows = _flat(table, report.measured())
            tracker.table(kind, names, rows)
            tracker.scalars(
                {
                    f"{kind}/{method}/{column}": cell.result.difference
                    for method, cells in table.cells.items()
                    if method in report.measured()
                    for column, cell in cells.items()
                }
            )
        for name, path in report.files.items():
            if path.suffix == ".png":
                tracker.image(file_name(Path(name).stem), path, caption=report.recipe.name)
        return [line for line in (tracker.describe(),) if line]


def _flat(table: Table, methods: Sequence[str]) -> tuple[list[str], list[list[Any]]]:
    names = ["method", "column", "accuracy", "difference", "low", "high", "p_adjusted", "verdict"]
    rows = [
        [method, column, cell.result.score_b, cell.result.difference, *cell.result.interval,
         cell.p_adjusted, cell.verdict]
        for method, cells in table.cells.items()
        if method in methods
        for column, cell in cells.items()
    ]  # fmt: skip
    return names, rows


def _columns_json(table: Table, method: str) -> dict[str, Any]:
    return {name: cell.to_json() for name, cell in table.cells[method].items()}


def _figure(cell: Cell) -> str:
    found, mark = cell.result, _MARKS[cell.verdict]
    low, high = found.interval
    return Markup(
        f"{mark}{100 * found.score_b:.1f}{mark} ({100 * found.difference:+.1f}; {100 * low:+.1f} "
        f"to {100 * high:+.1f}; p {p_value_text(cell.p_adjusted, digits=3)})"
    )


def _rows(table: Table, methods: Sequence[str]) -> list[Row]:
    """Return some methods' cells as rows that the forest plot draws, a panel a column."""
    return [
        _row(method, column, table.cells[method][column.name])
        for column in table.columns
        for method in table.cells
        if method in methods
    ]


def _row(method: str, column: Column, cell: Cell) -> Row:
    return Row(
        kind="task", name=method, metric=column.title, filter="none", headline=True, derived=True,
        higher_is_better=True, score_a=cell.result.score_a, score_b=cell.result.score_b,
        result=cell.result, p_adjusted=cell.p_adjusted, verdict=cell.verdict, clustered_by=None,
    )  # fmt: skip
