"""Linear layers of a model through oneDNN, with weights laid out once for its matrix product.

On the CPU, torch multiplies float32 matrices by MKL, which lays the weights out anew at every call
and, on AMD's processors, computes 95 GFLOP/s a core where oneDNN computes 110 (Zen 4, shapes of
SmolLM2; on a Xeon both do alike). An exact search is matrix products for six sevenths of its time.
The layouts double the weights' memory, so there is a limit to it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    from collections.abc import Callable

__all__ = ["MOST_BYTES", "laid_out_linear"]

MOST_BYTES = 4 << 30
"""Weights of a model beyond this are not laid out a second time."""

_ROWS = 2048
"""Rows of a product that layouts are made for; those of a pack."""


def laid_out_linear(module: nn.Module) -> Callable[[Tensor], Tensor] | None:
    """Return a forward of a linear layer that runs through oneDNN; None where that is not to be.

    It gives the layer's result up to rounding. Inputs that need a gradient take the layer's own
    forward. Later changes of the weights are not seen.

    Args:
        module: any module; only a plain ``nn.Linear`` in float32 on the CPU, without hooks, is
            taken.
    """
    if type(module) is not nn.Linear or "forward" in module.__dict__ or not _available():
        return None
    weight, bias = module.weight, module.bias
    plain = weight.device.type == "cpu" and weight.dtype == torch.float32
    hooked = module._forward_hooks or module._forward_pre_hooks or module._backward_hooks
    if not plain or hooked:
        return None
    ops = torch.ops.mkldnn
    kept = ops._reorder_linear_weight(weight.detach(), _ROWS)
    own, fixed = module.forward, None if bias is None else bias.detach()

    def forward(values: Tensor) -> Tensor:
        if torch.is_grad_enabled() and values.requires_grad:
            return own(values)
        result: Tensor = ops._linear_pointwise(values, kept, fixed, "none", [], "")
        return result

    return forward


def _available() -> bool:
    ops = torch.ops.mkldnn
    return torch.backends.mkldnn.is_available() and all(
        hasattr(ops, name) for name in ("_reorder_linear_weight", "_linear_pointwise")
    )
