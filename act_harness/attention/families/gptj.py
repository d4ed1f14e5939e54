"""GPT-J: rotary embedding on a part of each head, one method for the attention itself."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from act_harness.engines.operation import AttentionCall

if TYPE_CHECKING:
    from torch import Tensor, nn

    from act_harness.attention.families.family import Attend

__all__ = ["GPTJ"]


class GPTJ:
    """See :class:`act_harness.attention.families.family.Family`."""

    attention = "GPTJAttention"
    method = "_attn"

    def layer(self, module: nn.Module) -> int:
        """Return the layer's number."""
        return int(module.layer_idx)  # type: ignore[arg-type]

    def search_obstacle(self, module: nn.Module) -> str | None:
        """Return None: positions are in the queries and keys."""
        return None

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
