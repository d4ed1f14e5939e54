"""Stock attention together with its log-sum-exp, from the kernel that torch itself would choose.

The fused kernels behind ``scaled_dot_product_attention`` (flash and cuDNN on CUDA, flash on the
CPU) compute the log-sum-exp of every row and throw it away. Calling the same kernel directly gives
the same output, and a row of attention weights is then ``exp(q k scale - lse)``: no second softmax.
Where the model's kernel is another one, or has a mask, there is only the output.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend

from act_harness.engines.operation import Geometry, Stock

__all__ = ["Base", "attend_with_lse"]


class Base(NamedTuple):
    """What the model's own kernel computed."""

    output: Tensor  # (B, C, H, D), fresh: engines write into it
    lse: Tensor | None  # (B, H, C) float32 (float64 for such inputs), natural logarithm


def attend_with_lse(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    geometry: Geometry,
    stock: object,
    scale: float,
    softcap: float | None,
) -> Base:
    """Run the model's attention; see :class:`act_harness.engines.operation.Engine`."""
    if softcap is None and geometry.plain and getattr(stock, "kernel", "") == "sdpa":
        found = _fused(query, key, value, geometry.rows > 1, scale)
        if found is not None:
            return Base(found[0].transpose(1, 2).contiguous(), found[1])
    output: Tensor = stock()  # type: ignore[operator]
    return Base(output if isinstance(stock, Stock) else output.clone(), None)


def _fused(
    query: Tensor, key: Tensor, value: Tensor, causal: bool, scale: float
) -> tuple[Tensor, Tensor] | None:
    """Call the kernel that torch would choose; None where that one gives no log-sum-exp."""
    if torch.is_grad_enabled() and (query.requires_grad or key.requires_grad):
        return None
    grouped = query.shape[1] != key.shape[1]
    choose = getattr(torch, "_fused_sdp_choice", None)
    if choose is None or (grouped and not _knows_groups(query.device.type)):
        return None
    if query.shape[2] == 1:  # a decode step is short: what torch would choose is asked once
        allowed = (torch.backends.cuda.flash_sdp_enabled(), torch.backends.cuda.cudnn_sdp_enabled())
        place = (query.device, query.dtype, query.shape, key.shape[1], allowed)
        if place not in _CHOICES:
            if len(_CHOICES) >= _MOST_CHOICES:
                _CHOICES.clear()
            _CHOICES[place] = choose(
                query, key, value, None, 0.0, causal, scale=scale, enable_gqa=grouped
            )
        choice = _CHOICES[place]
    else:
        choice = choose(query, key, value, None, 0.0, causal, scale=scale, enable_gqa=grouped)
    aten = torch.ops.aten
    if query.device.type == "cpu" and choice == SDPBackend.FLASH_ATTENTION.value:
        return aten._scaled_dot_product_flash_attention_for_cpu(  # type: ignore[no-any-return]
            query, key, value, 0.0, causal, scale=scale
        )
    if query.device.type != "cuda":
        return None
    if choice == SDPBackend.CUDNN_ATTENTION.value:
        found = aten._scaled_dot_product_cudnn_attention(
            query, key, value, None, True, 0.0, causal, False, scale=scale
        )
        lse = found[1]
        return found[0], lse[..., 0] if lse.ndim == 4 else lse
    if choice == SDPBackend.FLASH_ATTENTION.value and query.shape[-1] % 8 == 0:
        found = aten._scaled_dot_product_flash_attention(
            query, key, value, 0.0, causal, False, scale=scale
        )
        return found[0], found[1][..., : query.shape[2]]
    return None


_GROUPS: dict[str, bool] = {}
_CHOICES: dict[tuple[object, ...], int] = {}
_MOST_CHOICES = 256


def _knows_groups(device: str) -> bool:
    """Whether the CPU's fused kernel takes fewer key heads than query heads (newer torch does)."""
    if device != "cpu":
        return True
    if device not in _GROUPS:
        query = torch.linspace(-1, 1, 2 * 4 * 8).view(1, 2, 4, 8)
        key = query[:, 1:]
        kernel = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
        try:
            lse = kernel(query, key, key, 0.0, False, scale=1.0)[1]
        except RuntimeError:
            _GROUPS[device] = False
            return False
        exact = torch.logsumexp(query @ key.transpose(-1, -2), dim=-1)
        _GROUPS[device] = lse.shape == exact.shape and torch.allclose(lse, exact, atol=1e-4)
    return _GROUPS[device]
