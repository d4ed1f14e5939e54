"""Two pictures of the category scores: bars with intervals, and MT-Bench's usual radar."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from act_harness.evidence.figures import (
    GREY,
    PALETTE,
    figure_text,
    head_figure,
    new_figure,
    save_figure,
)
from act_harness.mtbench.judge.scores import ArmScores

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["RADAR_CATEGORIES", "category_bars", "category_radar"]

RADAR_CATEGORIES = 3
"""Fewest categories that make a shape around a circle."""

# Okabe and Ito: told apart by colour-blind readers and in print.
_COLOURS = (GREY, *PALETTE[:5])


def category_bars(arms: Sequence[ArmScores], path: Path, *, judge: str) -> Path:
    """Draw every category's score for each arm, with its interval.

    Raises:
        InputError: matplotlib is not installed.
        InfrastructureError: the file cannot be written.
    """
    names = _categories(arms)
    figure = new_figure(width=2.0 + 0.95 * len(names), height=4.0)
    axes = figure.subplots()
    width = 0.8 / len(arms)
    for number, arm in enumerate(arms):
        colour = _COLOURS[number % len(_COLOURS)]
        for place, name in enumerate(names):
            score = arm.categories.get(name)
            if score is None:
                continue
            at = place + (number - (len(arms) - 1) / 2) * width
            axes.bar(
                at, score.mean, 0.92 * width, color=colour, label=figure_text(arm.arm), zorder=2
            )
            if score.low is not None and score.high is not None:
                ends = [[score.mean - score.low], [score.high - score.mean]]
                axes.errorbar(at, score.mean, yerr=ends, color="black", capsize=2.5, linewidth=1)
    axes.set_xticks(range(len(names)), names)
    axes.set_ylim(0, 10.5)
    axes.set_ylabel("mean rating, 1 to 10")
    axes.grid(axis="y", color="#dddddd", linewidth=0.6)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    _finish(figure, axes, f"MT-Bench by category, judged by {judge}")
    return save_figure(figure, path)


def category_radar(arms: Sequence[ArmScores], path: Path, *, judge: str) -> Path:
    """Draw every arm's category scores as a closed line around a circle.

    A category without a score leaves a gap in the line.

    Raises:
        InputError: matplotlib is not installed.
        InfrastructureError: the file cannot be written.
    """
    names = _categories(arms)
    figure = new_figure(width=6.0, height=5.6)
    axes: Any = figure.subplots(subplot_kw={"projection": "polar"})
    axes.set_theta_offset(math.pi / 2)
    axes.set_theta_direction(-1)
    angles = [2 * math.pi * place / len(names) for place in range(len(names))]
    for number, arm in enumerate(arms):
        scores = [arm.categories.get(name) for name in names]
        values = [math.nan if score is None else score.mean for score in scores]
        axes.plot(
            [*angles, angles[0]], [*values, values[0]], marker="o", markersize=4,
            color=_COLOURS[number % len(_COLOURS)], label=figure_text(arm.arm),
        )  # fmt: skip
    axes.set_xticks(angles, names)
    axes.tick_params(axis="x", pad=14)
    axes.set_ylim(0, 10)
    axes.set_rlabel_position(180 / len(names))
    _finish(figure, axes, f"MT-Bench, judged by {judge}")
    return save_figure(figure, path)


def _categories(arms: Sequence[ArmScores]) -> list[str]:
    return list(dict.fromkeys(name for arm in arms for name in arm.categories))


def _finish(figure: Figure, axes: Any, title: str) -> None:  # noqa: ANN401 - matplotlib's axes
    handles, labels = axes.get_legend_handles_labels()
    unique = dict(zip(labels, handles, strict=True))
    figure.legend(
        unique.values(), unique.keys(), loc="outside lower center", ncols=3, frameon=False,
        fontsize=8.5,
    )  # fmt: skip
    head_figure(figure, title)
