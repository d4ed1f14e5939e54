"""What the search reads off a model: its decoder layers, its sliding windows, the masks they need.

Nothing here changes a model; see :mod:`act_harness.search.compute.entered` for that.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from act_harness.attention.dimensions import of_layers
from act_harness.attention.families import family_of
from act_harness.attention.structure import mixing_part
from act_harness.errors import UnsupportedModelError

if TYPE_CHECKING:
    from collections.abc import Mapping

    from transformers import PreTrainedModel

    from act_harness.search.compute.layout import Layout

__all__ = ["Masks", "decoder_layers", "output_projection", "whole_reason", "window_of"]


class Masks:
    """The masks of a chunk, one for each width of a sliding window, in the kernel's form."""

    def __init__(
        self,
        layout: Layout,
        windows: Mapping[int, int | None],
        *,
        additive: bool,
        dtype: torch.dtype,
    ) -> None:
        """Store what masks depend on.

        Args:
            layout: the chunk.
            windows: sliding window of each layer in tokens.
            additive: whether the kernel adds masks (eager) instead of taking bool (sdpa).
            dtype: of an additive mask.
        """
        self._layout, self._windows, self._adds, self._dtype = layout, windows, additive, dtype
        self._visible: dict[int | None, Tensor] = {}
        self._additive: dict[int | None, Tensor] = {}

    def visible(self, layer: int) -> Tensor:
        """Return (S, 1, T, T) bool of a layer."""
        window = self._windows[layer]
        if window not in self._visible:
            self._visible[window] = self._layout.visible(window)
        return self._visible[window]

    def causal(self, layer: int, rows: Tensor, columns: Tensor) -> Tensor:
        """Return (1, 1, rows, columns) for positions of one text, in the kernel's form."""
        window = self._windows[layer]
        distance = rows[:, None] - columns
        seen = distance >= 0 if window is None else (distance >= 0) & (distance < window)
        return self._kernel_form(seen[None, None])

    def of(self, layer: int) -> Tensor:
        """Return the mask of a layer as its kernel takes it: bool for sdpa, additive for eager."""
        seen = self.visible(layer)
        if not self._adds:
            return seen
        window = self._windows[layer]
        if window not in self._additive:
            self._additive[window] = self._kernel_form(seen)
        return self._additive[window]

    def _kernel_form(self, seen: Tensor) -> Tensor:
        if not self._adds:
            return seen
        additive = torch.zeros(seen.shape, dtype=self._dtype, device=seen.device)
        return additive.masked_fill_(~seen, torch.finfo(self._dtype).min)


def decoder_layers(
    decoder: Any,  # noqa: ANN401 - of any family
    attentions: Mapping[int, nn.Module],
    kind: str,
) -> list[nn.Module]:
    """Find the list of a decoder's layers, by the attention modules that its members hold.

    Raises:
        UnsupportedModelError: there is none.
    """
    count = decoder.config.get_text_config().num_hidden_layers
    for module in decoder.modules():
        if isinstance(module, nn.ModuleList) and len(module) == count:
            held = [
                any(part is attention for part in module[layer].modules())
                for layer, attention in attentions.items()
            ]
            if all(held):
                return list(module)
    raise UnsupportedModelError(
        f"the decoder layers of {kind} were not found; the search does not support this model"
    )


def whole_reason(
    model: PreTrainedModel, attentions: Mapping[int, nn.Module], *, by_position: bool
) -> str | None:
    """Return why texts cannot lie side by side in one row, nor be entered behind their first token.

    None where attention alone mixes tokens and goes by positions, as far as structure shows.

    Args:
        model: a loaded model.
        attentions: its attention modules by layer.
        by_position: whether logits of single rows or columns come with their calls.
    """
    config = model.config.get_text_config()
    missing = sorted(set(range(config.num_hidden_layers)) - set(attentions))
    if missing:
        return f"layers {missing} do not attend"
    if any(size is not None for size in of_layers(config, "attention_chunk_size")):
        return "it attends in chunks"
    for attention in attentions.values():
        family = family_of(attention)
        reason = None if family is None else family.search_obstacle(attention)
        if reason is not None:
            return reason
    if by_position:
        return "its attention has logits by position, which texts side by side would share"
    return mixing_part(model, windowed=True)


_PROJECTIONS = ("o_proj", "out_proj", "dense", "c_proj")
"""What attention modules call their output projection."""


def output_projection(attention: nn.Module) -> Tensor:
    """Return the weight of a layer's output projection, (hidden, H * D).

    Raises:
        UnsupportedModelError: there is none that is a plain product.
    """
    for name in _PROJECTIONS:
        found: Any = getattr(attention, name, None)
        if type(found) is nn.Linear or type(found).__name__ == "FalconLinear":
            weight: Tensor = found.weight.detach()
            return weight
        if type(found) is Conv1D:  # GPT-2's: the weight lies the other way
            turned: Tensor = found.weight.detach().T
            return turned
    raise UnsupportedModelError(
        f"{type(attention).__name__} has no plain linear output projection "
        f"({', '.join(_PROJECTIONS)})"
    )


def window_of(model: PreTrainedModel, attention: nn.Module) -> int | None:
    """Return the sliding window of a layer in tokens, None where it sees everything."""
    config = model.config.get_text_config()
    found: Any
    if hasattr(attention, "sliding_window"):
        found = attention.sliding_window
    elif getattr(config, "use_sliding_window", True):
        layer = cast("int", getattr(attention, "layer_idx", 0))  # GPT-Neo has none, and no windows
        found = of_layers(config, "sliding_window")[layer]
        kinds = getattr(config, "layer_types", None)
        if kinds is not None and kinds[layer] != "sliding_attention":
            found = None
    else:
        found = None
    return None if found is None else int(found)
