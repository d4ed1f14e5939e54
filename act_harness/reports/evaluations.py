"""Sections of a report about evaluations: both arms, their differences, every calibrator's column.

The weakest figures come first: what regressed, then by the difference, in the direction in which
each metric is better.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from statistics import NormalDist
from typing import Any

import scipy.stats  # type: ignore[import-untyped]

from act_harness.errors import ResultError
from act_harness.evidence.calibrators import CALIBRATORS
from act_harness.evidence.compare import compare
from act_harness.evidence.comparison import Comparison, Row, RunInfo
from act_harness.evidence.plots import Span, span_plot
from act_harness.evidence.results import Run, load_run
from act_harness.evidence.summary_plots import Score, score_plot
from act_harness.harness.run_files import counters_line
from act_harness.reports.parts import Figure, Section, Table
from act_harness.reports.sources import Source
from act_harness.support import reading

__all__ = ["evaluation_sections"]

_CONFIDENCE = 0.95


def evaluation_sections(sources: Sequence[Source]) -> list[Section]:
    """Return a section for each comparison, and one for runs that none compares.

    Two such runs are compared here, the baseline being the one whose name says so, else the first.

    Raises:
        ResultError: A file is malformed.
        InfrastructureError: A file cannot be read.
    """
    runs = {_place(one.path): load_run(one.path) for one in sources if one.kind == "run"}
    sections = []
    for one in (one for one in sources if one.kind == "comparison"):
        found = Comparison.from_json(one.content, str(one.path))
        sections.append(_compared(found, _arms(found, runs), one.path))
        for info in (found.a, found.b):
            if info.path is not None:
                runs.pop(_place(Path(info.path)), None)
    left = sorted(runs.values(), key=lambda run: "baseline" not in run.label)
    note = ""
    if len(left) == 2:
        try:
            found = compare(*left)
        except ResultError as error:
            note = f"The two runs cannot be compared: {error}"
        else:
            return [*sections, _compared(found, (left[0], left[1]), left[1].path)]
    return [*sections, _uncompared(left, note)] if left else sections


# -- a comparison ----------------------------------------------------------------------------------


def _compared(found: Comparison, arms: tuple[Run | None, Run | None], path: Path | None) -> Section:
    found = replace(found, rows=tuple(sorted(found.rows, key=_weakness)))
    headline = [row for row in found.rows if row.headline]
    header, cells = found.table(headline_only=True)
    numbers = range(2, len(header) - 1)
    tables = [Table(header, cells, numbers, [row.verdict for row in headline], "By task")]
    tables += _calibrations(found.rows)
    if len(headline) < len(found.rows):
        cells = found.table()[1]
        verdicts = [row.verdict if row.headline else "" for row in found.rows]
        tables.append(Table(header, cells, numbers, verdicts, "Every metric"))
    return Section(
        title=f"{found.b.label} against {found.a.label}",
        source=str(path),
        lines=[f"A: {found.a}", f"B: {found.b}", found.summary(), *_counted(path)],
        figures=[*_scores(headline, found, arms), *_differences(found.rows)],
        tables=tables,
        notes=[found.legend(), *found.all_notes()],
        worst=_worst(found),
        order=_weakness(found.rows[0])[1] if found.rows else math.inf,
    )


def _weakness(row: Row) -> tuple[int, float]:
    """Return what rows are ordered by, the weakest first; those without a change are last."""
    rank = {"regressed": 0, "inconclusive": 1, "improved": 2}[row.verdict] if row.headline else 3
    change = row.result.difference if row.result else _change(row)
    gain = -change if row.higher_is_better is False else change
    return (rank, gain) if math.isfinite(gain) else (4, math.inf)


def _change(row: Row) -> float:
    if row.score_a is None or row.score_b is None:
        return math.nan
    return row.score_b - row.score_a


def _worst(found: Comparison) -> str:
    row = next((row for row in found.rows if row.headline and row.result is not None), None)
    if row is None or row.result is None:
        return f"{found.b.label} against {found.a.label}: nothing could be tested"
    low, high = row.result.interval
    return (
        f"{found.b.label} against {found.a.label}: {row.name} {row.metric} "
        f"{row.result.difference:+.4f} ({low:+.4f} to {high:+.4f}), {row.verdict}"
    )


def _counted(path: Path | None) -> list[str]:
    """Return what calibration did, as ``eval`` leaves it beside its comparison."""
    beside = None if path is None else path.with_name("counters.json")
    if beside is None or not reading.is_file(beside):
        return []
    try:
        return [f"Calibration: {counters_line(reading.read_json(beside, lenient=True))}"]
    except (KeyError, TypeError):
        return []  # somebody else's file of that name


def _scores(
    rows: Sequence[Row], found: Comparison, arms: tuple[Run | None, Run | None]
) -> list[Figure]:
    panels: dict[str, list[Score]] = {}
    names = _arm_names(found.a, found.b)
    for row in rows:
        for side, run, name in zip(("a", "b"), arms, names, strict=True):
            value = getattr(row, f"score_{side}")
            if value is not None:
                ends = _ends(value, row, run, found.settings.confidence)
                panels.setdefault(row.metric, []).append(Score(row.name, name, value, *ends))
    return _score_figure(panels, f"Both arms' scores, {found.settings.confidence:.0%} intervals")


def _score_figure(panels: Mapping[str, Sequence[Score]], title: str) -> list[Figure]:
    if not panels:
        return []
    rows = [(metric, *one) for metric, own in panels.items() for one in own]
    draw = partial(score_plot, panels, title=title)
    return [Figure("scores", title, draw, ["metric", *Score._fields], rows)]


def _arm_names(a: RunInfo, b: RunInfo) -> tuple[str, str]:
    return (f"A: {a.label}", f"B: {b.label}")


def _ends(
    value: float, row: Row, run: Run | None, confidence: float
) -> tuple[float, float] | tuple[None, None]:
    """Return an arm's own interval: by lm-eval's standard error, else Wilson's of its answers."""
    if run is not None:
        found = _by_stderr(run, row.name, row.metric, row.filter, value, confidence)
        if found is not None:
            return found
    result = row.result
    if result is None or result.flips is None or result.clusters is not None or row.kind != "task":
        return None, None
    right = min(max(round(value * result.documents), 0), result.documents)
    test = scipy.stats.binomtest(right, result.documents)
    interval = test.proportion_ci(confidence_level=confidence, method="wilson")
    return float(interval.low), float(interval.high)


def _by_stderr(
    run: Run, name: str, metric: str, kind: str, value: float, confidence: float
) -> tuple[float, float] | None:
    error = run.score(name, f"{metric}_stderr", kind)
    if error is None:
        return None
    reach = NormalDist().inv_cdf((1 + confidence) / 2) * error
    return value - reach, value + reach


def _differences(rows: Sequence[Row]) -> list[Figure]:
    """Return the forest plot, and that of the metrics that calibrate scores."""
    tested = [row for row in rows if row.tested]
    corrected = {one.metric for one in CALIBRATORS.values()}
    kinds = {
        "differences": ("Paired differences, B - A", [r for r in tested if r.headline]),
        "calibrators": (
            "Paired differences of calibrated scores, B - A",
            [r for r in tested if r.metric in corrected],
        ),
    }
    return [_forest(name, title, own) for name, (title, own) in kinds.items() if own]


def _forest(name: str, title: str, rows: Sequence[Row]) -> Figure:
    panels: dict[str, list[Span]] = {}
    for row in rows:
        if row.result is not None:
            worse = " (lower is better)" if row.higher_is_better is False else ""
            panels.setdefault(f"{row.metric}{worse}: B - A, with interval", []).append(
                Span(
                    row.name, row.result.difference, *row.result.interval, row.verdict,
                    row.kind == "group", row.result.documents,
                )
            )  # fmt: skip
    data = [(axis.split(":")[0], *one) for axis, own in panels.items() for one in own]
    draw = partial(span_plot, panels, title=title)
    return Figure(name, title, draw, ["metric", *Span._fields], data)


def _calibrations(rows: Sequence[Row]) -> list[Table]:
    """Return the table of every calibration of scores beside the plain accuracy."""
    known = {one.metric: one.name for one in CALIBRATORS.values()}
    shown = [m for m in known if any(row.metric == m for row in rows)]
    if not shown:
        return []
    columns = ["acc", *shown]
    names = dict.fromkeys(row.name for row in rows if row.metric in shown)
    by_place = {(row.name, row.metric): row for row in rows}
    cells = [[name, *(_both(by_place.get((name, metric))) for metric in columns)] for name in names]
    header = ["task", "acc", *(f"{metric} ({known[metric]})" for metric in shown)]
    caption = "Every calibration of the choices' scores: A to B (difference; interval)"
    return [Table(header, cells, range(1, len(header)), caption=caption)]


def _both(row: Row | None) -> str:
    if row is None or row.score_a is None or row.score_b is None:
        return ""
    text = f"{row.score_a:.4f} to {row.score_b:.4f}"
    if row.result is None:
        return text
    low, high = row.result.interval
    return f"{text} ({row.result.difference:+.4f}; {low:+.4f} to {high:+.4f})"


# -- runs ------------------------------------------------------------------------------------------


def _uncompared(runs: Sequence[Run], note: str) -> Section:
    panels: dict[str, list[Score]] = {}
    rows: list[tuple[float, list[str]]] = []
    for run in runs:
        for name in (*run.tasks, *run.groups):
            for number, (metric, kind) in enumerate(run.metrics(name)):
                value = run.score(name, metric, kind)
                if value is None:
                    continue
                ends = _by_stderr(run, name, metric, kind, value, _CONFIDENCE)
                low, high = ends or (None, None)
                span = "" if ends is None else f"{ends[0]:.4f} to {ends[1]:.4f}"
                rows.append((value, [run.label, name, metric, kind, f"{value:.4f}", span]))
                if number == 0:
                    panels.setdefault(metric, []).append(Score(name, run.label, value, low, high))
    for own in panels.values():
        own.sort(key=lambda score: score.value)
    rows.sort(key=lambda row: (row[1][2], row[0]))
    header = ["run", "task", "metric", "filter", "score", "95 % interval"]
    return Section(
        title="Runs" if len(runs) > 1 else f"Run {runs[0].label}",
        source=", ".join(str(run.path) for run in runs),
        lines=[note] if note else [],
        figures=_score_figure(panels, "Scores of each run, 95% intervals"),
        tables=[Table(header, [cells for _, cells in rows], (4, 5))],
        notes=[note for run in runs for note in run.notes],
        worst=f"{rows[0][1][0]}: {rows[0][1][1]} {rows[0][1][2]} {rows[0][1][4]}" if rows else "",
    )


def _arms(found: Comparison, runs: Mapping[Any, Run]) -> tuple[Run | None, Run | None]:
    """Return the runs of a comparison where they are at hand."""
    one, two = (_run(info, runs) for info in (found.a, found.b))
    return one, two


def _run(info: RunInfo, runs: Mapping[Any, Run]) -> Run | None:
    if info.path is None:
        return None
    given = Path(info.path)
    if _place(given) in runs:
        return runs[_place(given)]
    try:
        return load_run(given) if reading.is_file(given) else None
    except ResultError:
        return None


def _place(path: Path) -> tuple[str, ...]:
    """Return what names a run wherever its folders were copied to."""
    return path.absolute().parts[-3 if path.parent.name.startswith("seed-") else -2 :]
