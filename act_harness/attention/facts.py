"""What identifies a loaded model: the facts that an artifact records and is checked against."""

from __future__ import annotations

import hashlib
import json
from typing import TYPE_CHECKING, Any, cast

import torch

from act_harness.artifact import ModelFacts
from act_harness.attention.dimensions import head_count, of_layers
from act_harness.attention.tokenizer_probe import chat_probe, tokenizer_probe
from act_harness.errors import InputError, UnsupportedModelError
from act_harness.support.provenance import sha256_text

if TYPE_CHECKING:
    from torch import nn
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

__all__ = [
    "adapter_fingerprint",
    "base_model",
    "decoder_of",
    "model_facts",
    "process_count",
    "tokenizer_fingerprint",
    "weights_fingerprint",
]

_SAMPLES = 256


def base_model(model: nn.Module) -> PreTrainedModel:
    """Return the model inside wrappers of peft and ``torch.compile``; any other is its own."""
    while True:
        compiled = getattr(model, "_modules", {}).get("_orig_mod")  # importing dynamo is slow
        if compiled is not None:
            model = compiled
        elif hasattr(model, "get_base_model") and hasattr(model, "peft_config"):
            model = cast("Any", model).get_base_model()
        else:
            return cast("PreTrainedModel", model)


def process_count(model: nn.Module) -> int:
    """Return over how many processes a model's heads are split (``tp_plan``); 1: it is whole."""
    return getattr(base_model(model), "tp_size", None) or 1


def decoder_of(model: PreTrainedModel) -> Any:  # noqa: ANN401 - a decoder is no class of its own
    """Return what of a model runs the layers: its hooks and configuration count.

    ModernBERT calls its output head ``decoder``, which ``get_decoder`` then returns.
    """
    found = model.get_decoder()
    return found if hasattr(found, "config") else model.base_model


def weights_fingerprint(model: PreTrainedModel) -> str | None:
    """Return a hash of the weights that is the same for any file format and load dtype.

    Hashed are name, shape and up to 256 evenly spaced values of every parameter, rounded to
    bfloat16: loading one checkpoint as float32 or as bfloat16 gives the same hash, and a 7B model
    takes well under a second. None where weights are not in memory (offloaded to meta), or are
    parts that do not say of what (``tp_plan`` in older transformers). Of a model with peft adapters
    the base model's weights are hashed, under their own names. A model of compressed-tensors is
    decompressed for it, as its first forward would do.
    """
    _decompress(base_model(model))
    if process_count(model) > 1 and not any(
        hasattr(parameter, "full_tensor") for parameter in model.parameters()
    ):
        return None
    return _fingerprint(_split_weights(model)[0])


def _decompress(base: nn.Module) -> None:
    """Give a model the parameters that it has after its first forward (compressed-tensors).

    What it is loaded with are packed integers under other names, which its own hook exchanges: a
    hash of those would refuse the same model a forward later.
    """
    handle = getattr(base, "ct_decompress_hook", None)
    hook: Any = None if handle is None else base._forward_pre_hooks.get(handle.id)
    if hook is not None and all(part.device.type != "meta" for part in base.parameters()):
        hook(base, ())


def adapter_fingerprint(model: nn.Module) -> str | None:
    """Return names, kinds and a hash of the active peft adapters; None for a model without.

    For example ``"default (LORA) 1f0c9a3b55d2"``.
    """
    base = base_model(model)
    layers = [module for module in base.modules() if _adapts(module)]
    active = sorted({name for layer in layers for name in _active(layer)})
    if not active:
        return None
    configs = getattr(base, "peft_config", {})
    kinds = [getattr(configs.get(name), "peft_type", None) for name in active]
    told = [
        f"{name} ({getattr(kind, 'value', kind)})" for name, kind in zip(active, kinds, strict=True)
    ]
    others = set(configs) - set(active)
    weights = {
        name: value
        for name, value in _split_weights(model)[1].items()
        if others.isdisjoint(name.split("."))
    }
    return f"{', '.join(told)} {str(_fingerprint(weights))[:12]}"


def _active(layer: Any) -> list[str]:  # noqa: ANN401 - one of peft's modules
    """Return the adapters that a peft module applies now."""
    return [] if layer.disable_adapters else list(layer.active_adapters)


def _split_weights(
    model: nn.Module,
) -> tuple[dict[str, nn.Parameter], dict[str, nn.Parameter]]:
    """Return the base model's parameters under their own names, and those of peft adapters.

    peft puts a module of its own in the place of one that it adapts and keeps the old one inside,
    as ``base_layer`` or ``original_module``.
    """
    base = base_model(model)
    wrappers = [name for name, module in base.named_modules() if _adapts(module)]
    own: dict[str, nn.Parameter] = {}
    adapters: dict[str, nn.Parameter] = {}
    for name, parameter in base.named_parameters():
        bare, added = name, False
        for wrapper in sorted(wrappers, key=len, reverse=True):  # the inner ones first
            inside = bare.removeprefix(f"{wrapper}.")
            if inside == bare:
                continue
            kept = next((k for k in _KEPT if inside.startswith(f"{k}.")), None)
            added = added or kept is None
            if kept is not None:
                bare = f"{wrapper}.{inside.removeprefix(kept + '.')}"
        (adapters if added else own)[name if added else bare] = parameter
    return own, adapters


_KEPT = ("base_layer", "original_module")


def _adapts(module: nn.Module) -> bool:
    """Whether a module is one of peft's, around a module of the base model."""
    return type(module).__module__.split(".")[0] == "peft" and any(
        kept in module._modules for kept in _KEPT
    )


def _fingerprint(weights: dict[str, nn.Parameter]) -> str | None:
    digest = hashlib.sha256()
    for name, parameter in sorted(weights.items()):
        if parameter.device.type == "meta":
            return None
        held: Any = parameter.detach()
        if hasattr(held, "full_tensor"):  # processes hold it together, and hash it together
            held = held.full_tensor()
        elif type(held) is not torch.Tensor and held.is_floating_point():
            held = held.dequantize()  # torchao's and quanto's are of a type of their own
        flat = held.reshape(-1)
        step = max(1, flat.numel() // _SAMPLES)
        values = flat[::step][:_SAMPLES].to(torch.bfloat16).contiguous().view(torch.int16).cpu()
        digest.update(f"{name}{tuple(parameter.shape)}".encode())
        digest.update(values.numpy().tobytes())
    return digest.hexdigest()


def tokenizer_fingerprint(tokenizer: PreTrainedTokenizerBase) -> str:
    """Return a hash of the vocabulary with its ids and of the special tokens.

    Information, not identity: releases of transformers differ in which special tokens they read
    off the same file. What a tokenizer does is :func:`tokenizer_probe`.
    """
    content = [sorted(tokenizer.get_vocab().items()), sorted(set(tokenizer.all_special_ids))]
    return sha256_text(json.dumps(content))


def model_facts(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase | None = None,
    *,
    name: str | None = None,
    revision: str | None = None,
) -> ModelFacts:
    """Collect what identifies a model; the tokenizer's facts are None without one.

    Of a model with peft adapters the facts are the base model's, and ``adapter`` names those.

    Raises:
        InputError: this is no loaded model.
        UnsupportedModelError: the model has no attention heads.
    """
    if not hasattr(base_model(model), "config"):
        raise InputError(
            f"a model was given as {type(model).__name__}; expected a loaded one, as "
            "transformers' AutoModelForCausalLM.from_pretrained returns it"
        )
    base = base_model(model)
    kind = type(base).__name__
    config = base.config.get_text_config()
    heads = head_count(config)
    if heads is None:
        raise UnsupportedModelError(
            f"{kind} has no attention heads, so there is nothing to calibrate; "
            "score it with lm-eval's --model hf"
        )
    template = getattr(tokenizer, "chat_template", None)
    return ModelFacts(
        id=str(name or base.config.name_or_path or kind),
        architecture=kind,
        num_hidden_layers=config.num_hidden_layers,
        num_attention_heads=heads,
        num_key_value_heads=_key_heads(config),
        weights_sha256=weights_fingerprint(base),
        adapter=adapter_fingerprint(model),
        revision=revision,
        tokenizer_sha256=None if tokenizer is None else tokenizer_fingerprint(tokenizer),
        tokenizer_probe_sha256=None if tokenizer is None else tokenizer_probe(tokenizer),
        chat_probe_sha256=None if tokenizer is None else chat_probe(tokenizer),
        dtype=str(base.dtype).removeprefix("torch."),
        chat_template_sha256=(sha256_text(template) if isinstance(template, str) else None),
        adds_bos=None if tokenizer is None else _adds_bos(tokenizer),
    )


def _key_heads(config: Any) -> int | None:  # noqa: ANN401 - any model's
    """Return a model's key heads; None where it does not say, or has other ones by layer."""
    first, *others = of_layers(config, "num_key_value_heads")
    known = isinstance(first, int) and first > 0 and all(one == first for one in others)
    return first if known else None


def _adds_bos(tokenizer: PreTrainedTokenizerBase) -> bool:
    first = tokenizer("a")["input_ids"][:1]
    return bool(first) and first[0] == tokenizer.bos_token_id
