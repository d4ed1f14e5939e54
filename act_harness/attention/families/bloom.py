"""BLOOM: ALiBi, a bias on the logits that grows with the column, by a slope for each head."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from act_harness.attention.families.family import ALIBI, Family
from act_harness.engines.operation import AttentionCall

if TYPE_CHECKING:
    from torch import Tensor
    from transformers.cache_utils import Cache

    from act_harness.attention.families.family import Attend

__all__ = ["Bloom"]


class Bloom(Family):
    """See :class:`act_harness.attention.families.family.Family`."""

    attention = "BloomAttention"
    method = "forward"

    def search_obstacle(self, module: nn.Module) -> str | None:
        """Return why not."""
        return ALIBI

    def serve(
        self,
        module: Any,  # noqa: ANN401 - a BloomAttention
        attend: Attend,
        hidden_states: Tensor,  # (B, C, hidden)
        residual: Tensor,
        alibi: Tensor,  # (B * H, 1, K)
        attention_mask: Tensor | None,
        layer_past: Cache | None = None,
        **_: Any,  # noqa: ANN401 - what this class ignores too
    ) -> tuple[Tensor, Tensor | None]:
        """Do what ``forward`` does."""
        fused = module.query_key_value(hidden_states)
        parts = fused.unflatten(-1, (module.num_heads, 3, module.head_dim)).unbind(dim=-2)
        query, key, value = (part.transpose(1, 2) for part in parts)  # (B, H, C, D)
        if layer_past is not None:
            key, value = layer_past.update(key, value, module.layer_idx)
        scale, dropout = module.inv_norm_factor, module.attention_dropout

        def run(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor]:
            return _stock(q, k, v, mask, alibi=alibi, scale=scale, dropout=dropout)

        bias = alibi.unflatten(0, (len(hidden_states), module.num_heads))
        output, maps = attend(
            AttentionCall(query, key, value, scale, bias=bias),
            attention_mask,
            run,
            dropout=dropout.p if module.training else 0.0,
        )
        projected = _project(module, output.flatten(2))
        dropped = nn.functional.dropout(projected, module.hidden_dropout, module.training)
        return residual + dropped, maps


def _stock(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    *,
    alibi: Tensor,
    scale: float,
    dropout: nn.Module,
) -> tuple[Tensor, Tensor]:
    """Return output (B, C, H, D) and maps; products and bias in one operation, as the module."""
    batch, heads = query.shape[:2]
    q, k, v = (part.reshape(batch * heads, -1, part.shape[-1]) for part in (query, key, value))
    logits = alibi.baddbmm(q, k.transpose(1, 2), alpha=scale).unflatten(0, (batch, heads))
    if mask is not None:
        logits = logits + mask
    maps = nn.functional.softmax(logits, dim=-1, dtype=torch.float32).to(query.dtype)
    maps = dropout(maps)
    output = torch.bmm(maps.flatten(0, 1), v).unflatten(0, (batch, heads))
    return output.transpose(1, 2), maps


def _project(module: Any, output: Tensor) -> Tensor:  # noqa: ANN401 - a BloomAttention
    """Apply the output projection: in slices where the model is told to be exact about those."""
    if not (module.pretraining_tp > 1 and module.slow_but_exact):
        projected: Tensor = module.dense(output)
        return projected
    width = output.shape[-1] // module.pretraining_tp
    sums = torch.zeros_like(output)
    for part, weight in zip(
        output.split(width, dim=-1), module.dense.weight.split(width, dim=1), strict=True
    ):
        sums = sums + nn.functional.linear(part, weight)
    return sums
