"""MPT: ALiBi as a distance from the last column, and a mask that is true where hidden."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from act_harness.attention.cache import find_cache
from act_harness.attention.families.family import ALIBI, Family, visible_columns
from act_harness.engines.operation import AttentionCall

if TYPE_CHECKING:
    from torch import Tensor
    from transformers.cache_utils import Cache

    from act_harness.attention.families.family import Attend

__all__ = ["MPT"]


class MPT(Family):
    """See :class:`act_harness.attention.families.family.Family`."""

    attention = "MptAttention"
    method = "forward"

    def search_obstacle(self, module: nn.Module) -> str | None:
        """Return why not."""
        return ALIBI

    def serve(
        self,
        module: Any,  # noqa: ANN401 - a MptAttention
        attend: Attend,
        hidden_states: Tensor,  # (B, C, hidden)
        position_bias: Tensor | None,  # (H, 1, longest)
        cache: Cache | None = None,
        attention_mask: Tensor | None = None,  # (B, 1, C, K) true where hidden
        **given: Any,  # noqa: ANN401 - the cache by its older name, and what this class ignores too
    ) -> tuple[Tensor, Tensor | None]:
        """Do what ``forward`` does."""
        fused = module.Wqkv(hidden_states)
        if module.clip_qkv:
            fused = fused.clamp(min=-module.clip_qkv, max=module.clip_qkv)
        heads = (module.n_heads, module.head_dim)
        query, key, value = (
            part.unflatten(-1, heads).transpose(1, 2) for part in fused.chunk(3, dim=2)
        )
        cache = find_cache((cache,), given)
        if cache is not None:
            key, value = cache.update(key, value, module.layer_idx)
        bias = None if position_bias is None else position_bias[..., -key.shape[2] :]
        dropout = module.attn_dropout_p if module.training else 0.0

        def run(q: Tensor, k: Tensor, v: Tensor, _: Tensor | None) -> tuple[Tensor, Tensor]:
            logits = q @ k.transpose(-1, -2) * module.softmax_scale
            if bias is not None:
                logits = logits + bias
            if attention_mask is not None:
                logits = logits.masked_fill(attention_mask, torch.finfo(q.dtype).min)
            maps = nn.functional.softmax(logits.float(), dim=-1).to(v.dtype)
            maps = nn.functional.dropout(maps, p=dropout, training=module.training)
            return (maps @ v).transpose(1, 2), maps

        mask = None if attention_mask is None else visible_columns(attention_mask, hidden=True)
        call = AttentionCall(
            query, key, value, module.softmax_scale, bias=None if bias is None else bias[None]
        )
        output, maps = attend(call, mask, run, dropout=dropout)
        return module.out_proj(output.flatten(2)), maps
