"""What a comparison of two runs says, and how it is shown: terminal, Markdown, JSON, exit code.

Exit codes of ``act-harness compare``: 0, nothing regressed; 1, a task or group regressed; 2, the
results cannot be compared (another document, another prompt, no samples); 3, a file cannot be read,
or there is no verdict: nothing regressed where numbers are numbers, but there are answers that are
not finite; or no task's metric could be tested.

Not here: the computation (:mod:`act_harness.evidence.compare`) and the plots
(:mod:`act_harness.evidence.plots`).
"""

from __future__ import annotations

import io
import math
import shutil
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any, Literal

from pydantic import TypeAdapter, ValidationError

from act_harness.errors import ResultError, one_line
from act_harness.evidence.calibrators import CALIBRATORS
from act_harness.evidence.stats import PairedDifference, Verdict
from act_harness.evidence.tables import Markup, markdown_cell, markdown_table, p_value_text
from act_harness.support.atomic import plain

if TYPE_CHECKING:
    from rich.table import Table

__all__ = ["Comparison", "Row", "RunInfo", "Settings"]

SCHEMA = "act-harness/comparison/1"

_NUMBERS = range(2, 10)  # columns of numbers, aligned to the right


@dataclass(frozen=True)
class RunInfo:
    """Which run an arm is."""

    label: str
    path: str | None
    model: str | None
    """What was evaluated, as lm-eval names it."""
    model_args: Any
    date: float | None
    """Start of the evaluation, seconds since 1970."""
    versions: Mapping[str, str]

    def __str__(self) -> str:
        return f"{self.label} ({self.path})" if self.path else self.label


@dataclass(frozen=True)
class Settings:
    """What the statements rest on."""

    confidence: float
    alpha: float
    """Accepted share of false findings, after Benjamini-Hochberg over the rows of a family."""
    negligible: float
    resamples: int
    seed: int


@dataclass(frozen=True)
class Row:
    """One metric of one task or group in both arms."""

    kind: Literal["task", "group"]
    name: str
    metric: str
    filter: str
    headline: bool
    """The task's first reported metric, on which the exit code rests."""
    derived: bool
    """Computed here from the samples, not reported by the evaluation."""
    higher_is_better: bool | None
    score_a: float | None
    score_b: float | None
    result: PairedDifference | None
    """None where the samples do not determine the score; ``note`` says why."""
    p_adjusted: float | None
    """After Benjamini-Hochberg over the rows of the same kind and headline state."""
    verdict: Verdict
    clustered_by: str | None
    """What documents share, where they were resampled together."""
    note: str = ""
    not_finite: int = 0
    """Answers of both runs that are NaN or infinite, for which nothing is tested."""

    @property
    def tested(self) -> bool:
        """Whether its documents can say anything: there are two units of them or more."""
        return self.result is not None and math.isfinite(self.result.stderr)


@dataclass(frozen=True)
class Comparison:
    """Two runs compared on the same documents; differences are B minus A."""

    a: RunInfo
    b: RunInfo
    settings: Settings
    rows: tuple[Row, ...]
    notes: tuple[str, ...] = ()

    @property
    def regressed(self) -> tuple[Row, ...]:
        """Headline rows that got worse."""
        return tuple(row for row in self.rows if row.headline and row.verdict == "regressed")

    @property
    def not_finite(self) -> int:
        """Answers of both runs that are NaN or infinite."""
        most: dict[tuple[str, str], int] = {}
        for row in self.rows:  # a task's metrics rest on the same answers
            key = (row.name, row.filter)
            most[key] = max(most.get(key, 0), row.not_finite)
        return sum(most.values())

    @property
    def tested(self) -> bool:
        """Whether anything could be said about the headline metric of any task or group."""
        return any(row.headline and row.tested for row in self.rows)

    @property
    def not_tested(self) -> tuple[str, ...]:
        """Reported metrics about which nothing can be said, as ``task metric``."""
        return tuple(
            f"{row.name} {row.metric}" for row in self.rows if not row.derived and not row.tested
        )

    @property
    def exit_code(self) -> int:
        """1 when a headline row regressed; 3 without a verdict; otherwise 0.

        There is no verdict where answers are not finite, or nothing could be tested.
        """
        return 1 if self.regressed else 3 if self.not_finite or not self.tested else 0

    def to_json(self) -> dict[str, Any]:
        """Return everything as a JSON object; numbers that are not finite become null."""
        said = {"exit_code": self.exit_code, "not_tested": list(self.not_tested)}
        return {"schema": SCHEMA, **said, **plain(self)}

    @classmethod
    def from_json(cls, content: Mapping[str, Any], source: str) -> Comparison:
        """Return what :meth:`to_json` wrote, numbers that were not finite as such again.

        Raises:
            ResultError: It is no comparison.
        """
        own = {one.name: content.get(one.name, ()) for one in fields(cls)}
        try:
            own["rows"] = [_finite_or_not(row) for row in own["rows"]]
            return TypeAdapter(cls).validate_python(own)
        except (AttributeError, KeyError, TypeError, ValidationError) as error:
            raise ResultError(
                f"{source} is no comparison ({one_line(error, limit=200)}); repeat act-harness "
                "compare"
            ) from None

    def table(self, *, headline_only: bool = False) -> tuple[list[str], list[list[str]]]:
        """Return the table's header and cells; columns 2 to 9 are numbers."""
        return _header(self.settings), [_cells(row) for row in self._shown(headline_only)]

    def legend(self) -> str:
        """Return what the columns are."""
        return _legend(self)

    def all_notes(self) -> list[str]:
        """Return the notes on the runs and those of single rows."""
        own = [f"{row.name} {_metric(row)}: {row.note}" for row in self.rows if row.note]
        return [*self.notes, *own]

    def to_markdown(self, *, headline_only: bool = False) -> str:
        """Return a table in GitHub's Markdown, with the legend and the notes below it."""
        header, rows = self.table(headline_only=headline_only)
        for row, cells in zip(self._shown(headline_only), rows, strict=True):
            if row.verdict != "inconclusive" and row.headline:
                cells[-1] = Markup(f"**{cells[-1]}**")
        table = markdown_table(header, rows, right=_NUMBERS, compact=True)
        lines = [f"A: {markdown_cell(self.a)}  ", f"B: {markdown_cell(self.b)}", ""]
        lines += [table, self.summary(), "", _legend(self)]
        lines += ["", *(f"- {markdown_cell(note)}" for note in self.all_notes())]
        return "\n".join(lines).rstrip() + "\n"

    def to_terminal(self, *, width: int | None = None, colour: bool = False) -> str:
        """Return the comparison as text for a terminal, nothing of it cut.

        Where the table does not fit, every row is written out over as many lines as it needs.

        Args:
            width: Columns; None: the terminal's, without a limit where the output is no terminal.
            colour: Whether to mark verdicts with colour codes.
        """
        from rich.console import Console
        from rich.measure import Measurement
        from rich.text import Text

        columns = width or shutil.get_terminal_size((_NO_LIMIT, 24)).columns
        console = Console(
            file=io.StringIO(), width=_NO_LIMIT, force_terminal=colour, no_color=not colour,
            markup=False, highlight=False, emoji=False,
        )  # fmt: skip
        for name, run in (("A", self.a), ("B", self.b)):
            heading = [f"{name}: {run.label}", *([f"({run.path})"] if run.path else [])]
            console.print(_wrapped(heading, columns, indent="   "), soft_wrap=True)
        console.print()
        table = self._table()
        natural = Measurement.get(console, console.options, table).maximum
        if natural <= columns:
            console.print(table, width=natural)
        else:
            for text, style in self._written_out(columns):
                console.print(Text(text, style=style), soft_wrap=True)
        console.print("\n" + _wrapped(self.summary().split(" "), columns), soft_wrap=True)
        console.print(_wrapped(_SHORT_LEGEND.split(" "), columns), soft_wrap=True)
        for note in self.all_notes():
            console.print(_wrapped(f"note: {note}".split(" "), columns), soft_wrap=True)
        stream = console.file
        return stream.getvalue() if isinstance(stream, io.StringIO) else ""

    def _table(self) -> Table:
        from rich.table import Table

        table = Table(box=None, pad_edge=False, padding=(0, 1))
        for index, name in enumerate(_header(self.settings)):
            justify: Literal["left", "right"] = "right" if index in _NUMBERS else "left"
            table.add_column(name, justify=justify, no_wrap=True)
        for row in self.rows:
            table.add_row(*_cells(row), style=_STYLES[row.verdict])
        return table

    def _written_out(self, columns: int) -> Iterator[tuple[str, str]]:
        """Each row as text of no more than so many columns, with its style."""
        names = _header(self.settings)
        longest = max((len(_metric(row)) for row in self.rows), default=0)
        before = None
        for row in self.rows:
            cells = _cells(row)
            if cells[0] != before:
                yield cells[0], "bold"
                before = cells[0]
            said = f"{cells[1] + ':':<{longest + 1}} {cells[-1]:<14}"
            scores = [f"{cells[3]} -> {cells[4]}"] if cells[3] or cells[4] else []
            change = [f"{cells[5]} ({cells[6]})" if cells[6] else cells[5]] if cells[5] else []
            rest = [f"{names[i]} {cells[i]}" for i in (7, 2, 8, 9) if cells[i]]
            parts = [said, *scores, *change, *rest]
            yield (
                _wrapped(parts, columns, between="  ", first="  ", indent="      "),
                _STYLES[row.verdict],
            )

    def summary(self) -> str:
        """Return how many tasks and groups improved, regressed or are open, and other metrics."""
        rows = [row for row in self.rows if row.headline]
        what = "task or group" if len(rows) == 1 else "tasks and groups"
        metrics = ", ".join(dict.fromkeys(_metric(row) for row in rows))
        text = f"{len(rows)} {what} by {metrics or 'no metric'}: {_counts(rows)}"
        others = [row for row in self.rows if not row.headline and row.result is not None]
        further = f" Further metrics, in brackets, which do not decide: {_counts(others)}."
        further = further if others else ""
        lost = f"; not tested: {self.not_finite} non-finite answers" if self.not_finite else ""
        if not self.tested:
            return f"{len(rows)} {what}: no verdict, nothing could be tested{lost}."
        names = self.not_tested
        if names:
            more = f" and {len(names) - 6} more" if len(names) > 6 else ""
            lost += f"; {len(names)} {_metrics(names)} not tested ({', '.join(names[:6])}{more})"
        return f"{text}{lost}.{further}"

    def _shown(self, headline_only: bool) -> Sequence[Row]:
        return [row for row in self.rows if row.headline or not headline_only]


_INFINITE = ("stderr", "minimum_detectable")


def _finite_or_not(row: Mapping[str, Any]) -> dict[str, Any]:
    """Return a row of JSON in which null stands for a number that was not finite, as numbers."""
    if row.get("result") is None:
        return dict(row)
    result: dict[str, Any] = {
        key: math.inf if key in _INFINITE and one is None else one
        for key, one in row["result"].items()
    }
    ends = result["interval"].values()
    return {**row, "result": {**result, "interval": [math.nan if e is None else e for e in ends]}}


_VERDICTS: tuple[Verdict, ...] = ("improved", "regressed", "inconclusive")
_STYLES = {"improved": "green", "regressed": "bold red", "inconclusive": ""}
_NO_LIMIT = 1 << 16


def _counts(rows: Sequence[Row]) -> str:
    return ", ".join(f"{sum(row.verdict == said for row in rows)} {said}" for said in _VERDICTS)


def _wrapped(
    parts: Sequence[str], columns: int, *, between: str = " ", first: str = "", indent: str = ""
) -> str:
    """Join parts over lines of so many columns; a part stays whole even where it is longer."""
    lines = [first + parts[0]]
    for part in parts[1:]:
        joined = lines[-1] + between + part
        if len(joined) <= columns:
            lines[-1] = joined
        else:
            lines.append(indent + part)
    return "\n".join(line.rstrip() for line in lines)


def _metrics(names: Sequence[str]) -> str:
    return "metric" if len(names) == 1 else "metrics"


def _header(settings: Settings) -> list[str]:
    interval = f"{100 * settings.confidence:g} % interval"
    return ["task", "metric", "documents", "A", "B", "B - A", interval, "p (adjusted)",
            "gained/lost", "detectable", "verdict"]  # fmt: skip


def _cells(row: Row) -> list[str]:
    name = f"{row.name} (group)" if row.kind == "group" else row.name
    verdict = row.verdict if row.result is not None else "not tested"
    said = verdict if row.headline else f"({verdict})"
    start = [name, _metric(row)]
    if row.result is None:
        both = row.score_a is not None and row.score_b is not None
        change = f"{(row.score_b or 0) - (row.score_a or 0):+.4f}" if both else ""
        return [*start, "", _score(row.score_a), _score(row.score_b), change, *[""] * 4, said]
    found = row.result
    documents = str(found.documents)
    if found.clusters is not None:
        documents += f" ({found.clusters} {row.clustered_by or 'cluster'}s)"
    flips = f"+{found.flips.gained} / -{found.flips.lost}" if found.flips else ""
    low, high = found.interval
    interval = f"{low:+.4f} ... {high:+.4f}" if math.isfinite(low + high) else "unknown"
    return [
        *start, documents, _score(row.score_a), _score(row.score_b), f"{found.difference:+.4f}",
        interval, "" if row.p_adjusted is None else p_value_text(row.p_adjusted), flips,
        f"{found.minimum_detectable:.4f}" if math.isfinite(found.minimum_detectable) else "",
        said,
    ]  # fmt: skip


def _metric(row: Row) -> str:
    name = row.metric if row.filter in ("none", "") else f"{row.metric} ({row.filter})"
    if row.higher_is_better is False:
        name += ", lower is better"
    return f"{name} *" if row.derived else name


def _legend(comparison: Comparison) -> str:
    settings = comparison.settings
    shown = {row.metric for row in comparison.rows if row.derived} | {"acc_corrected"}
    columns = [f"{c.metric}: {c.says}" for c in CALIBRATORS.values() if c.metric in shown]
    return (
        "B - A on the same documents, with its paired interval (Bonett and Price's for 0/1 metrics "
        "of single documents, otherwise by bootstrap, below ten units Student's); p: exact "
        "McNemar for 0/1 metrics of single documents, otherwise random signs of the documents' or "
        "clusters' differences, adjusted by Benjamini-Hochberg over the rows of its kind; "
        "gained/lost: documents right in B only and in A only; detectable: the true difference "
        "that would be found in 80 % of repetitions as the only one among the rows of its kind, "
        f"empty where none could be; *: computed from the samples ({'; '.join(columns)}; "
        "margin: score of the right choice minus the best wrong one, in nats). A verdict needs "
        f"p at most {settings.alpha:g} and an interval without zero. Verdicts in brackets are of "
        "further metrics of a task: they are no finding about its score and do not count in the "
        "line above."
    )


_SHORT_LEGEND = (
    "gained/lost: documents right in B only, in A only; detectable: the smallest true difference "
    "that 4 of 5 such runs would find; *: computed from the samples."
)


def _score(value: float | None) -> str:
    return "" if value is None else f"{value:.4f}"
