"""GPT-J: rotary embedding on a part of each head, one method for the attention itself."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from act_harness.attention.families.family import Family
from act_harness.engines.operation import AttentionCall

if TYPE_CHECKING:
    from torch import Tensor

    from act_harness.attention.families.family import Attend

__all__ = ["GPTJ"]


class GPTJ(Family):
    """See :class:`act_harness.attention.families.family.Family`."""

    attention = "GPTJAttention"
    method = "_attn"

    def serve(
        self,
        module: Any,  # noqa: ANN401 - a GPTJAttention
        attend: Attend,
        query: Tensor,  # (B, H, C, D)
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None = None,
    ) -> tuple[Tensor, Tensor | None]:
        """Attend as ``_attn`` does, in float32 whatever the model's dtype."""

        def run(*given: Tensor | None) -> tuple[Tensor, Tensor]:
            output, maps = type(module)._attn(module, *given)
            return output.transpose(1, 2), maps

        call = AttentionCall(query, key, value, 1 / module.scale_attn)
        dropout = module.attn_dropout.p if module.training else 0.0
        output, maps = attend(call, attention_mask, run, dropout=dropout)
        return output.transpose(1, 2), maps
