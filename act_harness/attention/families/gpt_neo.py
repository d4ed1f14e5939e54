"""GPT-Neo: logits that are not scaled, and layers that see a window, which their mask is silent on.

The window stands in the module's own buffer of causal masks and is counted in columns.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from act_harness.attention.families.family import Family, visible_columns
from act_harness.engines.operation import AttentionCall

if TYPE_CHECKING:
    from torch import Tensor, nn

    from act_harness.attention.families.family import Attend

__all__ = ["GPTNeo"]


class GPTNeo(Family):
    """See :class:`act_harness.attention.families.family.Family`."""

    attention = "GPTNeoSelfAttention"
    method = "_attn"

    def layer(self, module: nn.Module) -> int:
        """Return the layer's number."""
        return int(module.layer_id)  # type: ignore[arg-type]

    def search_obstacle(self, module: nn.Module) -> str | None:
        """Return why not: windows are counted in columns, and texts share columns there."""
        if module.attention_type == "local":
            return "its local layers count their window in columns, which texts side by side share"
        return None

    def serve(
        self,
        module: Any,  # noqa: ANN401 - a GPTNeoSelfAttention
        attend: Attend,
        query: Tensor,  # (B, H, C, D)
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None = None,
    ) -> tuple[Tensor, Tensor | None]:
        """Attend as ``_attn`` does, in float32 whatever the model's dtype."""
        local = module.attention_type == "local"

        def run(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor]:
            mask = attention_mask if local else mask  # the module adds its window itself
            output, maps = type(module)._attn(module, q, k, v, mask)
            return output.transpose(1, 2), maps

        mask = attention_mask
        if local:
            mask = _local(module, query.shape[2], key.shape[2])
            if attention_mask is not None:
                mask = mask & visible_columns(attention_mask)
        dropout = module.attn_dropout.p if module.training else 0.0
        output, maps = attend(AttentionCall(query, key, value, 1.0), mask, run, dropout=dropout)
        return output.transpose(1, 2), maps


def _local(module: Any, rows: int, columns: int) -> Tensor:  # noqa: ANN401
    """Return (1, 1, C, K) bool: the window of the last rows, as the module applies it."""
    window: Tensor = module.bias[:, :, columns - rows : columns, :columns]
    return window
