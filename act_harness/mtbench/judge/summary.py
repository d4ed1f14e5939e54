"""The scores as text, as files and as numbers for tracking."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from act_harness.errors import InputError
from act_harness.evidence.tables import markdown_cell, markdown_table
from act_harness.mtbench.judge.plots import RADAR_CATEGORIES, category_bars, category_radar
from act_harness.mtbench.judge.scores import ArmScores, Difference, Score
from act_harness.mtbench.judge.settings import JudgeSettings
from act_harness.support import atomic, provenance

__all__ = ["scalars", "summary_text", "write_files"]


def summary_text(
    arms: Sequence[ArmScores], differences: Sequence[Difference], max_failure_rate: float
) -> str:
    """Return scores, differences and missing judgments as Markdown."""
    header = ["arm", "what", "score", "interval", "questions", "answers"]
    rows = [(arm.arm, what, *_cells(score)) for arm in arms for what, score in _named(arm)]
    lines = [markdown_table(header, rows, right=(2, 4, 5))]
    if differences:
        header = ["difference", "what", "mean", "interval", "p", "adjusted", "verdict"]
        lines.append(markdown_table(header, map(_difference, differences), right=(2, 4, 5)))
    lines += [*_missing_lines(arms, max_failure_rate)]
    for arm in arms:
        if arm.repeat_spread is not None:
            lines.append(
                f"{markdown_cell(arm.arm)}: repeated judgments of one answer have a standard "
                f"deviation of {arm.repeat_spread:.2f}"
            )
    return "\n".join(lines)


def _named(arm: ArmScores) -> Iterable[tuple[str, Score | None]]:
    yield "overall", arm.overall
    for turn, score in arm.turns.items():
        yield f"turn {turn}", score
    yield from arm.categories.items()


def _cells(score: Score | None) -> list[object]:
    if score is None:
        return ["-", "-", 0, 0]
    ends = "-" if score.low is None else f"[{score.low:.2f}, {score.high:.2f}]"
    return [f"{score.mean:.2f}", ends, score.questions, score.answers]


def _difference(difference: Difference) -> list[str]:
    found = difference.result
    adjusted = "-" if difference.p_adjusted is None else f"{difference.p_adjusted:.3f}"
    return [
        f"{difference.b} - {difference.a}",
        difference.what,
        f"{found.difference:+.2f}",
        f"[{found.interval.low:+.2f}, {found.interval.high:+.2f}]",
        f"{found.p_value:.3f}",
        adjusted,
        difference.verdict,
    ]


def _missing_lines(arms: Sequence[ArmScores], max_failure_rate: float) -> list[str]:
    lines = []
    total = missing = 0
    for arm in arms:
        for turn, count in arm.missing.items():
            total, missing = total + count.judgments, missing + count.missing
            why = "; ".join(f"{reason}: {n}" for reason, n in sorted(count.reasons.items()))
            lines.append(
                f"{markdown_cell(arm.arm)}, turn {turn}: {count.missing} of {count.judgments} "
                f"judgments missing ({count.rate:.1%}){f', {markdown_cell(why)}' if why else ''}"
            )
    rate = missing / total if total else 0.0
    if rate > max_failure_rate:
        lines.append(
            f"FAILED: {rate:.1%} of the judgments are missing, more than {max_failure_rate:.1%} "
            "(--max-failure-rate); the scores above are of the rest and may not be compared. "
            "Repeat the command to ask for the missing ones again."
        )
    return lines


def scalars(arms: Sequence[ArmScores], differences: Sequence[Difference]) -> dict[str, object]:
    """Return the scores as flat numbers, ``mt_bench/<arm>/<what>``."""
    found: dict[str, object] = {}
    for arm in arms:
        for what, score in _named(arm):
            if score is not None:
                found[f"mt_bench/{arm.arm}/{what.replace(' ', '_')}"] = score.mean
        for turn, count in arm.missing.items():
            found[f"mt_bench/{arm.arm}/missing_turn_{turn}"] = count.rate
    for difference in differences:
        name = f"mt_bench/{difference.b}-minus-{difference.a}/{difference.what.replace(' ', '_')}"
        found[name] = difference.result.difference
        found[f"{name}_p"] = difference.result.p_value
    return found


def _arm(arm: ArmScores) -> dict[str, Any]:
    document = asdict(arm)
    for turn, count in arm.missing.items():
        document["missing"][turn]["rate"] = count.rate
    return document


def write_files(
    settings: JudgeSettings,
    arms: Sequence[ArmScores],
    differences: Sequence[Difference],
    *,
    calls: int,
    prompts: str,
) -> list[Path]:
    """Write ``scores.json``, ``scores.md`` and the plots; return their paths.

    Plots are left out where matplotlib is not installed or nothing was rated.

    Raises:
        InfrastructureError: the folder cannot be written.
    """
    folder = settings.output_folder
    drawn = []
    if any(arm.overall is not None for arm in arms):
        try:
            drawn = [category_bars(arms, folder / "categories.png", judge=settings.model)]
            if max(len(arm.categories) for arm in arms) >= RADAR_CATEGORIES:
                drawn.append(category_radar(arms, folder / "radar.png", judge=settings.model))
        except InputError:  # no matplotlib: the numbers are complete without pictures
            drawn = []
    document: dict[str, Any] = {
        "schema": "act-harness/mt-bench/1",
        "judge": settings.judge_identity(),
        "settings": settings.model_dump(mode="json", exclude={"paths", "output"}),
        "prompts": prompts,
        "calls": calls,
        "arms": [_arm(arm) for arm in arms],
        "differences": [asdict(difference) for difference in differences],
        "provenance": provenance.collect(seed=settings.seed).to_json(),
    }
    text = summary_text(arms, differences, settings.max_failure_rate)
    title = f"# MT-Bench, judged by {markdown_cell(settings.model)}\n\n"
    pictures = "".join(f"\n![{path.stem}]({path.name})\n" for path in drawn)
    return [
        atomic.write_json(folder / "scores.json", document),
        atomic.write_text(folder / "scores.md", f"{title}{text}\n{pictures}"),
        *drawn,
    ]
