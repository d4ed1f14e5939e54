"""Sizes of a decoder by layer: the one place that reads what a configuration may say of each layer.

Gemma 4's full layers have other heads than its windowed ones, Gemma 3n's feed-forward blocks differ
in width, and a configuration of several values refuses to be asked for one. What is read here is
for estimates and limits; an engine takes the shapes of the tensors it is given.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from transformers import PretrainedConfig

__all__ = ["cached_values", "head_count", "of_layers", "widths"]


def of_layers(config: PretrainedConfig, name: str) -> list[Any]:
    """Return a setting of every layer; None where the configuration does not have it.

    Args:
        config: a decoder's, of a composite model ``config.get_text_config()``.
        name: for example ``head_dim``.
    """
    count = int(config.num_hidden_layers)
    own = getattr(config, f"{name}_per_layer", None)  # Laguna's
    if own is not None:
        return list(own)
    layers = config.per_layer_config if getattr(config, "is_heterogeneous", False) else None
    if layers is not None:
        return [getattr(layer, name, None) for layer in layers]
    value = getattr(config, name, None)
    if isinstance(value, (list, tuple)) and len(value) == count:
        return list(value)
    return [value] * count


def head_count(config: PretrainedConfig) -> int | None:
    """Return the query heads of the layer that has most; None where there are no heads."""
    return max(filter(None, of_layers(config, "num_attention_heads")), default=None)


def widths(config: PretrainedConfig) -> list[int]:
    """Return the hidden size of each layer's feed-forward block, four hidden vectors if unsaid."""
    return [int(wide or 4 * config.hidden_size) for wide in of_layers(config, "intermediate_size")]


def cached_values(config: PretrainedConfig) -> int:
    """Return how many values of keys and values a token leaves in the caches of all layers."""
    names = ("num_attention_heads", "num_key_value_heads", "head_dim")
    total = 0
    for heads, keys, size in zip(*(of_layers(config, name) for name in names), strict=True):
        if heads:
            total += 2 * (keys or heads) * (size or config.hidden_size // heads)
    return total
