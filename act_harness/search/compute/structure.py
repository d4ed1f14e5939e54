"""What the search reads off a model: its decoder layers, its sliding windows, the masks they need.

Nothing here changes a model; see :mod:`act_harness.search.compute.workbench` for that.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from act_harness.attention.dimensions import of_layers
from act_harness.attention.families import family_of
from act_harness.errors import UnsupportedModelError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from transformers import PreTrainedModel

    from act_harness.attention.probe import FoundLayer
    from act_harness.search.compute.layout import Layout

__all__ = ["Masks", "decoder_layers", "output_projection", "refuse_unsearchable", "window_of"]


class Masks:
    """The masks of a chunk, one for each width of a sliding window, in the kernel's form."""

    def __init__(
        self,
        layout: Layout,
        windows: Sequence[int | None],
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


def decoder_layers(decoder: nn.Module, attentions: list[nn.Module], kind: str) -> list[nn.Module]:
    """Find the list of layers whose members hold the attention modules, one each."""
    for module in decoder.modules():
        if isinstance(module, nn.ModuleList) and len(module) == len(attentions):
            held = [
                any(part is a for part in m.modules())
                for m, a in zip(module, attentions, strict=True)
            ]
            if all(held):
                return list(module)
    raise UnsupportedModelError(
        f"the decoder layers of {kind} were not found; the search does not support this model"
    )


def refuse_unsearchable(layers: Sequence[FoundLayer], kind: str) -> None:
    """Refuse a model of which the search would compute something else than it does.

    Raises:
        UnsupportedModelError: a family outside the attention interface says so, or a layer's
            attention has logits by position.
    """
    for layer in layers:
        family = family_of(layer.module)
        reason = None if family is None else family.search_obstacle(layer.module)
        if reason is None and layer.by_position:
            reason = "its attention has logits by position, which texts side by side share"
        if reason is not None:
            raise UnsupportedModelError(
                f"{kind} cannot be searched: {reason}; make a head set by hand (act-harness "
                "artifact) or calibrate it with one of another source"
            )


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
        f"({', '.join(_PROJECTIONS)}; adapters must be merged first); the search does not support "
        "this model"
    )


def window_of(model: PreTrainedModel, attention: nn.Module) -> int | None:
    """Return the sliding window of a layer in tokens, None where it sees everything."""
    config = model.config.get_text_config()
    if any(size is not None for size in of_layers(config, "attention_chunk_size")):
        raise UnsupportedModelError(
            f"{type(model).__name__} attends in chunks; the search does not support this model"
        )
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
