"""Attaching a head set to a model, and taking it off again: the functions that users call."""

from __future__ import annotations

import logging
from contextlib import contextmanager
from typing import TYPE_CHECKING

from act_harness.artifact import Artifact, ModelFacts, resolve_artifact
from act_harness.attention.attachment import Attachment
from act_harness.attention.facts import base_model, decoder_of, model_facts
from act_harness.attention.placement import input_device
from act_harness.engines import select_engine
from act_harness.engines.operation import Engine

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from transformers import PreTrainedModel, PreTrainedTokenizerBase

__all__ = ["attach", "calibrated", "detach", "prepare"]

_logger = logging.getLogger(__name__)


def prepare(
    model: PreTrainedModel,
    artifact: Artifact | str | Path | None,
    *,
    tokenizer: PreTrainedTokenizerBase | None = None,
    engine: str | Engine = "auto",
    facts: ModelFacts | None = None,
) -> Attachment:
    """Return an attachment that was checked on its model and is off; see :func:`attach`."""
    found = resolve_artifact(artifact, facts or model_facts(model, tokenizer))
    if isinstance(engine, str):
        plans = found.plans().values() if found else ()
        engine = select_engine(engine, device=input_device(base_model(model)).type, plans=plans)
    attachment = Attachment(model, found, engine, tokenizer=tokenizer)
    if attachment.plans:
        attachment.check()
        _logger.info(
            "calibrated attention: %s, %d heads in %d layers, engine %s",
            found.name if found else None,
            found.head_count() if found else 0,
            len(attachment.plans),
            engine.name,
        )
    return attachment


def attach(
    model: PreTrainedModel,
    artifact: Artifact | str | Path | None,
    *,
    tokenizer: PreTrainedTokenizerBase | None = None,
    engine: str | Engine = "auto",
    facts: ModelFacts | None = None,
) -> Attachment:
    """Calibrate a model's attention until the returned attachment is detached.

    What was attached before is covered, not mixed with: the last one is in force alone, and the
    one before it again after it was detached. :func:`detach` undoes all. A copy or pickle of a
    calibrated model is calibrated too, with its own weights.

    Args:
        model: a loaded causal language model on the ``sdpa`` or ``eager`` kernel.
        artifact: an artifact, its path, the name of a shipped one, or None / ``"none"`` for the
            stock model.
        tokenizer: checked against the artifact when given; target ``span`` needs it.
        engine: ``auto``, the name of an engine, or an engine.
        facts: what identifies the model, where that is known already.

    Raises:
        ArtifactError: unknown, malformed, or for another model.
        UnsupportedModelError: the model cannot be calibrated; it is left as it was.
    """
    attachment = prepare(model, artifact, tokenizer=tokenizer, engine=engine, facts=facts)
    attachment.push()
    return attachment


def detach(model: PreTrainedModel) -> None:
    """Give a model its own attention back: take off all that is attached, by whom ever.

    For attachments whose handle was lost, and for copies of calibrated models. Does nothing to a
    stock model.
    """
    attachments = Attachment.stack_of(decoder_of(base_model(model)))
    while attachments:
        attachments[-1].detach()


@contextmanager
def calibrated(
    model: PreTrainedModel,
    artifact: Artifact | str | Path | None,
    *,
    tokenizer: PreTrainedTokenizerBase | None = None,
    engine: str | Engine = "auto",
    facts: ModelFacts | None = None,
) -> Iterator[Attachment]:
    """Calibrate a model's attention inside a ``with`` block; see :func:`attach`.

    Blocks nest: the inner one is in force alone, also where it is the stock model (None).
    """
    attachment = attach(model, artifact, tokenizer=tokenizer, engine=engine, facts=facts)
    try:
        yield attachment
    finally:
        attachment.detach()
