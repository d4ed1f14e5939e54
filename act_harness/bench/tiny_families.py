"""Random decoders of two layers with a tokenizer of bytes, of the families that scoring must hold.

They differ in what scoring has to get right: windows (Mistral, Gemma 3), learned positions (GPT-2,
OPT), norms of queries and keys (Qwen3, Gemma 3), learned sinks (GPT-OSS), grouped keys, and a
tokenizer that puts a first token before every text or does not. Queries and keys are peaky, so
that attention has sinks.
"""

from __future__ import annotations

from typing import Any

import torch
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

__all__ = ["FAMILIES", "make_family", "make_tokenizer"]

_SPECIAL = ("<pad>", "<s>", "</s>")

_SHAPE = {
    "vocab_size": 3 + 256,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 128,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
_GROUPED = {"intermediate_size": 48, "num_key_value_heads": 2}
_LAYERS = ["sliding_attention", "full_attention"]

FAMILIES: dict[str, tuple[str, bool, dict[str, Any]]] = {
    "Llama": ("llama", True, _GROUPED),
    "Mistral": ("mistral", True, {**_GROUPED, "sliding_window": 6}),
    "GPT-2": ("gpt2", False, {}),
    "Gemma 3": (
        "gemma3_text",
        True,
        {**_GROUPED, "head_dim": 8, "sliding_window": 6, "layer_types": _LAYERS},
    ),
    "Qwen3": ("qwen3", False, {**_GROUPED, "head_dim": 8}),
    "GPT-OSS": (
        "gpt_oss",
        False,
        {
            **{**_GROUPED, "head_dim": 8, "sliding_window": 6, "layer_types": _LAYERS},
            **{"num_local_experts": 2, "num_experts_per_tok": 1},
        },
    ),
    "OPT": ("opt", True, {"ffn_dim": 48, "word_embed_proj_dim": 32}),
}
"""Name to transformers' model type, whether its tokenizer adds a first token, and its shape."""

_PEAKY = ("q_proj", "k_proj", "c_attn")


def make_family(name: str, *, seed: int = 0, dtype: torch.dtype = torch.float32) -> Any:  # noqa: ANN401 - a PreTrainedModel
    """Return a random model of a family of :data:`FAMILIES`; the same weights in every dtype."""
    kind, _, more = FAMILIES[name]
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(CONFIG_MAPPING[kind](**{**_SHAPE, **more}))
    with torch.no_grad():
        for place, parameter in model.named_parameters():
            if parameter.ndim == 2 and any(part in place for part in _PEAKY):
                parameter.mul_(12)
            if "q_norm" in place:  # a norm would undo the line above
                parameter.add_(4)
            if place.endswith("sinks"):  # learned ones that take from little to nearly all
                parameter.copy_(torch.linspace(-2, 6, len(parameter)))
    return model.to(dtype).eval()


def make_tokenizer(*, first: bool) -> Any:  # noqa: ANN401 - a tokenizer
    """Return a tokenizer of bytes and three special tokens.

    Args:
        first: put ``<s>`` before every text.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors

    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {name: n for n, name in enumerate([*_SPECIAL, *letters])}
    backend: Any = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    if first:
        backend.post_processor = processors.TemplateProcessing(
            single="<s> $A", special_tokens=[("<s>", 1)]
        )
    names = dict(zip(("pad_token", "bos_token", "eos_token"), _SPECIAL, strict=True))
    return PreTrainedTokenizerFast(tokenizer_object=backend, **names)
