"""Attention whose columns carry a strength, exact and differentiable, without N x N in memory.

``reweight`` with ``gamma = exp(theta)`` adds ``theta`` to the logits of the target columns before
the softmax. A sum of products can say that: queries get one more channel that is 1, keys one that
is ``theta / scale`` on the target columns and 0 elsewhere. Torch's fused kernels then compute the
calibrated output, and their backward the exact derivative by ``theta``; no bias is materialised.
Half precision keeps too few digits of ``theta``, so it is split over three channels there.

B sequences, H query heads, G key heads, T tokens, D values per head, S strengths of a head.
"""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from act_harness.engines.operation import masked_logits, masked_softmax, visible_mass

if TYPE_CHECKING:
    from act_harness.engines.geometry import Geometry
    from act_harness.engines.operation import AttentionCall

__all__ = ["attention_with_bias", "column_bias", "column_sums"]

_MULTIPLE = 8
"""Of head sizes that fused kernels take."""

_KERNELS = [SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]
"""Those whose backward can add up in one order. Left to itself torch also takes cuDNN's in a
forward, and another one where a checkpointed layer is computed again under deterministic rules."""


def column_bias(theta: Tensor, columns: tuple[Tensor, ...]) -> Tensor:
    """Return (B, H, T) what is added to the logits of each column.

    Args:
        theta: (S, H) logarithms of the strengths.
        columns: S sets, (B, H or 1, T) bool.
    """
    parts = (own[None, :, None] * where for own, where in zip(theta, columns, strict=True))
    bias: Tensor = functools.reduce(torch.add, parts)  # no column is in two of them
    return bias


def attention_with_bias(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    bias: Tensor,
    scale: float,
    softcap: float | None = None,
    added: Tensor | None = None,
    mask: Tensor | None = None,
    rows: Tensor | None = None,
    factor: Tensor | None = None,
    sink_logits: Tensor | None = None,
) -> Tensor:
    """Return attention with a bias on its columns, (B, T, H, D).

    Args:
        query: (B, H, T, D).
        key: (B, G, T, D).
        value: (B, G, T, D).
        bias: (B, H, T) float32 or better; differentiable.
        scale: factor on query-key products.
        softcap: soft cap on them.
        added: (B or 1, H, 1 or T, T) what a family adds to them (ALiBi).
        mask: (B or 1, 1, T, T) bool, what rows see; None: causal.
        rows: (B, T) bool, rows that bias and factor act on; None: all.
        factor: (H,) on what the softmax gets, an inverse temperature of each head.
        sink_logits: (1, H, 1) learned ones, whose share of a row stays what it is.

    Models with a soft cap, a bias or learned sinks take a dense path, O(T x T).
    """
    repeats = query.shape[1] // key.shape[1]
    key, value = (one.repeat_interleave(repeats, dim=1) for one in (key, value))
    if factor is not None:
        factor = factor[:, None, None]
        if rows is not None:
            factor = torch.where(rows[:, None, :, None], factor, 1.0)
    if softcap is not None or added is not None or sink_logits is not None:
        return _dense(
            query, key, value, bias=bias, scale=scale, softcap=softcap, added=added, mask=mask,
            rows=rows, factor=factor, sink_logits=sink_logits,
        )  # fmt: skip
    if factor is not None:
        query = query * factor.to(query.dtype)
    extra = _parts(bias / scale, query.dtype)  # (B, H, T, parts)
    size, own, parts = query.shape[-1], value.shape[-1], extra.shape[-1]
    ones = query.new_ones(*query.shape[:3], parts)
    if rows is not None:
        ones = ones * rows[:, None, :, None]
    width = max(size + parts, own)  # latent attention has values of another size
    width += -width % _MULTIPLE
    pads = query.new_zeros(*query.shape[:3], width - size - parts)
    query = torch.cat([query, ones, pads], dim=-1)
    key = torch.cat([key, extra, pads], dim=-1)
    value = torch.nn.functional.pad(value, (0, width - own))
    with sdpa_kernel(_KERNELS):
        output = torch.nn.functional.scaled_dot_product_attention(
            query, key, value, attn_mask=mask, is_causal=mask is None, scale=scale
        )
    return output[..., :own].transpose(1, 2)


def _parts(wanted: Tensor, dtype: torch.dtype) -> Tensor:
    """Split numbers (B, H, T) into summands of a dtype, (B, H, T, parts).

    The first carries the gradient: all of them are read by the same query channel value.
    """
    first = wanted.to(dtype)
    if dtype in (torch.float32, torch.float64):
        return first[..., None]
    found, left = [first], wanted.detach()
    for _ in range(2):
        left = left - found[-1].detach().to(left.dtype)
        found.append(left.to(dtype))
    return torch.stack(found, dim=-1)


def _dense(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    bias: Tensor,
    scale: float,
    softcap: float | None,
    added: Tensor | None,
    mask: Tensor | None,
    rows: Tensor | None,
    factor: Tensor | None,
    sink_logits: Tensor | None,
) -> Tensor:
    """Materialise the maps: a soft cap lies between the products and the bias."""
    dtype = bias.dtype
    if mask is None:
        square = (query.shape[2], key.shape[2])
        mask = torch.ones(square, dtype=torch.bool, device=query.device).tril()
    added = None if added is None else added.to(dtype)
    logits = masked_logits(query.to(dtype), key.to(dtype), mask, scale, softcap, bias=added)
    mass = None if sink_logits is None else visible_mass(logits, sink_logits)
    if factor is not None:
        logits = logits * factor
    strength = bias[:, :, None]
    logits = logits + (strength if rows is None else strength * rows[:, None, :, None])
    weights = torch.softmax(logits.masked_fill(~mask, torch.finfo(dtype).min), dim=-1)
    output = weights @ value.to(dtype)
    if mass is not None:
        output = output * mass
    return output.transpose(1, 2).to(value.dtype)


@torch.no_grad()
def column_sums(
    call: AttentionCall, *, geometry: Geometry, block_elements: int = 1 << 24
) -> Tensor:
    """Return (B, H, T): what each column receives from the prompt's rows, in blocks of rows.

    Args:
        call: of a prefill.
        geometry: which rows are the prompt, and what they see.
        block_elements: weights held at a time.
    """
    query, key, scale, softcap = call.query, call.key, call.scale, call.softcap
    dtype = torch.float64 if query.dtype == torch.float64 else torch.float32
    batch, heads, total = query.shape[:3]
    query, key = query.to(dtype), key.to(dtype).repeat_interleave(heads // key.shape[1], dim=1)
    prompt = geometry.scratch(
        ("prompt rows", dtype), lambda: geometry.prompt_rows.to(dtype)[:, None, None]
    )
    sums = query.new_zeros(batch, heads, total)
    block = max(1, min(total, block_elements // max(1, batch * heads * total)))
    for start in range(0, total, block):
        stop = min(start + block, total)
        width = stop if geometry.mask is None else total
        see = functools.partial(geometry.visible, start, stop)
        # kept for all layers where one block is all: more would be N x N in memory
        visible = geometry.scratch("visible", see) if block == total else see()[..., :width]
        bias = call.bias
        if bias is not None:
            bias = bias if bias.shape[2] == 1 else bias[:, :, start:stop]
            bias = bias[..., :width].to(dtype)
        weights = masked_softmax(
            query[:, :, start:stop], key[:, :, :width], visible, scale, softcap, bias=bias
        )
        sums[..., :width] += (prompt[..., start:stop] @ weights)[:, :, 0]
    return sums
