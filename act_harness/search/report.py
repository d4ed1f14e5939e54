"""The two plots of a search: the map of effects, and effect against rank beside the controls."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from act_harness.search.choose.select import best_of_each_head

if TYPE_CHECKING:
    from act_harness.artifact import Artifact
    from act_harness.evidence.plots import Curve
    from act_harness.search.run import SearchResult

__all__ = ["draw"]


def draw(result: SearchResult, beside: Path) -> dict[str, Path]:
    """Draw the plots of a search beside its artifact, under the artifact's file name.

    Recipes share names, files in a folder cannot: two searches never draw over each other.

    Args:
        result: of the search.
        beside: the artifact's file; ``heads.json`` gets ``heads-map.png`` and ``heads-ranks.png``.

    Returns:
        Name to path.

    Raises:
        InputError: matplotlib is not installed.
        InfrastructureError: a file cannot be written.
    """
    from act_harness.evidence.plots import head_map, rank_plot

    artifact, name = result.artifact, result.artifact.name
    facts, search = artifact.model, artifact.search or {}
    if search["rule"]["name"] == "gradient":
        return {"map": _strengths(artifact, beside)}
    ranked = best_of_each_head(result.effects)
    effects = np.full((facts.num_hidden_layers, facts.num_attention_heads), np.nan)
    for effect in ranked:
        effects[effect.layer, effect.head] = effect.effect
    label = f"standardised change of the {search['recipe']['objective']} objective"
    sets = _sets(search)
    return {
        "map": head_map(
            effects,
            beside.with_name(f"{beside.stem}-map.png"),
            selected=artifact.heads,
            title=f"{name}: effect of calibrating each head alone",
            label=label,
        ),
        "ranks": rank_plot(
            [effect.effect for effect in ranked],
            beside.with_name(f"{beside.stem}-ranks.png"),
            stderr=[effect.stderr for effect in ranked],
            selected=len(result.selection.places) or None,
            curve=sets.curve,
            controls=sets.controls,
            judged=sets.judged,
            title=f"{name}: heads by effect, and sets of them",
            label=label,
            sets_label=sets.label,
        ),
    }


def _strengths(artifact: Artifact, beside: Path) -> Path:
    """Draw what a gradient search tuned: the logarithm of each head's strength."""
    from act_harness.evidence.plots import head_map

    facts, search = artifact.model, artifact.search or {}
    theta = np.full((facts.num_hidden_layers, facts.num_attention_heads), np.nan)
    for layer, head, value, *_ in search["table"]["heads"]["rows"]:
        theta[layer, head] = value
    return head_map(
        theta,
        beside.with_name(f"{beside.stem}-map.png"),
        selected=artifact.heads,
        title=f"{artifact.name}: strengths tuned together",
        label=f"log strength on {search['recipe']['calibration']['target']}",
    )


class _Sets(NamedTuple):
    """The right half of the second plot: all in what the set was chosen by, as the summary."""

    label: str
    curve: Curve | None = None
    judged: Curve | None = None
    controls: list[tuple[int, float]] = []  # noqa: RUF012 - never changed


_LABELS = {
    "accuracy": "change of raw accuracy, points",
    "objective": "change of label-prior corrected accuracy, points",
    "margin": "standardised change of the margin",
}


def _sets(search: dict[str, Any]) -> _Sets:
    """Return how sets changed what they were chosen by, and how the one taken did elsewhere."""
    from act_harness.evidence.plots import Curve

    held, rule = search["judgement"].get("chosen_by"), search["rule"]
    reading = rule.get("criterion") or (held["reading"] if held else "accuracy")
    unit = 1.0 if reading == "margin" else 100.0
    tried, curve, judged = rule.get("tried"), None, None
    if tried:
        changes = [unit * (one["value"] - rule["untouched"]) for one in tried]
        low, high = ([unit * one["interval"][end] for one in tried] for end in (0, 1))
        curve = Curve([one["heads"] for one in tried], changes, low, high)
    if held is None:
        return _Sets(_LABELS[reading], curve)
    heads, (low, high) = search["judgement"]["heads"], held["interval"]
    if low is not None:
        judged = Curve([heads], [unit * held["difference"]], [unit * low], [unit * high])
    drawn = [(heads, unit * (one - held["untouched"])) for one in held["random_sets"]]
    return _Sets(_LABELS[reading], curve, judged, drawn)
