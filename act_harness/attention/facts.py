"""What identifies a loaded model: the facts that an artifact records and is checked against."""

from __future__ import annotations

import hashlib
import json
from typing import TYPE_CHECKING, Any

import torch

from act_harness.artifact import ModelFacts
from act_harness.attention.tokenizer_probe import chat_probe, tokenizer_probe
from act_harness.errors import UnsupportedModelError

if TYPE_CHECKING:
    from transformers import PreTrainedModel

__all__ = ["model_facts", "tokenizer_fingerprint", "weights_fingerprint"]

_SAMPLES = 256


def weights_fingerprint(model: PreTrainedModel) -> str | None:
    """Return a hash of the weights that is the same for any file format and load dtype.

    Hashed are name, shape and up to 256 evenly spaced values of every parameter, rounded to
    bfloat16: loading one checkpoint as float32 or as bfloat16 gives the same hash, and a 7B model
    takes well under a second. None where weights are not in memory (offloaded to meta).
    """
    digest = hashlib.sha256()
    for name, parameter in sorted(model.named_parameters()):
        if parameter.device.type == "meta":
            return None
        flat = parameter.detach().reshape(-1)
        step = max(1, flat.numel() // _SAMPLES)
        values = flat[::step][:_SAMPLES].to(torch.bfloat16).contiguous().view(torch.int16).cpu()
        digest.update(f"{name}{tuple(parameter.shape)}".encode())
        digest.update(values.numpy().tobytes())
    return digest.hexdigest()


def tokenizer_fingerprint(tokenizer: Any) -> str:  # noqa: ANN401 - any transformers tokenizer
    """Return a hash of the vocabulary with its ids and of the special tokens.

    Information, not identity: releases of transformers differ in which special tokens they read
    off the same file. What a tokenizer does is :func:`tokenizer_probe`.
    """
    content = [sorted(tokenizer.get_vocab().items()), sorted(set(tokenizer.all_special_ids))]
    return hashlib.sha256(json.dumps(content).encode()).hexdigest()


def model_facts(
    model: PreTrainedModel,
    tokenizer: Any = None,  # noqa: ANN401 - any transformers tokenizer
    *,
    name: str | None = None,
    revision: str | None = None,
) -> ModelFacts:
    """Collect what identifies a model; the tokenizer's facts are None without one.

    Raises:
        UnsupportedModelError: the model has no attention heads.
    """
    config = model.config.get_text_config()
    if getattr(config, "num_attention_heads", None) is None:
        raise UnsupportedModelError(
            f"{type(model).__name__} has no attention heads, so there is nothing to calibrate; "
            "score it with lm-eval's --model hf"
        )
    template = getattr(tokenizer, "chat_template", None)
    return ModelFacts(
        id=str(name or model.config.name_or_path or type(model).__name__),
        architecture=type(model).__name__,
        num_hidden_layers=config.num_hidden_layers,
        num_attention_heads=config.num_attention_heads,
        weights_sha256=weights_fingerprint(model),
        revision=revision,
        tokenizer_sha256=None if tokenizer is None else tokenizer_fingerprint(tokenizer),
        tokenizer_probe_sha256=None if tokenizer is None else tokenizer_probe(tokenizer),
        chat_probe_sha256=None if tokenizer is None else chat_probe(tokenizer),
        dtype=str(model.dtype).removeprefix("torch."),
        chat_template_sha256=(
            hashlib.sha256(template.encode()).hexdigest() if isinstance(template, str) else None
        ),
        adds_bos=None if tokenizer is None else _adds_bos(tokenizer),
    )


def _adds_bos(tokenizer: Any) -> bool:  # noqa: ANN401
    first = tokenizer("a")["input_ids"][:1]
    return bool(first) and first[0] == tokenizer.bos_token_id
