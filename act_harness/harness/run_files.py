"""What ``act-harness eval`` writes: each arm as lm-eval lays it out, the comparison, its report."""

from __future__ import annotations

import logging
import statistics
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

from act_harness.errors import install_command
from act_harness.evidence.compare import Comparison
from act_harness.evidence.plots import comparison_files
from act_harness.evidence.results import task_file_name
from act_harness.evidence.tables import markdown_table
from act_harness.support import atomic

__all__ = [
    "SeedAverage",
    "averages_table",
    "counters_line",
    "scores_of",
    "seed_averages",
    "shown",
    "write_report",
    "write_run",
]

_logger = logging.getLogger(__name__)


class SeedAverage(NamedTuple):
    """One task's metric over several few-shot seeds."""

    name: str
    metric: str
    baseline: float
    act: float
    difference: float
    spread: float
    """Standard deviation of the difference over seeds."""


def write_run(results: dict[str, Any], folder: Path, stamp: str) -> None:
    """Write one arm as lm-eval's tracker lays it out, whole files only."""
    from lm_eval.utils import handle_non_serializable, hash_string, sanitize_list

    samples, calibrators = results.pop("samples", {}), results.pop("calibrators", {})
    results["task_hashes"] = {
        task: hash_string(
            "".join(s["doc_hash"] + s["prompt_hash"] + s["target_hash"] for s in rows)
        )
        for task, rows in samples.items()
    }
    for task, rows in samples.items():
        lines = []
        for row in rows:
            arguments = {
                f"gen_args_{i}": {f"arg_{j}": value for j, value in enumerate(given)}
                for i, given in enumerate(row["arguments"])
            }
            line = {
                **row,
                "arguments": arguments,
                "resps": sanitize_list(row["resps"]),
                "filtered_resps": sanitize_list(row["filtered_resps"]),
                "target": str(row["target"]),
            }
            lines.append(line)
        path = folder / f"samples_{task_file_name(task)}_{stamp}.jsonl"
        atomic.write_lines(path, lines, default=handle_non_serializable)
    if calibrators:  # a file of their own: thousands of numbers that no reader of results expects
        atomic.write_json(folder / f"calibrators_{stamp}.json", calibrators)
    atomic.write_json(folder / f"results_{stamp}.json", results, default=handle_non_serializable)


def scores_of(results: dict[str, Any]) -> tuple[tuple[str, str, float | None], ...]:
    """Return the table of a run: task, metric, value of every number that it reports."""
    rows = []
    for name, values in results["results"].items():
        for key, value in values.items():
            metric, comma, _ = key.partition(",")
            if comma and not metric.endswith("_stderr"):
                rows.append((name, metric, value if isinstance(value, int | float) else None))
    return tuple(rows)


def seed_averages(comparisons: dict[int, Comparison]) -> tuple[SeedAverage, ...]:
    """Average every row over the seeds' comparisons."""
    rows: dict[tuple[str, str, str], list[tuple[float, float]]] = {}
    for comparison in comparisons.values():
        for row in comparison.rows:
            if row.score_a is not None and row.score_b is not None:
                key = (row.name, row.metric, row.filter)
                rows.setdefault(key, []).append((row.score_a, row.score_b))
    found = []
    for (name, metric, _), pairs in rows.items():
        changes = [b - a for a, b in pairs]
        found.append(
            SeedAverage(
                name,
                metric,
                baseline=statistics.fmean(a for a, _ in pairs),
                act=statistics.fmean(b for _, b in pairs),
                difference=statistics.fmean(changes),
                spread=statistics.stdev(changes) if len(changes) > 1 else 0.0,
            )
        )
    return tuple(found)


def averages_table(averages: Sequence[SeedAverage], seeds: int) -> str:
    """Return the averages over few-shot seeds as a Markdown table."""
    header = ("task", "metric", "baseline", "ACT", "difference", f"sd over {seeds} seeds")
    rows = [
        (
            a.name,
            a.metric,
            shown(a.baseline),
            shown(a.act),
            f"{a.difference:+.4f}",
            f"{a.spread:.4f}",
        )
        for a in averages
    ]
    return markdown_table(header, rows)


def write_report(
    folder: Path,
    comparisons: dict[int, Comparison],
    averages: tuple[SeedAverage, ...],
    counters: dict[str, Any],
) -> Path:
    """Write the comparison (one for each seed) and what calibration did; return the main file."""
    atomic.write_json(folder / "counters.json", counters)
    told = f"\nCalibration: {counters_line(counters)}\n"
    if len(comparisons) == 1:
        (only,) = comparisons.values()
        written = _write_comparison(only, folder)
        return atomic.write_text(written, written.read_text(encoding="utf-8") + told)
    for seed, comparison in comparisons.items():
        _write_comparison(comparison, folder / f"seed-{seed}")
    text = averages_table(averages, len(comparisons))
    links = "\n".join(f"- [seed {s}](seed-{s}/comparison.md)" for s in comparisons)
    return atomic.write_text(folder / "comparison.md", f"{text}\n\n{links}\n{told}")


def _write_comparison(comparison: Comparison, folder: Path) -> Path:
    """Write table, JSON and, where matplotlib (extra ``report``) is there, the plot."""
    if find_spec("matplotlib") is not None:
        return comparison_files(comparison, folder)["comparison.md"]
    _logger.warning("no plots: matplotlib is not installed; run: %s", install_command("report"))
    atomic.write_json(folder / "comparison.json", comparison.to_json())
    return atomic.write_text(folder / "comparison.md", comparison.to_markdown())


def counters_line(counters: dict[str, Any]) -> str:
    """Return what calibration did, as one line."""
    share, moved = counters["share_of_pairs_with_sink"], counters["mean_moved_mass"]
    asides = [f"{counters[key]} {key.replace('_', ' ')}" for key in _ASIDES if counters.get(key)]
    if not counters["prompts"]:
        idle = "no head was in force; nothing was calibrated, both arms are the stock model"
        return ", ".join([idle, *asides])
    # Heads that amplify count against heads that damp: the sum of a large set may be near 0.
    way = "onto" if moved is not None and moved < 0 else "off"
    size = shown(None if moved is None else abs(moved))
    parts = [
        f"{counters['prompts']} prompts",
        f"{shown(share)} of (head, prompt) pairs with a sink",
        f"{size} of the attention moved {way} calibrated columns, net",
    ]
    line = ", ".join([*parts, *asides])
    # Zero is no rounding here: no head saw a sink, so nothing of what is compared was calibrated.
    return f"{line}; nothing was calibrated, both arms are the stock model" if moved == 0 else line


_ASIDES = (
    "prompts_near_threshold",
    "prompts_too_short",
    "prompts_truncated",
    "requests_skipped",
    "requests_with_empty_continuation",
    "documents_open_to_search",
)
"""Counters that are told where they are not 0: they decide what the scores are worth."""


def shown(value: float | None) -> str:
    """Return a value with four decimals, ``-`` where there is none."""
    return "-" if value is None else f"{value:.4f}"
