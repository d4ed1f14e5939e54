"""What was found on one document, as values and as a page."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from act_harness.exploration.effects import margin
from act_harness.exploration.page import (
    inline_frame,
    packed,
    packed_strengths,
    render,
    settings_line,
)
from act_harness.support import atomic

if TYPE_CHECKING:
    import numpy.typing as npt

    from act_harness.calibration import Calibration

__all__ = ["Exploration", "HeadMap"]


@dataclass(frozen=True)
class HeadMap:
    """The map of one head: its rows as stored, and what calibration multiplies them by."""

    weights: npt.NDArray[np.float32]  # (rows, N)
    inside: npt.NDArray[np.float32]  # (rows,): on sinks
    outside: npt.NDArray[np.float32]  # (rows,): elsewhere
    calibrated: npt.NDArray[np.float32] | None
    """(rows, N) where these factors do not say it: targets of two strengths, temperatures."""


@dataclass(frozen=True)
class Exploration:
    """One document seen through a model; L layers of H query heads, N tokens, C answers.

    Shows itself in a notebook; :meth:`save` writes the page.
    """

    model: str
    """Name of the model."""
    title: str
    tokens: tuple[str, ...]
    """(N,) texts of the prompt's tokens."""
    heads: tuple[int, int, int]
    """Layers, query heads, key heads."""
    calibration: Calibration
    artifact: str | None
    """Name of the head set; None: none, and every head has the calibration's own strength."""
    strengths: npt.NDArray[np.float32]
    """(L, H) strength in the artifact; NaN where a head is not in it."""
    labels: tuple[str, ...]
    """(C,) texts of the answers."""
    next_token: bool
    """Whether the answers are likely next tokens, not a task's choices."""
    right: int
    """The right answer; of a plain text the stock model's own first one."""
    before: npt.NDArray[np.float64]
    """(C,) log-likelihoods in nats of the stock model."""
    after: npt.NDArray[np.float64] | None
    """(C,) of the model with the whole artifact."""
    scores: npt.NDArray[np.float64]
    """(L, H, C) with each head calibrated alone; NaN where that was not computed."""
    first_order: npt.NDArray[np.float64]
    """(L, H) change of the margin, in nats, to first order: from one backward pass; NaN where the
    model has none, and all effects are exact."""
    means: npt.NDArray[np.float32]
    """(L, H, N) mean attention of each column over the rows that see it."""
    sinks: npt.NDArray[np.bool_]
    """(L, H, N) whether the column is a sink."""
    seen: npt.NDArray[np.int64]
    """(L, N) rows that see each column."""
    thresholds: npt.NDArray[np.float64]
    """(L,) mean attention above which a column is a sink; NaN where none is detected."""
    sink_mass: npt.NDArray[np.float32]
    """(L, H) share of all attention that lies on sinks."""
    first_mass: npt.NDArray[np.float32]
    """(L, H) share of all attention that lies on the first token."""
    rows: npt.NDArray[np.int64]
    """Positions of the rows that maps are stored for."""
    maps: dict[tuple[int, int], HeadMap] = field(default_factory=dict)
    """Maps of chosen heads, by (layer, head)."""
    initial_strengths: npt.NDArray[np.float32] | None = None
    """(L, H) strength on the initial token, of an artifact of target ``both``."""

    @property
    def exact(self) -> npt.NDArray[np.bool_]:
        """(L, H) whether the effect was computed exactly."""
        return np.asarray(np.isfinite(self.scores).all(axis=2))

    @property
    def effects(self) -> npt.NDArray[np.float64]:
        """(L, H) change of the margin, in nats, when this head alone is calibrated.

        Exact where it was computed, else to first order; NaN in layers that do not attend.
        """
        found = margin(self.scores, self.right) - margin(self.before, self.right)
        return np.where(self.exact, found, self.first_order)

    def summary(self) -> str:
        """Return two lines for the terminal: the answer, and the head that changes it most."""
        effects = self.effects
        strongest = np.nanargmax(np.abs(effects))  # a layer that does not attend has none
        layer, head = (int(n) for n in np.unravel_index(strongest, effects.shape))
        start = float(margin(self.before, self.right))
        whole = "" if self.after is None else (
            f", {float(margin(self.after, self.right)):+.4f} with head set {self.artifact}"
        )  # fmt: skip
        attending = int(np.isfinite(effects).sum())
        about = "" if self.exact[layer, head] else "about "
        return (
            f"{self.title}: margin of {self.labels[self.right]!r} {start:+.4f} nats{whole}\n"
            f"head {layer}.{head} alone changes it by {about}{effects[layer, head]:+.4f}; "
            f"{int(self.sinks.any(axis=2).sum())} of {attending} heads have sinks"
        )

    def html(self) -> str:
        """Return the page: one file that opens without a network."""
        return render(f"{self.title} - {self.model}", _document(self))

    def save(self, path: str | Path) -> Path:
        """Write the page.

        Raises:
            InfrastructureError: it cannot be written.
        """
        return atomic.write_text(path, self.html())

    def _repr_html_(self) -> str:
        return inline_frame(self.html())


def _document(found: Exploration) -> dict[str, Any]:
    layers, heads, groups = found.heads
    return {
        "title": found.title,
        "model": found.model,
        "artifact": found.artifact,
        "settings": settings_line(found.calibration.settings()),
        "layers": layers,
        "heads": heads,
        "groups": groups,
        "tokens": found.tokens,
        "labels": found.labels,
        "next": found.next_token,
        "right": found.right,
        "before": found.before.tolist(),
        "after": None if found.after is None else found.after.tolist(),
        "scores": packed(found.scores, np.float32),
        "effects": packed(found.effects, np.float32),
        "firstOrder": packed(found.first_order, np.float32),
        **packed_strengths(found.strengths, found.initial_strengths),
        "means": packed(np.sqrt(found.means) * 65535 + 0.5, np.uint16),
        "sinks": packed(np.packbits(found.sinks, axis=None, bitorder="little"), np.uint8),
        "seen": packed(found.seen, np.uint16),
        "thresholds": [None if np.isnan(one) else one for one in found.thresholds.tolist()],
        "sinkMass": packed(found.sink_mass, np.float32),
        "firstMass": packed(found.first_mass, np.float32),
        "rows": found.rows.tolist(),
        "maps": {f"{layer}.{head}": _map(one, found) for (layer, head), one in found.maps.items()},
    }


def _map(one: HeadMap, found: Exploration) -> dict[str, str]:
    """Pack the part of a map's rows that is visible: columns up to the row's own."""
    below = np.arange(len(found.tokens))[None] <= found.rows[:, None]

    def rows(values: npt.NDArray[np.float32]) -> str:
        return packed(np.sqrt(values[below]) * 255 + 0.5, np.uint8)

    parts = {
        "weights": rows(one.weights),
        "inside": packed(one.inside, np.float32),
        "outside": packed(one.outside, np.float32),
    }
    return parts if one.calibrated is None else parts | {"after": rows(one.calibrated)}
