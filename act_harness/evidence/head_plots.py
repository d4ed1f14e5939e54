"""Plots of heads: the map of all of them, and how few of them were taken and what these are worth.

Not here: the canvas (:mod:`act_harness.evidence.figures`) and any number. Effects and intervals
come from the caller.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import numpy.typing as npt

from act_harness.errors import ResultError
from act_harness.evidence.figures import (
    BLUE,
    GREY,
    head_figure,
    new_panels,
    save_figure,
)

if TYPE_CHECKING:
    from matplotlib.axes import Axes

__all__ = ["Curve", "head_map", "rank_plot"]


class Curve(NamedTuple):
    """An effect measured for several numbers of heads."""

    heads: Sequence[int]
    """How many heads were calibrated, ascending."""
    effect: Sequence[float]
    low: Sequence[float]
    """Lower ends of the confidence intervals."""
    high: Sequence[float]


def head_map(
    effects: npt.ArrayLike | Mapping[str, npt.ArrayLike],
    path: str | os.PathLike[str],
    *,
    selected: Mapping[int, Iterable[int]] | None = None,
    title: str = "",
    label: str = "effect",
) -> Path:
    """Draw one number a head as a map, layers down and heads across, the selected heads framed.

    Args:
        effects: The numbers, (layers, heads); NaN where a head was not measured (hatched). Or
            several such by name: maps side by side, on one scale.
        path: The PNG file.
        selected: Layer to heads, as in an artifact.
        title: Heading.
        label: What the numbers are.

    Raises:
        ResultError: Another shape, or a selected head outside it.
        InfrastructureError: The file cannot be written.
        InputError: matplotlib is not installed.
    """
    named = effects if isinstance(effects, Mapping) else {"": effects}
    maps = [np.asarray(one, dtype=np.float64) for one in named.values()]
    (layers, heads), chosen = _map_shape(maps), _places(selected)
    for layer, head in chosen:
        if not (0 <= layer < layers and 0 <= head < heads):
            raise ResultError(
                f"selected head {head} of layer {layer} is outside the map of {layers} layers with "
                f"{heads} heads"
            )
    cell = min(0.32, 5.0 / max(layers, heads))  # a page shows it whole
    width = max(3.5, 0.8 + cell * heads) * len(maps) + 1.6
    figure, all_axes = new_panels(len(maps), width=width, height=1.5 + cell * layers, row=True)
    # The scale is symmetric, so that no effect is white; one odd head must not bleach the others.
    every = np.stack(maps)
    known = np.abs(every[np.isfinite(every)])
    limit = float(np.quantile(known, 0.99)) if known.size else 1.0
    limit = limit or float(known.max(initial=0.0)) or 1.0
    for axes, name, given in zip(all_axes, named, maps, strict=True):
        image = _map(axes, given, limit, chosen)
        axes.set_title(name, fontsize=10)
    bar = figure.colorbar(image, ax=all_axes, shrink=0.9, extend=_extend(every, limit))
    bar.set_label(label)
    note = f"{len(chosen)} of {maps[0].size} heads selected (framed)" if chosen else ""
    if known.size < every.size:
        note += f"{'; ' if note else ''}hatched: not measured"
    head_figure(figure, title, note)
    return save_figure(figure, path)


def rank_plot(
    effects: npt.ArrayLike,
    path: str | os.PathLike[str],
    *,
    stderr: npt.ArrayLike | None = None,
    selected: int | None = None,
    curve: Curve | None = None,
    controls: Sequence[tuple[int, float]] = (),
    judged: Curve | None = None,
    title: str = "",
    label: str = "effect",
    sets_label: str | None = None,
) -> Path:
    """Draw single heads' effects by rank and, where given, sets of heads against their controls.

    Left: every head's effect on the search documents, the best first. Middle: the best k heads on
    the documents that chose k. Right: the set that was taken, and random sets of the same size, on
    documents that chose nothing: the gap between them is what the search is worth.

    Args:
        effects: One number a head, (heads,), in any order.
        path: The PNG file.
        stderr: Their standard errors, (heads,).
        selected: How many of the best were taken; marked.
        curve: Effect of the best k heads for several k, on the documents that chose k.
        controls: Number of heads and effect of each random set, on documents that chose nothing.
        judged: Effect of the set that was taken on those documents.
        title: Heading.
        label: What the heads' numbers are.
        sets_label: What the sets' numbers are; None: the same.

    Raises:
        ResultError: No effects, one that is not finite, or another number of errors.
        InfrastructureError: The file cannot be written.
        InputError: matplotlib is not installed.
    """
    given = np.asarray(effects, dtype=np.float64).ravel()
    spread = None if stderr is None else np.asarray(stderr, dtype=np.float64).ravel()
    if given.size == 0 or not bool(np.isfinite(given).all()):
        raise ResultError("effects must be finite numbers, one a head")
    if spread is not None and spread.shape != given.shape:
        raise ResultError(f"{given.size} effects need as many errors; found {spread.size}")
    worth = judged is not None or bool(controls)
    count = 1 + (curve is not None) + worth
    figure, all_axes = new_panels(count, width=6.0 + 3.5 * (count - 1), height=4.2, row=True)
    _ranks(all_axes[0], given, spread, selected)
    all_axes[0].set_ylabel(label)
    if curve is not None:
        _sizes(all_axes[1], curve, selected)
    if worth:
        _worth(all_axes[-1], judged, controls)
    for axes in all_axes[1:]:
        axes.set_ylabel(label if sets_label is None else sets_label)
    head_figure(figure, title)
    return save_figure(figure, path)


def _map_shape(maps: Sequence[npt.NDArray[np.float64]]) -> tuple[int, int]:
    shapes = {one.shape for one in maps}
    if len(shapes) != 1 or maps[0].ndim != 2 or 0 in maps[0].shape:
        found = ", ".join(sorted(map(str, shapes))) or "none"
        raise ResultError(f"effects must be (layers, heads); found shape {found}")
    layers, heads = maps[0].shape
    return layers, heads


def _places(selected: Mapping[int, Iterable[int]] | None) -> list[tuple[int, int]]:
    return [(layer, head) for layer, heads in (selected or {}).items() for head in heads]


def _map(
    axes: Axes, given: npt.NDArray[np.float64], limit: float, chosen: Sequence[tuple[int, int]]
) -> Any:  # noqa: ANN401 - a matplotlib image
    axes.set_facecolor("#e4e4e4")
    axes.patch.set_hatch("////")
    axes.patch.set_edgecolor("#b8b8b8")
    image = axes.imshow(
        np.ma.masked_invalid(given), cmap="RdBu", vmin=-limit, vmax=limit, aspect="equal",
        interpolation="nearest",
    )  # fmt: skip
    for layer, head in chosen:
        axes.add_patch(_frame(head, layer))
    axes.set_xlabel("head")
    axes.set_ylabel("layer")
    layers, heads = given.shape
    for axis, count in ((axes.xaxis, heads), (axes.yaxis, layers)):
        axis.set_ticks(range(0, count, 1 if count <= 12 else 2 if count <= 24 else 4))
    return image


def _ranks(
    axes: Axes,
    effects: npt.NDArray[np.float64],
    spread: npt.NDArray[np.float64] | None,
    selected: int | None,
) -> None:
    order = np.argsort(-effects, kind="stable")
    ranks = np.arange(1, len(effects) + 1)
    if spread is not None:
        ends = effects[order] - spread[order], effects[order] + spread[order]
        axes.fill_between(ranks, *ends, color="#cfe2f0", label="one standard error", linewidth=0)
    axes.plot(ranks, effects[order], color=BLUE, linewidth=1.4, label="head")
    if selected:
        axes.axvline(selected + 0.5, color="#444444", linestyle="--", linewidth=1)
        axes.annotate(
            f"{selected} taken", (selected + 0.5, 0.97), xycoords=("data", "axes fraction"),
            xytext=(4, 0), textcoords="offset points", va="top", fontsize=8.5,
        )  # fmt: skip
    axes.axhline(0.0, color="black", linewidth=0.8)
    _whole_numbers(axes)
    axes.set_xlabel("head, by rank on the search documents")
    axes.set_title("single heads", fontsize=10)
    axes.legend(fontsize=8.5, frameon=False, loc="upper right")


def _sizes(axes: Axes, curve: Curve, selected: int | None) -> None:
    axes.errorbar(
        curve.heads, curve.effect, yerr=_ends(curve), color=BLUE, marker="o",
        markersize=5, capsize=3, linewidth=1.4, label="best heads, 95 % interval",
    )  # fmt: skip
    if selected is not None and selected in curve.heads:
        place = list(curve.heads).index(selected)
        axes.plot(
            selected, curve.effect[place], marker="o", markersize=12, linestyle="none",
            markerfacecolor="none", markeredgecolor="black", label="taken: the highest",
        )  # fmt: skip
    axes.axhline(0.0, color="black", linewidth=0.8)
    _whole_numbers(axes)
    axes.set_xlabel("number of calibrated heads")
    axes.set_title("choosing how many (verify documents)", fontsize=10)
    axes.legend(fontsize=8.5, frameon=False, loc="best")


def _worth(axes: Axes, judged: Curve | None, controls: Sequence[tuple[int, float]]) -> None:
    ticks = []
    if judged is not None:
        axes.errorbar(
            [0], judged.effect, yerr=_ends(judged), color="black", marker="s", markersize=6,
            capsize=5, linewidth=1.4, label="taken, 95 % interval",
        )  # fmt: skip
        ticks.append((0, f"the {judged.heads[0]} taken"))
    if controls:
        values = [value for _, value in controls]
        axes.plot(
            [1] * len(values), values, linestyle="none", marker="x",
            color=GREY, label=f"random heads ({len(values)} sets)",
        )  # fmt: skip
        ticks.append((1, f"{controls[0][0]} at random"))
    axes.axhline(0.0, color="black", linewidth=0.8)
    axes.set_xlim(-0.6, 1.6)
    axes.set_xticks([place for place, _ in ticks], [text for _, text in ticks])
    axes.set_title("what they are worth (judge documents)", fontsize=10)
    axes.legend(fontsize=8.5, frameon=False, loc="best")


def _ends(curve: Curve) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.float64]]:
    """Return how far the interval of each point reaches below and above it."""
    value = np.asarray(curve.effect, dtype=np.float64)
    below, above = value - np.asarray(curve.low), np.asarray(curve.high) - value
    return np.maximum(below, 0.0), np.maximum(above, 0.0)


def _whole_numbers(axes: Axes) -> None:
    """Put the ticks of a count at whole numbers; left alone, few sizes get halves of heads."""
    from matplotlib.ticker import MaxNLocator

    axes.xaxis.set_major_locator(MaxNLocator(integer=True))


def _frame(head: int, layer: int) -> Any:  # noqa: ANN401 - a matplotlib patch
    from matplotlib.patches import Rectangle

    return Rectangle(
        (head - 0.44, layer - 0.44), 0.88, 0.88, fill=False, edgecolor="#111111", linewidth=1.4
    )


def _extend(values: npt.NDArray[np.float64], limit: float) -> str:
    above, below = bool((values > limit).any()), bool((values < -limit).any())
    return "both" if above and below else "max" if above else "min" if below else "neither"
