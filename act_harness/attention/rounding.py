"""How far stock logits move by rounding alone: the yardstick of every trial of a model.

Two ways to compute the same logits differ by the order of sums. How much, depends on the dtype and
the machine, so it is measured on the stock model itself, with tokens that are not special.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from act_harness.attention.placement import input_device

if TYPE_CHECKING:
    from collections.abc import Sequence

    from transformers import PreTrainedModel

__all__ = ["alike", "batch_logits", "largest_change", "logits_of", "rounding", "spread_tokens"]


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
    alone = [logits_of(model, tokens) for tokens in sequences]
    batch = batch_logits(model, sequences)
    longer = [logits_of(model, [*tokens, *range(2)])[: len(tokens)] for tokens in sequences]
    pairs = [pair for others in (batch, longer) for pair in zip(alone, others, strict=True)]
    return max(largest_change(one, other) for one, other in pairs)


def largest_change(found: Tensor, expected: Tensor) -> float:
    """Return the largest difference of logits of one shape."""
    return float((found - expected).abs().max())


def logits_of(
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


def batch_logits(model: PreTrainedModel, sequences: Sequence[Sequence[int]]) -> list[Tensor]:
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
