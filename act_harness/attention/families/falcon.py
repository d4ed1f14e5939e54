"""Falcon: rotary embedding, or ALiBi that comes with the mask; grouped keys or one for all."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from act_harness.attention.families.family import ALIBI, Family, visible_columns
from act_harness.attention.interface import base_of
from act_harness.engines.operation import AttentionCall
from act_harness.errors import UnsupportedCallError

if TYPE_CHECKING:
    from torch import Tensor
    from transformers.cache_utils import Cache

    from act_harness.attention.families.family import Attend

__all__ = ["Falcon"]


class Falcon(Family):
    """See :class:`act_harness.attention.families.family.Family`."""

    attention = "FalconAttention"
    method = "forward"

    def search_obstacle(self, module: nn.Module) -> str | None:
        """Return why not, for checkpoints with ALiBi."""
        if module.config.alibi:  # type: ignore[union-attr]
            return ALIBI
        return None

    def serve(
        self,
        module: Any,  # noqa: ANN401 - a FalconAttention
        attend: Attend,
        hidden_states: Tensor,  # (B, C, hidden)
        alibi: Tensor | None,  # (B * H, 1, K)
        attention_mask: Tensor | None,  # (B, 1, C, K); with ALiBi (B, H, C, K), the bias in it
        position_ids: Tensor | None = None,
        layer_past: Cache | None = None,
        use_cache: bool = False,
        output_attentions: bool = False,
        position_embeddings: tuple[Tensor, Tensor] | None = None,
        **_: Any,  # noqa: ANN401 - what this class ignores too
    ) -> tuple[Tensor, Tensor | None]:
        """Do what ``forward`` does."""
        fused = base_of(module.config._attn_implementation) == "sdpa"
        if fused and output_attentions:
            raise UnsupportedCallError(
                "Falcon's attention maps under sdpa see later tokens (its eager code adds a mask "
                "that is not additive there); load it with attn_implementation=eager for maps"
            )
        parts = module._split_heads(module.query_key_value(hidden_states))
        query, key, value = (part.transpose(1, 2) for part in parts)  # (B, H or G, C, D)
        if alibi is None and position_embeddings is not None:
            from transformers.models.falcon.modeling_falcon import apply_rotary_pos_emb

            query, key = apply_rotary_pos_emb(query, key, *position_embeddings)
        if layer_past is not None:
            key, value = layer_past.update(key, value, module.layer_idx)
        scale = module.inv_norm_factor
        dropout = module.attention_dropout.p if module.training and alibi is not None else 0.0
        added, bias, visible = None, None, attention_mask
        if alibi is not None and attention_mask is not None:
            added = alibi.view(len(query), -1, 1, alibi.shape[-1])
            bias, visible = attention_mask, visible_columns(attention_mask)
            if not fused:  # adds once more what the decoder has put into the mask
                bias = bias + added * scale

        def run(
            q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None
        ) -> tuple[Tensor, Tensor | None]:
            mask = mask if bias is None else attention_mask
            if fused:
                return _fused(q, k, v, mask, dropout), None
            return _eager(q, k, v, mask, alibi=added, scale=scale, dropout=dropout)

        output, maps = attend(
            AttentionCall(query, key, value, scale, bias=bias),
            visible,
            run,
            dropout=dropout,
            kernel="sdpa" if fused else "eager",
        )
        return module.dense(output.flatten(2)), maps


def _fused(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, dropout: float
) -> Tensor:
    """Return the output (B, C, H, D) of torch's kernel, called as the module calls it."""
    output = nn.functional.scaled_dot_product_attention(
        query,
        key,
        value,
        attn_mask=mask,
        dropout_p=dropout,
        is_causal=mask is None and query.shape[2] > 1,
    )
    return output.transpose(1, 2)


def _eager(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    *,
    alibi: Tensor | None,
    scale: float,
    dropout: float,
) -> tuple[Tensor, Tensor]:
    """Return output (B, C, H, D) and maps, each in the order of the module's own roundings."""
    logits = query @ key.transpose(-1, -2)
    if alibi is None:
        logits /= math.sqrt(query.shape[-1])
    else:
        wide = torch.float32 if logits.dtype in (torch.float16, torch.bfloat16) else logits.dtype
        logits = (logits.to(wide) + alibi) * scale
    if mask is not None:
        logits = logits + mask
    maps = nn.functional.softmax(logits, dim=-1, dtype=query.dtype)
    maps = nn.functional.dropout(maps, p=dropout, training=dropout > 0)
    return (maps @ value).transpose(1, 2), maps
