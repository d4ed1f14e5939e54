"""Packed forwards on a model: the switch, and whether the model's layers allow it.

A model can be packed when everything but its attention works token by token and its attention goes
through the interface with the kernel ``sdpa``. Names are no evidence: :func:`packs` runs a few
tokens both ways and compares. Models with a sliding window are left alone: a window counts
positions, and would need a mask where the packed path has none.
"""

from __future__ import annotations

import logging
from contextlib import contextmanager
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from act_harness.attention.interface import base_of, recording, register
from act_harness.attention.packed import Packing, Rows, packed
from act_harness.attention.trials import Trials

if TYPE_CHECKING:
    from collections.abc import Iterator

    from transformers import PreTrainedModel

__all__ = ["alike", "has_window", "packed_forward", "packs", "packs_segments", "rope_limit"]

_BASE = "sdpa"

_logger = logging.getLogger(__name__)

_known: Trials[bool] = Trials()


def has_window(model: PreTrainedModel) -> bool:
    """Whether some layer attends to a window or a chunk of the tokens only."""
    config = model.config.get_text_config()
    return (
        getattr(config, "sliding_window", None) is not None
        or getattr(config, "attention_chunk_size", None) is not None
        or getattr(config, "window_size", None) is not None  # GPT-Neo
    )


def rope_limit(model: PreTrainedModel) -> int | None:
    """Return how many tokens a forward may have before its rotary frequencies change.

    With ``dynamic`` and ``longrope`` scaling the frequencies of all tokens follow the longest
    position in a forward, so a request that is longer must be alone in its forward. None for all
    other models.
    """
    config = model.config.get_text_config()
    given = getattr(config, "rope_parameters", None) or getattr(config, "rope_scaling", None) or {}
    kinds = [given, *(value for value in given.values() if isinstance(value, dict))]
    limits = []
    for one in kinds:
        kind = one.get("rope_type") or one.get("type")
        if kind in ("dynamic", "longrope"):
            original = one.get("original_max_position_embeddings") or getattr(
                config, "original_max_position_embeddings", None
            )
            limits.append(int(original or config.max_position_embeddings))
            if kind == "dynamic":
                limits.append(int(config.max_position_embeddings))
    return min(limits, default=None)


@contextmanager
def packed_forward(model: PreTrainedModel, packing: Packing) -> Iterator[None]:
    """Let the model's forward inside the block take its one row of tokens for ``packing``."""
    config = model.get_decoder().config
    before = config._attn_implementation_internal
    config._attn_implementation_internal = register(_BASE)
    try:
        with packed(packing):
            yield
    finally:
        config._attn_implementation_internal = before


def packs(model: PreTrainedModel) -> bool:
    """Return whether packed forwards of this model give what separate ones give.

    Tried once for each model, with a few tokens; calibration must be suspended.
    """
    if model not in _known:
        reason = _obstacle(model)
        _known[model] = reason is None
        if reason is not None:
            _logger.info(
                "%s: requests are scored in padded batches: %s", type(model).__name__, reason
            )
    return _known[model]


def packs_segments(model: PreTrainedModel) -> bool:
    """Return whether a packed forward attends over segments in every layer, on one device.

    Tried with a few tokens; the model is one that :func:`packs` accepts, and calibration must be
    suspended.
    """
    if len({parameter.device for parameter in model.parameters()}) > 1:
        return False
    packing = Packing((3, 2), (3, 2))
    with torch.no_grad(), packed_forward(model, packing):
        _logits(model, (1, 4, 2, 8, 5), packing.position_ids)
    return packing.ways == {"segments"}


def alike(found: Tensor, expected: Tensor, dtype: torch.dtype) -> bool:
    """Whether logits of a model of ``dtype``, computed in two ways, differ by rounding alone."""
    share = 2e-3 if dtype in (torch.float32, torch.float64) else 0.3
    return bool((found - expected).abs().max() <= share * expected.std())


def _obstacle(model: PreTrainedModel) -> str | None:
    """Return why the model cannot be packed, None where it can."""
    kernel = base_of(model.config.get_text_config()._attn_implementation)
    if kernel != _BASE:
        return f"packing builds on attention {_BASE!r}, the model runs {kernel!r}"
    if has_window(model):
        return "it has a sliding window"
    first, second = (1, 4, 2, 8, 5, 7), (3, 6, 9)
    answers = ((2, 4), (9, 1, 3))
    packing = Packing((6, 3), (6, 3), (Rows(0, (2, 3)),))
    row = (*first, *second, *answers[0], *answers[1])
    try:
        with torch.no_grad():
            with packed_forward(model, packing), recording() as calls:
                found = _logits(model, row, packing.position_ids)
            alone = [_logits(model, tokens) for tokens in (second, *(first + a for a in answers))]
    except torch.OutOfMemoryError:  # says nothing about the model
        raise
    except (RuntimeError, TypeError, ValueError, IndexError) as error:
        return f"a packed forward fails ({' '.join(str(error).split())[:200]})"
    if not calls:
        return "it does not pass its attention through transformers' AttentionInterface"
    expected = torch.cat([alone[1][:6], alone[0], alone[1][6:], alone[2][6:]])
    if not alike(found, expected, model.dtype):
        worst = float((found - expected).abs().max())
        return f"packed logits differ from separate ones by {worst:.3g}"
    return None


def _logits(
    model: PreTrainedModel, tokens: tuple[int, ...], positions: Tensor | None = None
) -> Tensor:
    """Return (T, vocabulary) logits of one row of tokens, on the CPU."""
    device = model.get_input_embeddings().weight.device
    size = model.config.get_text_config().vocab_size
    ids = torch.tensor([tokens], device=device) % size
    where = {} if positions is None else {"position_ids": positions.to(device)}
    logits: Tensor = model(input_ids=ids, use_cache=False, **where).logits
    return logits[0].float().cpu()
