"""Packed forwards on a model: the switch, and whether the model's layers allow it.

A model can be packed when everything but its attention works token by token and its attention goes
through the interface with a kernel that calibration builds on. Its structure is looked at first
(:mod:`act_harness.attention.structure`). Then :func:`packs` runs a few tokens: other tokens in
one sequence must not change a bit of another one's logits, and packed logits must be those of
separate forwards, within what the shape of a batch alone does to stock logits in this dtype.
A sliding window counts positions, and would need a mask where the packed path has none: sequences
that fit into the narrowest window of a model do without, and whoever packs keeps longer ones out.
"""

from __future__ import annotations

import itertools
import logging
from contextlib import contextmanager
from dataclasses import replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from act_harness.attention.capabilities import MODEL_FAILURES, Answer, capabilities_of
from act_harness.attention.facts import decoder_of
from act_harness.attention.families import family_of
from act_harness.attention.interface import BASES, base_of, recording, register
from act_harness.attention.packing import Packing, Rows, packed
from act_harness.attention.placement import on_one_device
from act_harness.attention.rounding import alike, batch_logits, largest_change, logits_of, rounding
from act_harness.attention.structure import mixing_part

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from transformers import PreTrainedModel

__all__ = ["packed_forward", "packs", "packs_segments"]

_logger = logging.getLogger(__name__)


@contextmanager
def packed_forward(model: PreTrainedModel, packing: Packing) -> Iterator[None]:
    """Let the model's forward inside the block take its one row of tokens for ``packing``."""
    config = decoder_of(model).config
    before = config._attn_implementation_internal
    base = base_of(before)
    config._attn_implementation_internal = register(base)
    try:
        with packed(replace(packing, base=base)):
            yield
    finally:
        config._attn_implementation_internal = before


def packs(model: PreTrainedModel) -> Answer[bool]:
    """Return whether packed forwards of this model give what separate ones give.

    Tried once, with a few tokens; calibration must be suspended.
    """
    known = capabilities_of(model)
    if known.packs is None:
        obstacle = _obstacle(model)
        known.packs = Answer(
            obstacle is None,
            obstacle or "tried: a packed row gives what its sequences give, whatever else is in it",
        )
        if obstacle is not None:
            _logger.info(
                "%s: requests are scored in padded batches: %s", type(model).__name__, obstacle
            )
    return known.packs


def packs_segments(model: PreTrainedModel) -> Answer[bool]:
    """Return whether a packed forward attends over segments in every layer, on one device.

    Tried once, with a few tokens, on a model that packs; calibration must be suspended.
    """
    known = capabilities_of(model)
    if known.packs_segments is None:
        known.packs_segments = _segments_answer(model)
    return known.packs_segments


def _segments_answer(model: PreTrainedModel) -> Answer[bool]:
    if not packs(model).value:
        return Answer(False, "it does not pack")
    if not on_one_device(model):
        return Answer(False, "its weights are not all on one device")
    packing = Packing((3, 2), (3, 2))
    with packed_forward(model, packing):
        logits_of(model, (1, 4, 2, 8, 5), packing.position_ids)
    if packing.ways == {"segments"}:
        return Answer(True, "tried: all its layers attend over segments")
    return Answer(
        False, "tried: layers attend over padded batches, as on a CPU or in full precision"
    )


def _obstacle(model: PreTrainedModel) -> str | None:
    """Return why the model cannot be packed, None where it can."""
    kernel = base_of(model.config.get_text_config()._attn_implementation)
    if kernel not in BASES:
        return f"packing builds on attention {' or '.join(BASES)}, the model runs {kernel!r}"
    if any(map(family_of, model.modules())):
        return "its attention is its own, outside transformers' AttentionInterface"
    window = capabilities_of(model).window.value
    longest = len(_FIRST) + max(map(len, _ANSWERS))
    if window is not None and window < longest:
        return (
            f"its window of {window} tokens is less than the {longest} that packing is tried with"
        )
    mixing = mixing_part(model, windowed=window is not None)
    if mixing is not None:
        return mixing
    try:
        return _trial(model)
    except torch.OutOfMemoryError:  # says nothing about the model
        raise
    except MODEL_FAILURES as error:
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
            return logits_of(model, row, packing.position_ids)

    with recording() as calls:
        found = run(_SECOND, _ANSWERS[0])
    if not calls:
        return "it does not pass its attention through transformers' AttentionInterface"
    if len(calls) < layers:
        return f"{len(calls)} of its {layers} layers pass through transformers' AttentionInterface"
    sequences = (_SECOND, *(_FIRST + answer for answer in _ANSWERS))
    alone = [logits_of(model, tokens) for tokens in sequences]
    expected = torch.cat([alone[1][:6], alone[0], alone[1][6:], alone[2][6:]])
    noise = rounding(model, sequences)
    if not alike(found, expected, model.dtype, noise=noise):
        off = largest_change(found, expected)
        return (
            f"packed logits differ from separate ones by {off:.3g}, where the shape of a batch "
            f"makes {noise:.3g}"
        )
    # the first sequence and the last answer must not notice that their neighbours are others
    changed = run((7, 2, 4), (8, 6))
    before, after = (torch.cat([logits[:6], logits[11:]]) for logits in (found, changed))
    if torch.equal(before, after):
        return None
    noise = _neighbour_noise(model)
    if noise and alike(after, before, model.dtype, noise=noise):
        return None
    leak = largest_change(after, before)
    return f"other tokens in a packed row change a sequence's logits by {leak:.3g}"


def _neighbour_noise(model: PreTrainedModel) -> float:
    """Return what other sequences in a padded batch do to one: nothing, except through experts."""
    kept = (*_FIRST, *_ANSWERS[1])
    batches = [
        batch_logits(model, [kept, others, kept])
        for others in ((7, 2, 4, 8, 6), (3, 6, 9, 2, 4), (5, 5, 1, 0, 2))
    ]
    pairs = itertools.combinations(batches, 2)
    return max(largest_change(a[n], b[n]) for a, b in pairs for n in (0, 2))
