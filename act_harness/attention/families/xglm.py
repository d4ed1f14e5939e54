"""XGLM: BART's attention; queries are scaled before the products."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from act_harness.attention.cache import find_cache
from act_harness.attention.families.family import Family
from act_harness.engines.operation import AttentionCall
from act_harness.errors import UnsupportedCallError

if TYPE_CHECKING:
    from torch import Tensor
    from transformers.cache_utils import Cache

    from act_harness.attention.families.family import Attend

__all__ = ["XGLM"]


class XGLM(Family):
    """See :class:`act_harness.attention.families.family.Family`."""

    attention = "XGLMAttention"
    method = "forward"

    def serve(
        self,
        module: Any,  # noqa: ANN401 - an XGLMAttention
        attend: Attend,
        hidden_states: Tensor,  # (B, C, hidden)
        key_value_states: Tensor | None = None,
        cache: Cache | None = None,
        attention_mask: Tensor | None = None,
        **given: Any,  # noqa: ANN401 - the cache by its older name, and what this class ignores too
    ) -> tuple[Tensor, Tensor | None]:
        """Do what ``forward`` does."""
        if key_value_states is not None:
            raise UnsupportedCallError(
                "XGLM attends to an encoder here, whose states are no prompt; leave out "
                "encoder_hidden_states while attention is calibrated"
            )
        query = _heads(module, module.q_proj(hidden_states) * module.scaling)
        key = _heads(module, module.k_proj(hidden_states))
        value = _heads(module, module.v_proj(hidden_states))
        cache = find_cache((cache,), given)
        if cache is not None:
            key, value = cache.update(key, value, module.layer_idx)
        dropout = module.dropout if module.training else 0.0

        def run(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor]:
            return _stock(q, k, v, mask, dropout)

        call = AttentionCall(query, key, value, 1.0)
        output, maps = attend(call, attention_mask, run, dropout=dropout)
        return module.out_proj(output.flatten(2)), maps


def _heads(module: Any, projected: Tensor) -> Tensor:  # noqa: ANN401
    """(B, C, H * D) to (B, H, C, D)."""
    heads: Tensor = projected.unflatten(-1, (module.num_heads, module.head_dim))
    return heads.transpose(1, 2)


def _stock(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, dropout: float
) -> tuple[Tensor, Tensor]:
    """Return output (B, C, H, D) and maps as the module computes them; half sums in float32."""
    logits = query @ key.transpose(-1, -2)
    if mask is not None:
        logits = (logits + mask).clamp(min=torch.finfo(logits.dtype).min)
    wide = torch.float32 if logits.dtype == torch.float16 else None
    maps = nn.functional.softmax(logits, dim=-1, dtype=wide).to(logits.dtype)
    dropped = nn.functional.dropout(maps, p=dropout, training=dropout > 0)
    return (dropped @ value).transpose(1, 2), maps
