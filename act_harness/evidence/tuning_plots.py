"""Plots of a search by gradient: how tuning went, and its strengths beside heads' own effects."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from act_harness.errors import ResultError
from act_harness.evidence.figures import PALETTE, head_figure, new_figure, save_figure
from act_harness.evidence.stats import spearman

if TYPE_CHECKING:
    from matplotlib.axes import Axes

__all__ = ["strengths_against_effects", "training_curves"]


def training_curves(
    history: Sequence[Mapping[str, Any]],
    path: str | os.PathLike[str],
    *,
    untouched: float | None = None,
    taken: Mapping[str, Any] | None = None,
    title: str = "",
    label: str = "verify score",
) -> Path:
    """Draw loss by epoch on both splits, and what verify chooses by, a colour a run.

    Args:
        history: By run and epoch: ``penalty``, ``restart``, ``epoch``, ``loss``, and ``verify`` and
            ``verify_loss``, None where verify was not measured.
        path: The PNG file.
        untouched: The untouched model's score on verify.
        taken: ``run`` (penalty and restart) and ``epoch`` that verify chose; marked.
        title: Heading.
        label: What verify chooses by.

    Raises:
        ResultError: No epoch.
        InfrastructureError: The file cannot be written.
        InputError: matplotlib is not installed.
    """
    runs: dict[tuple[float, int], list[Mapping[str, Any]]] = {}
    for one in history:
        runs.setdefault((one["penalty"], one["restart"]), []).append(one)
    if not runs:
        raise ResultError("nothing to draw: no epoch was trained")
    figure = new_figure(width=9.5, height=4.0 + 0.12 * len(runs))
    losses, scores = figure.subplots(1, 2, sharex=True)
    for number, (run, epochs) in enumerate(runs.items()):
        colour = PALETTE[number % len(PALETTE)]
        name = f"penalty {run[0]:g}, run {run[1] + 1}" if len(runs) > 1 else "strengths"
        seen = [one for one in epochs if one["verify"] is not None]
        _line(losses, epochs, "loss", colour)
        _line(losses, seen, "verify_loss", colour, dashed=True)
        _line(scores, seen, "verify", colour, name)
        if taken is not None and taken["run"] == {"penalty": run[0], "restart": run[1]}:
            place = next(one for one in epochs if one["epoch"] == taken["epoch"])
            scores.plot(
                place["epoch"], place["verify"], marker="o", markersize=12, linestyle="none",
                markerfacecolor="none", markeredgecolor="black", label="taken",
            )  # fmt: skip
    if untouched is not None:
        scores.axhline(untouched, color="black", linewidth=0.8, label="untouched model")
    losses.plot([], [], color="#444444", label="loss on search, with its temperature")
    losses.plot([], [], color="#444444", linestyle="--", label="loss on verify, without")
    losses.set_ylabel("loss, nats a document")
    scores.set_ylabel(label)
    for axes in (losses, scores):
        _finish(axes, "epoch", whole=True)
    figure.legend(loc="outside lower center", ncols=3, fontsize=8.5, frameon=False)
    head_figure(figure, title)
    return save_figure(figure, path)


def strengths_against_effects(
    strengths: Mapping[str, npt.ArrayLike],
    effects: npt.ArrayLike,
    path: str | os.PathLike[str],
    *,
    title: str = "",
    label: str = "effect of calibrating a head alone",
) -> Path:
    """Draw what was tuned of each head against what calibrating it alone changes.

    Args:
        strengths: Log strengths by name, (layers, heads) each; NaN where none was tuned.
        effects: Of single heads, (layers, heads); NaN where a head was not measured.
        path: The PNG file.
        title: Heading.
        label: What the effects are.

    Raises:
        ResultError: Other shapes, or fewer than two heads that have both.
        InfrastructureError: The file cannot be written.
        InputError: matplotlib is not installed.
    """
    alone = np.asarray(effects, dtype=np.float64)
    tuned = {name: np.asarray(one, dtype=np.float64) for name, one in strengths.items()}
    for one in tuned.values():
        if one.shape != alone.shape:
            raise ResultError(
                f"strengths of shape {one.shape} and effects of shape {alone.shape} are of "
                "different models"
            )
        if int((np.isfinite(one) & np.isfinite(alone)).sum()) < 2:
            raise ResultError("fewer than two heads have both a strength and an effect")
    figure = new_figure(width=4.6 * len(tuned), height=4.0)
    for axes, (name, one) in zip(
        figure.subplots(1, len(tuned), squeeze=False).ravel(), tuned.items(), strict=True
    ):
        both = np.isfinite(one) & np.isfinite(alone)
        axes.plot(alone[both], one[both], ".", color=PALETTE[0], markersize=5, alpha=0.7)
        axes.axhline(0.0, color="black", linewidth=0.8)
        axes.axvline(0.0, color="black", linewidth=0.8)
        rank = "none: one of them is constant"
        if np.ptp(one[both]) > 0 and np.ptp(alone[both]) > 0:
            rank = f"{spearman(alone[both], one[both]):+.2f}"
        axes.set_title(f"{int(both.sum())} heads, rank correlation {rank}", fontsize=9.5)
        axes.set_ylabel(name)
        _finish(axes, label)
    head_figure(figure, title)
    return save_figure(figure, path)


def _line(
    axes: Axes,
    epochs: Sequence[Mapping[str, Any]],
    key: str,
    colour: str,
    label: str | None = None,
    *,
    dashed: bool = False,
) -> None:
    axes.plot(
        [one["epoch"] for one in epochs], [one[key] for one in epochs], color=colour, label=label,
        linewidth=1.4, marker="o", markersize=3.5, linestyle="--" if dashed else "-",
    )  # fmt: skip


def _finish(axes: Axes, label: str, *, whole: bool = False) -> None:
    from matplotlib.ticker import MaxNLocator

    axes.spines[["top", "right"]].set_visible(False)
    axes.set_xlabel(label)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True) if whole else MaxNLocator(5))
