"""Target sets that no detection gives: drawn columns, the last ones, and those of a span.

Axes in the comments: b sequence, h selected head, t column. All of them depend on a sequence's own
prompt alone, never on its pads, its batch or its device.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from act_harness.errors import InternalError

if TYPE_CHECKING:
    from act_harness.calibration import LayerPlan
    from act_harness.engines.geometry import Geometry

__all__ = ["drawn_columns", "last_columns", "prompt_columns", "span_columns"]


def prompt_columns(geometry: Geometry, plan: LayerPlan) -> Tensor:
    """Return (b, h, t) bool: all of the prompt, which target ``head`` is about."""
    return geometry.prompt[:, None].expand(-1, len(plan.heads), -1)


def last_columns(geometry: Geometry, count: Tensor | int) -> Tensor:
    """Return (b, h, t) bool: the last columns of the prompt; ``count``: (b, h), or one for all."""
    left = geometry.prompt.flip(1).cumsum(dim=1).flip(1)[:, None]  # (b, 1, t), from t to the end
    most = count[..., None] if isinstance(count, Tensor) else count
    return geometry.prompt[:, None] & (left <= most)


def span_columns(geometry: Geometry, plan: LayerPlan) -> Tensor:
    """Return (b, h, t) bool: the columns of the prompt that are in its span.

    Raises:
        InternalError: nobody said where the span is.
    """
    if geometry.span is None:
        raise InternalError("target 'span' reached an engine without the columns of the span")
    return (geometry.span & geometry.prompt)[:, None].expand(-1, len(plan.heads), -1)


def drawn_columns(geometry: Geometry, plan: LayerPlan, count: Tensor) -> Tensor:
    """Return (b, h, t) bool: random columns of the prompt, without the first real token.

    A column's rank is a hash of seed, layer, head, position and token (``draw: fixed``), and of the
    whole prompt (``anew``). The ``count`` lowest ranks are drawn, fewer where there are no more.

    Args:
        geometry: of a prefill, with the ids of its tokens.
        plan: heads to draw for, and how.
        count: (b, h) columns to draw.

    Raises:
        InternalError: nobody said which tokens these are.
    """
    if geometry.ids is None:
        raise InternalError("target 'random' reached an engine without the ids of the tokens")
    ids, prompt = geometry.ids.long(), geometry.prompt
    position = geometry.real.cumsum(dim=1) - 1  # among real tokens: pads shift nothing
    token = _hashed(_hashed(ids.new_tensor(plan.calibration.seed), position), ids)  # (b, t)
    if plan.calibration.draw == "anew":
        whole = (token * prompt).sum(dim=1, keepdim=True)  # each holds its position: order counts
        token = _hashed(token, whole)
    heads = ids.new_tensor([plan.layer << 32 | plan.first_head + head for head in plan.heads])
    rank = _hashed(token[:, None], heads[None, :, None])  # (b, h, t)
    column = torch.arange(geometry.total, device=ids.device)
    eligible = prompt & (column != geometry.first[:, None])
    rank = rank.masked_fill(~eligible[:, None], torch.iinfo(torch.long).max)
    last = (count - 1).clamp(0, geometry.total - 1)[..., None]
    bound = rank.sort(dim=-1).values.gather(-1, last)  # (b, h, 1) the highest rank that is drawn
    return eligible[:, None] & (rank <= bound) & (count > 0)[..., None]


_GOLDEN = 0x9E3779B97F4A7C15 - (1 << 64)
_FIRST = 0xBF58476D1CE4E5B9 - (1 << 64)
_SECOND = 0x94D049BB133111EB - (1 << 64)


def _hashed(state: Tensor, value: Tensor) -> Tensor:
    """Mix whole numbers into a hash: a step of SplitMix64 (Steele, Lea and Flood, OOPSLA 2014).

    Products of int64 wrap around on every device, so that the hash is the same on all.
    """
    mixed = (state ^ value) + _GOLDEN
    mixed = (mixed ^ _shifted(mixed, 30)) * _FIRST
    mixed = (mixed ^ _shifted(mixed, 27)) * _SECOND
    return mixed ^ _shifted(mixed, 31)


def _shifted(bits: Tensor, places: int) -> Tensor:
    """Shift to the right with zeros, as unsigned numbers do; torch repeats the sign."""
    return (bits >> places) & ((1 << (64 - places)) - 1)
