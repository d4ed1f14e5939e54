"""What a family of models outside transformers' attention interface says about its attention.

Such a module computes attention in a method of its own. While it is calibrated (or tried, or
searched), that method of that one module is replaced by :meth:`Family.serve`, which does what the
method does except that the attention itself is asked for at the door all layers go through,
:data:`Attend`. Nothing about calibration stands in a family.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch.utils.weak import WeakIdKeyDictionary

if TYPE_CHECKING:
    from torch import Tensor, nn

    from act_harness.attention.interface import Run
    from act_harness.engines.operation import AttentionCall

__all__ = ["ALIBI", "Attend", "Family", "visible_columns"]

ALIBI = "its bias by position (ALiBi) counts columns, which texts side by side share"
"""Why the search lays out no texts of a model with such a bias."""


class Attend(Protocol):
    """The attention of a layer, calibrated where its module is bound."""

    def __call__(
        self, call: AttentionCall, mask: Tensor | None, run: Run, *, dropout: float = 0.0,
        kernel: str = "eager",
    ) -> tuple[Tensor, Tensor | None]:  # fmt: skip
        """See :func:`act_harness.attention.interface.attend`."""
        ...


class Family(Protocol):
    """One class of attention modules; see the module."""

    attention: str
    """Name of the class in transformers: the very class, since subclasses compute otherwise."""
    method: str
    """Name of the method that is replaced."""

    def layer(self, module: nn.Module) -> int:
        """Return the number of the module's layer, as caches count them."""
        return int(module.layer_idx)  # type: ignore[arg-type]

    def search_obstacle(self, module: nn.Module) -> str | None:
        """Return why the search cannot lay texts out side by side here; None where it can."""
        return None

    def serve(self, module: Any, attend: Attend, *args: Any, **kwargs: Any) -> Any:  # noqa: ANN401
        """Do what the method does, to the bit, with its attention from ``attend``.

        Args:
            module: the attention module.
            attend: takes the call (queries after rotary embedding; keys and values with those of
                the cache, which is updated here; scale, cap and bias), the model's mask, and the
                stock computation on (query, key, value, mask).
            args: those of the method.
            kwargs: those of the method.
        """
        ...


_visible: WeakIdKeyDictionary = WeakIdKeyDictionary()


def visible_columns(mask: Tensor, *, hidden: bool = False) -> Tensor:
    """Return (B, 1, C, K) bool: which columns a model's mask shows; layers share the answer.

    Args:
        mask: (B, 1 or H, C, K) additive, very low where hidden (and holding a bias where not), or
            bool; heads see the same columns.
        hidden: whether a bool mask is true where a column is hidden.
    """
    found: Tensor | None = _visible.get(mask)
    if found is None:
        first = mask[:, :1]
        if mask.dtype == torch.bool:
            found = ~first if hidden else first
        else:
            found = first > torch.finfo(mask.dtype).min / 2
        _visible[mask] = found
    return found
