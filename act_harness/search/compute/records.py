"""What the search keeps of a layer of a recorded forward, and rows of a resumed one.

S sequences of T tokens; V variants; H query heads, G key heads, D values per head.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

from act_harness.errors import InternalError

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import Tensor

    from act_harness.engines.operation import AttentionCall

__all__ = ["Group", "LayerRecord"]


@dataclass
class LayerRecord:
    """What one layer did in a recorded forward."""

    hidden: Tensor | None = None  # (S, T, hidden): the layer's input
    call: AttentionCall | None = None  # rows and columns are the S sequences of T tokens
    key: Tensor | None = None  # (S, G, T, D)
    value: Tensor | None = None  # (S, G, T, D)
    attention: Tensor | None = None  # (S, T, H, D): before the output projection
    projected: Tensor | None = None  # (S, T, hidden): the attention module's output
    mask: Tensor | None = None  # the model's own; kept of whole sequences

    def columns(self) -> tuple[Tensor, Tensor]:
        """Return keys and values.

        Raises:
            InternalError: they were not recorded.
        """
        if self.key is None or self.value is None:
            raise InternalError("a layer's keys were not recorded")
        return self.key, self.value


class Group(NamedTuple):
    """Rows of a resumed forward that attend together: V sequences of n rows, one after another."""

    sequences: int
    rows: int
    mask: Callable[[int], Tensor]
    """(V, 1, n, T) by layer, T columns being those before the rows and the rows."""
    prefix: Callable[[int], tuple[Tensor, Tensor] | None]
    """Keys and values of the columns before the rows by layer, (V, G, T - n, D)."""
    own: Callable[[int], tuple[Tensor, Tensor]]
    """Those of the rows by layer, (V, G, n, D), of layers that the run does not enter."""
