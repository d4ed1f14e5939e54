"""Random decoders made from configurations, small enough for any test."""

from __future__ import annotations

from typing import Any

import torch
from transformers import AutoModelForCausalLM, PreTrainedModel
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

_SHAPE = {
    "vocab_size": 97,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}


_PEAKY = ("q_proj", "k_proj", "qkv", "c_attn", "query_key")


def make_tiny(
    kind: str = "llama", *, seed: int = 0, dtype: Any = torch.float64, **more: Any
) -> PreTrainedModel:
    """A random decoder of three layers whose attention has sinks (peaky queries and keys)."""
    torch.manual_seed(seed)
    settings = dict(_SHAPE)
    if kind.startswith("gemma"):
        settings |= {"head_dim": 8, "sliding_window": 6}
    if kind == "mistral":
        settings |= {"sliding_window": 6}
    config = CONFIG_MAPPING[kind](**{**settings, **more})
    model = AutoModelForCausalLM.from_config(config).to(dtype).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim == 2 and any(part in name for part in _PEAKY):
                parameter.mul_(12)
            if "q_norm" in name:  # a norm would undo the line above
                parameter.add_(4)
            if name.endswith("sinks"):  # learned ones that take from next to nothing to nearly all
                parameter.copy_(torch.linspace(-2, 6, len(parameter)))
    return model
