"""Packed forwards on a model: the switch, and whether the model's layers allow it.

A model can be packed when everything but its attention works token by token and its attention goes
through the interface with the kernel ``sdpa``. Its structure is looked at first
(:mod:`act_harness.attention.structure`). Then :func:`packs` runs a few tokens: other tokens in
one sequence must not change a bit of another one's logits, and packed logits must be those of
separate forwards, within what the shape of a batch alone does to stock logits in this dtype.
Models with a sliding window are left alone: a window counts positions, and would need a mask where
the packed path has none.
"""

from __future__ import annotations

import itertools
import logging
from contextlib import contextmanager
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from act_harness.attention.interface import base_of, recording, register
from act_harness.attention.packing import Packing, Rows, packed
from act_harness.attention.placement import input_device, on_one_device
from act_harness.attention.structure import mixing_part
from act_harness.attention.trials import Trials

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from transformers import PreTrainedModel

__all__ = [
    "alike",
    "has_window",
    "packed_forward",
    "packs",
    "packs_segments",
    "rope_limit",
    "rounding",
    "spread_tokens",
]

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
    if not on_one_device(model):
        return False
    packing = Packing((3, 2), (3, 2))
    with packed_forward(model, packing):
        _logits(model, (1, 4, 2, 8, 5), packing.position_ids)
    return packing.ways == {"segments"}


def alike(found: Tensor, expected: Tensor, dtype: torch.dtype, *, noise: float = 0.0) -> bool:
    """Whether logits of a model of ``dtype``, computed in two ways, differ by rounding alone.

    Args:
        found: Any shape.
        expected: The same shape.
        dtype: What the model computes in.
        noise: What rounding is seen to do to such logits (:func:`rounding`).

    Returns:
        Whether the largest difference is within four times the noise, or 64 units in the last
        place of the largest logit (of coarse dtypes at most 0.3 standard deviations), and below
        one standard deviation: logits of other tokens differ by several.
    """
    spread = float(expected.std())
    floor = min(64 * torch.finfo(dtype).eps * float(expected.abs().max()), 0.3 * spread)
    return bool((found - expected).abs().max() <= min(max(4 * noise, floor), spread))


def spread_tokens(tokens: Sequence[int], vocabulary: int) -> list[int]:
    """Return token ids for small numbers: different ones, away from the special tokens.

    Special tokens stand at the ends of a vocabulary. Their activations can be so large that a
    rounding becomes half a standard deviation of the logits.
    """
    step = max(1, vocabulary // 24)
    return [(vocabulary // 7 + step * token) % vocabulary for token in tokens]


def rounding(model: PreTrainedModel, sequences: Sequence[Sequence[int]]) -> float:
    """Return the largest change of stock logits that comes from the shape of the batch alone.

    Each sequence by itself is compared with itself before other tokens, and in a padded batch with
    a mask. Neither means anything to a causal model.

    Args:
        model: a causal language model, uncalibrated.
        sequences: token ids, small numbers as :func:`spread_tokens` takes them.
    """
    alone = [_logits(model, tokens) for tokens in sequences]
    batch = _batch_logits(model, sequences)
    longer = [_logits(model, [*tokens, *range(2)])[: len(tokens)] for tokens in sequences]
    pairs = [pair for others in (batch, longer) for pair in zip(alone, others, strict=True)]
    return max(_largest(one, other) for one, other in pairs)


def _obstacle(model: PreTrainedModel) -> str | None:
    """Return why the model cannot be packed, None where it can."""
    kernel = base_of(model.config.get_text_config()._attn_implementation)
    if kernel != _BASE:
        return f"packing builds on attention {_BASE!r}, the model runs {kernel!r}"
    if has_window(model):
        return "it has a sliding window"
    mixing = mixing_part(model)
    if mixing is not None:
        return mixing
    try:
        return _trial(model)
    except torch.OutOfMemoryError:  # says nothing about the model
        raise
    except (RuntimeError, TypeError, ValueError, IndexError) as error:
        return f"a packed forward fails ({' '.join(str(error).split())[:200]})"


_FIRST, _SECOND = (1, 4, 2, 8, 5, 7), (3, 6, 9)
_ANSWERS = ((2, 4), (9, 1, 3))


def _trial(model: PreTrainedModel) -> str | None:
    """Run a few tokens packed and apart; return what is wrong."""
    layers = model.config.get_text_config().num_hidden_layers
    packing = Packing((6, 3), (6, 3), (Rows(0, (2, 3)),))

    def run(second: Sequence[int], answer: Sequence[int]) -> Tensor:
        row = (*_FIRST, *second, *answer, *_ANSWERS[1])
        with packed_forward(model, packing):
            return _logits(model, row, packing.position_ids)

    with recording() as calls:
        found = run(_SECOND, _ANSWERS[0])
    if not calls:
        return "it does not pass its attention through transformers' AttentionInterface"
    if len(calls) < layers:
        return f"{len(calls)} of its {layers} layers pass through transformers' AttentionInterface"
    sequences = (_SECOND, *(_FIRST + answer for answer in _ANSWERS))
    alone = [_logits(model, tokens) for tokens in sequences]
    expected = torch.cat([alone[1][:6], alone[0], alone[1][6:], alone[2][6:]])
    noise = rounding(model, sequences)
    if not alike(found, expected, model.dtype, noise=noise):
        return (
            f"packed logits differ from separate ones by {_largest(found, expected):.3g}, where "
            f"the shape of a batch makes {noise:.3g}"
        )
    # the first sequence and the last answer must not notice that their neighbours are others
    changed = run((7, 2, 4), (8, 6))
    before, after = (torch.cat([logits[:6], logits[11:]]) for logits in (found, changed))
    if torch.equal(before, after):
        return None
    noise = _neighbour_noise(model)
    if noise and alike(after, before, model.dtype, noise=noise):
        return None
    leak = _largest(after, before)
    return f"other tokens in a packed row change a sequence's logits by {leak:.3g}"


def _neighbour_noise(model: PreTrainedModel) -> float:
    """Return what other sequences in a padded batch do to one: nothing, except through experts."""
    kept = (*_FIRST, *_ANSWERS[1])
    batches = [
        _batch_logits(model, [kept, others, kept])
        for others in ((7, 2, 4, 8, 6), (3, 6, 9, 2, 4), (5, 5, 1, 0, 2))
    ]
    return max(_largest(a[n], b[n]) for a, b in itertools.combinations(batches, 2) for n in (0, 2))


def _largest(found: Tensor, expected: Tensor) -> float:
    return float((found - expected).abs().max())


def _logits(
    model: PreTrainedModel, tokens: Sequence[int], positions: Tensor | None = None
) -> Tensor:
    """Return (T, vocabulary) logits of one row of tokens, on the CPU."""
    device = input_device(model)
    ids = spread_tokens(tokens, model.config.get_text_config().vocab_size)
    where = {} if positions is None else {"position_ids": positions.to(device)}
    given = torch.tensor([ids], device=device)
    with torch.no_grad():
        logits: Tensor = model(input_ids=given, use_cache=False, **where).logits
    return logits[0].float().cpu()


def _batch_logits(model: PreTrainedModel, sequences: Sequence[Sequence[int]]) -> list[Tensor]:
    """Return (T, vocabulary) logits of each sequence of a batch, padded on the right."""
    device = input_device(model)
    vocabulary = model.config.get_text_config().vocab_size
    longest = max(map(len, sequences)) + 2
    ids = [spread_tokens([*s, *[0] * (longest - len(s))], vocabulary) for s in sequences]
    real = [[1] * len(s) + [0] * (longest - len(s)) for s in sequences]
    given = {"input_ids": torch.tensor(ids), "attention_mask": torch.tensor(real)}
    with torch.no_grad():
        output = model(**{k: value.to(device) for k, value in given.items()}, use_cache=False)
    return [row[: len(s)].float().cpu() for row, s in zip(output.logits, sequences, strict=True)]
