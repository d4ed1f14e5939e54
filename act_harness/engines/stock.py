"""Stock attention together with its log-sum-exp, from the kernel that torch itself would choose.

The fused kernels behind ``scaled_dot_product_attention`` (flash and cuDNN on CUDA, flash on the
CPU) compute the log-sum-exp of every row and throw it away. Calling the same kernel directly gives
the same output, and a row of attention weights is then ``exp(q k scale - lse)``: no second softmax.
Where the model's kernel is another one, or has a mask, there is only the output.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend

from act_harness.engines.geometry import Geometry
from act_harness.engines.operation import AttentionCall, Stock

__all__ = ["Base", "FusedKernel", "attend_with_lse", "step_kernel"]

FusedKernel = Callable[[Tensor, Tensor, Tensor, bool, float], tuple[Tensor, Tensor]]
"""(query, key, value, causal, scale) -> output (B, H, C, D) and log-sum-exp (B, H, C)."""


class Base(NamedTuple):
    """What the model's own kernel computed."""

    output: Tensor  # (B, C, H, D), fresh: engines write into it
    lse: Tensor | None  # (B, H, C) float32 (float64 for such inputs), natural logarithm


def attend_with_lse(call: AttentionCall, *, geometry: Geometry, stock: object) -> Base:
    """Run the model's attention; see :class:`act_harness.engines.operation.Engine`."""
    if _is_fused(call, geometry, stock):
        kernel = _chosen(call, geometry.rows > 1)
        if kernel is not None:
            found = kernel(call.query, call.key, call.value, geometry.rows > 1, call.scale)
            return Base(found[0].transpose(1, 2).contiguous(), found[1])
    output: Tensor = stock()  # type: ignore[operator]
    fresh = isinstance(stock, Stock) and not output.requires_grad  # a gradient needs what it holds
    return Base(output if fresh else output.clone(), None)


def step_kernel(call: AttentionCall, *, geometry: Geometry, stock: object) -> FusedKernel | None:
    """Return the kernel that serves a decode step and all like it; None: only ``stock`` does."""
    if _is_fused(call, geometry, stock):
        return _chosen(call, False)
    return None


def _is_fused(call: AttentionCall, geometry: Geometry, stock: object) -> bool:
    """Whether a kernel without a mask, a cap, a bias or a sink computes what ``stock`` does."""
    plain = call.softcap is None and call.bias is None and call.sink_logits is None
    return plain and geometry.plain and getattr(stock, "kernel", "") == "sdpa"


def _chosen(call: AttentionCall, causal: bool) -> FusedKernel | None:
    """Return the kernel that torch would choose; None where that one gives no log-sum-exp."""
    query, key, value, scale = call[:4]
    if torch.is_grad_enabled() and (query.requires_grad or key.requires_grad):
        return None
    if not query.dtype == key.dtype == value.dtype:  # the kernels take one; autocast mixes them
        return None
    grouped = query.shape[1] != key.shape[1]
    choose = getattr(torch, "_fused_sdp_choice", None)
    if choose is None or (grouped and not _knows_groups(query.device.type)):
        return None
    if query.shape[2] == 1:  # a decode step is short: what torch would choose is asked once
        dense = query.stride(-1) == key.stride(-1) == value.stride(-1) == 1
        place = (
            query.device, query.dtype, query.shape, key.shape[1], value.shape[1], value.shape[3],
            dense, *_allowed(),
        )  # fmt: skip
        if place not in _CHOICES:
            if len(_CHOICES) >= _MOST_CHOICES:
                _CHOICES.clear()
            _CHOICES[place] = choose(
                query, key, value, None, 0.0, causal, scale=scale, enable_gqa=grouped
            )
        choice = _CHOICES[place]
    else:
        choice = choose(query, key, value, None, 0.0, causal, scale=scale, enable_gqa=grouped)
    device = query.device.type
    if device == "cpu" and choice == _FLASH_CHOICE:
        return _flash_on_cpu
    if device == "cuda" and choice == _CUDNN_CHOICE:
        return _cudnn
    if device == "cuda" and choice == _FLASH_CHOICE and not query.shape[-1] % 8:
        return _flash
    return None


# Numbers, read here: where a compiled model's graph breaks, torch 2.15 cannot trace the property.
_FLASH_CHOICE = SDPBackend.FLASH_ATTENTION.value
_CUDNN_CHOICE = SDPBackend.CUDNN_ATTENTION.value


def _operator(name: str) -> Any:  # noqa: ANN401 - torch's own
    """Return an operator by torch's generated binding, which takes less time than ``torch.ops``."""
    return getattr(torch, name, None) or getattr(torch.ops.aten, name)


_CPU = _operator("_scaled_dot_product_flash_attention_for_cpu")
_CUDNN = _operator("_scaled_dot_product_cudnn_attention")
_FLASH = _operator("_scaled_dot_product_flash_attention")


def _flash_on_cpu(
    query: Tensor, key: Tensor, value: Tensor, causal: bool, scale: float
) -> tuple[Tensor, Tensor]:
    return _CPU(query, key, value, 0.0, causal, scale=scale)  # type: ignore[no-any-return]


def _cudnn(
    query: Tensor, key: Tensor, value: Tensor, causal: bool, scale: float
) -> tuple[Tensor, Tensor]:
    found = _CUDNN(query, key, value, None, True, 0.0, causal, False, scale=scale)
    lse = found[1]
    return found[0], lse[..., 0] if lse.ndim == 4 else lse


def _flash(
    query: Tensor, key: Tensor, value: Tensor, causal: bool, scale: float
) -> tuple[Tensor, Tensor]:
    found = _FLASH(query, key, value, 0.0, causal, False, scale=scale)
    lse, rows = found[1], query.shape[2]
    return found[0], lse if lse.shape[2] == rows else lse[..., :rows]


def _allowed() -> tuple[bool, ...]:
    """Return the switches that torch's choice of a kernel depends on."""
    flags = torch.backends.cuda
    return (
        flags.flash_sdp_enabled(),
        flags.cudnn_sdp_enabled(),
        flags.mem_efficient_sdp_enabled(),
        flags.math_sdp_enabled(),
        torch.are_deterministic_algorithms_enabled(),
    )


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
