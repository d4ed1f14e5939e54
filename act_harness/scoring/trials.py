"""Trials of a model for scoring: may its contexts be packed, may a cache of them be extended?

Each tries a few tokens through the very forwards that scoring uses, on the stock model and under
the same autocast, and keeps its answer in
:class:`~act_harness.attention.capabilities.ModelCapabilities`.
"""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING

import torch

from act_harness.attention import packing_trial
from act_harness.attention.cache import cache_argument
from act_harness.attention.capabilities import (
    MODEL_FAILURES,
    Answer,
    ModelCapabilities,
    Side,
    capabilities_of,
)
from act_harness.attention.head_set import head_set
from act_harness.attention.lifecycle import prepare
from act_harness.attention.rounding import alike, largest_change, rounding, spread_tokens
from act_harness.errors import ActHarnessError, InternalError
from act_harness.scoring.forwards import Forwards
from act_harness.scoring.head import bare_head

if TYPE_CHECKING:
    from transformers import PreTrainedModel

__all__ = ["extends", "packs", "try_all"]

_logger = logging.getLogger(__name__)


def try_all(model: PreTrainedModel) -> ModelCapabilities:
    """Return what a model can do, with nothing left untried but captured forwards.

    How its logits round is measured where it can be calibrated, since nothing else asks.
    """
    forwards = Forwards(model)
    with forwards.stock():
        known = capabilities_of(model)
        packing_trial.packs_segments(model)
        bare_head(model)
    extends(forwards)
    known.calibrates = _calibration(model)
    return known


def _calibration(model: PreTrainedModel) -> Answer[bool]:
    """Attach a head of every layer, and take it off again."""
    layers = model.config.get_text_config().num_hidden_layers
    try:
        attachment = prepare(model, head_set(model, {layer: [0] for layer in range(layers)}))
    except ActHarnessError as error:
        return Answer(False, str(error))
    name = attachment.engine.name
    return Answer(True, f"tried: all {layers} layers run calibrated, by the engine {name!r}")


def packs(forwards: Forwards) -> Answer[bool]:
    """Return whether contexts and answers can be packed; tried once a model."""
    with forwards.stock():
        return packing_trial.packs(forwards.model)


def extends(forwards: Forwards) -> Answer[Side | None]:
    """Return how contexts are padded so that answers over a repeated cache score as wholes do.

    Where right pads between context and answer shift something that counts positions of keys
    (ALiBi), left pads are tried; models whose cache cannot be repeated fail both. Tried once a
    model.
    """
    with forwards.stock():
        known = capabilities_of(forwards.model)
        if known.extends is None:
            known.extends = _extension(forwards.model, windowed=known.window.value is not None)
        return known.extends


def _extension(model: PreTrainedModel, *, windowed: bool) -> Answer[Side | None]:
    sides: tuple[Side, ...] = ("left",) if windowed else ("right", "left")
    obstacles: list[str] = []
    for side in sides:
        obstacle = _extension_obstacle(model, side)
        if obstacle is None:
            tried = f"tried: over a cache, with {side} pads, answers score as whole sequences do"
            return Answer(side, "; ".join([tried, *obstacles]))
        obstacles.append(f"with {side} pads, {obstacle}")
    alone = _cached_otherwise(model)
    if alone is not None:
        obstacles = [alone]
    _logger.warning(
        "%s: its cache cannot be extended by several answers, so every request is "
        "computed by itself",
        type(model).__name__,
    )
    return Answer(None, "; ".join(obstacles))


def _cached_otherwise(model: PreTrainedModel) -> str | None:
    """Say whether one sequence over its own cache, with no pads at all, is another than whole."""
    tokens = spread_tokens(range(1, 12), model.config.get_text_config().vocab_size)
    forwards = Forwards(model)
    whole = forwards.prefill([tokens], [range(8, 11)], prompts=[11], use_cache=False).logits.all()
    ids = torch.tensor([tokens], device=forwards.device)
    try:
        first = forwards.prefill([tokens[:8]], [[7]], prompts=[8], use_cache=True)
        given = {cache_argument(model.forward): first.cache, "use_cache": True}
        rest = model(input_ids=ids[:, 8:], **given).logits[0]
    except torch.OutOfMemoryError:  # says nothing about the model
        raise
    except MODEL_FAILURES as error:
        return f"its stock forward of several tokens over a cache fails ({str(error)[:200]})"
    rest = rest.to(whole.device, whole.dtype)
    if alike(rest, whole, model.dtype, noise=rounding(model, [tokens])):
        return None
    off = largest_change(rest, whole)
    return (
        f"its stock forward of several tokens over a cache differs by {off:.2g} from the one "
        "without a cache"
    )


def _extension_obstacle(model: PreTrainedModel, side: Side) -> str | None:
    """Try contexts of two lengths and three answers over their cache against whole sequences."""
    forwards = Forwards(model)
    forwards.pads_left = side == "left"
    vocabulary = model.config.get_text_config().vocab_size
    given = [(1, 4, 2, 8, 5, 7, 9, 3), (3, 6)]
    asked = [(0, (2, 4)), (1, (9, 1, 3)), (1, (5, 5))]
    contexts = [spread_tokens(tokens, vocabulary) for tokens in given]
    answers = [(b, spread_tokens(answer, vocabulary)) for b, answer in asked]
    try:
        rows = [range(len(context)) for context in contexts]
        lengths = [len(context) for context in contexts]
        cached = forwards.prefill(contexts, rows, prompts=lengths, use_cache=True)
        found = forwards.extend(cached, [b for b, _ in answers], [a for _, a in answers])
        whole = []
        for b, answer in answers:
            sequence = [*contexts[b], *answer]
            last = range(len(contexts[b]), len(sequence))
            alone = forwards.prefill([sequence], [last], prompts=[len(sequence)], use_cache=False)
            whole.append(alone.logits.all())
        noise = rounding(model, [given[b] + answer for b, answer in asked])
    except torch.OutOfMemoryError:  # says nothing about the model
        raise
    except (*MODEL_FAILURES, InternalError) as error:  # the last where it gives no cache
        return f"extending its cache fails ({' '.join(str(error).split())[:200]})"
    if alike(found.all(), torch.cat(whole), model.dtype, noise=noise):
        return None
    return "logits over its cache differ from those of whole sequences"
