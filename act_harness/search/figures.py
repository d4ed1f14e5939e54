"""The two plots of a search: the map of effects, and effect against rank beside the controls."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from act_harness.search.select import best_of_each_head

if TYPE_CHECKING:
    from act_harness.report import Curve
    from act_harness.search.run import SearchResult

__all__ = ["draw"]


def draw(result: SearchResult, folder: Path) -> dict[str, Path]:
    """Draw the plots of a search beside its artifact.

    Args:
        result: of the search.
        folder: where the PNG files go.

    Returns:
        Name to path.

    Raises:
        InputError: matplotlib is not installed.
        InfrastructureError: a file cannot be written.
    """
    from act_harness.report import head_map, rank_plot

    artifact, name = result.artifact, result.artifact.name
    facts, search = artifact.model, artifact.search or {}
    ranked = best_of_each_head(result.effects)
    effects = np.full((facts.num_hidden_layers, facts.num_attention_heads), np.nan)
    for effect in ranked:
        effects[effect.layer, effect.head] = effect.effect
    label = f"standardised change of the {search['recipe']['objective']} objective"
    held = search.get("controls")
    controls = [(held["heads"], one["effect"]) for one in held["random_sets"]] if held else []
    return {
        "map": head_map(
            effects,
            folder / f"{name}-map.png",
            selected=artifact.heads,
            title=f"{name}: effect of calibrating each head alone",
            label=label,
        ),
        "ranks": rank_plot(
            [effect.effect for effect in ranked],
            folder / f"{name}-ranks.png",
            stderr=[effect.stderr for effect in ranked],
            selected=len(result.selection.places) or None,
            curve=_curve(search),
            controls=controls,
            title=f"{name}: heads by effect, and sets of them on the verify split",
            label=label,
        ),
    }


def _curve(search: dict[str, Any]) -> Curve | None:
    """Return the effect of the k best heads, where rule ``top`` measured it."""
    from act_harness.report import Curve

    tried = search["rule"].get("tried")
    if not tried:
        return None
    effects = [one["effect"] for one in tried]
    return Curve([one["heads"] for one in tried], effects, effects, effects)
