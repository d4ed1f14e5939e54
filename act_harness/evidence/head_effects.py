"""What the search measured of single heads, read from an artifact."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    import numpy.typing as npt

    from act_harness.artifact import Artifact

__all__ = ["head_effects"]


def head_effects(artifact: Artifact) -> npt.NDArray[np.float64] | None:
    """Return each head's best effect alone, of several mass maps the largest.

    Returns:
        (layers, heads), NaN where a head was not measured; None where the artifact has no table of
        effects, or one that cannot be read.
    """
    model = artifact.model
    effects = np.full((model.num_hidden_layers, model.num_attention_heads), np.nan)
    try:
        table = (artifact.search or {})["table"]["heads"]
        place = [table["columns"].index(name) for name in ("layer", "head", "effect")]
        for row in table["rows"]:
            layer, head, effect = (row[column] for column in place)
            here = int(layer), int(head)
            effects[here] = np.fmax(effects[here], float(effect))
    except (AttributeError, IndexError, KeyError, TypeError, ValueError):
        return None
    return effects
