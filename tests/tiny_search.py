"""Tiny models with real attention sinks, and random questions, for the search's tests."""

from __future__ import annotations

import random

import torch
from transformers import (
    Gemma2Config,
    Gemma2ForCausalLM,
    GptOssConfig,
    GptOssForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
)

from act_harness.search.documents import Document, TaskDocuments

SMALL = {
    "vocab_size": 97,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "attn_implementation": "sdpa",
}
MODELS = {
    "llama": (LlamaConfig, LlamaForCausalLM, {}),
    "mistral-window": (MistralConfig, MistralForCausalLM, {"sliding_window": 9}),
    "qwen2": (Qwen2Config, Qwen2ForCausalLM, {}),
    "gemma2": (
        Gemma2Config,
        Gemma2ForCausalLM,
        {"head_dim": 8, "sliding_window": 9, "attn_implementation": "eager"},
    ),
    "gpt-oss": (  # learned sink logits
        GptOssConfig,
        GptOssForCausalLM,
        {
            **{"head_dim": 8, "sliding_window": 9, "attn_implementation": "eager"},
            **{"num_local_experts": 2, "num_experts_per_tok": 1},
            "experts_implementation": "eager",  # the grouped kernels take no float64
        },
    ),
}


def tiny(kind: str = "llama") -> torch.nn.Module:
    config, model, extra = MODELS[kind]
    torch.manual_seed(5)
    made = model(config(**{**SMALL, **extra})).eval()
    with torch.no_grad():  # sharper attention than a fresh model has, so that sinks appear
        for name, parameter in made.named_parameters():
            if "q_proj.weight" in name or "k_proj.weight" in name:
                parameter.mul_(12)
            elif "lm_head" in name or "embed" in name or "o_proj" in name:
                parameter.mul_(4)
            elif name.endswith("sinks"):
                parameter.copy_(torch.linspace(-2, 6, len(parameter)))
    return made


def documents(count: int = 7, *, seed: int = 0, task: str = "t", common: int = 8) -> list[Document]:
    draw = random.Random(seed)  # noqa: S311 - no secret
    made = []
    instruction = tuple(draw.randrange(97) for _ in range(common))
    for number in range(count):
        own = tuple(draw.randrange(97) for _ in range(draw.randint(5, 14)))
        context = instruction + own
        answers = [
            tuple(draw.randrange(97) for _ in range(length))
            for length in (1, 1, draw.randint(1, 4))
        ]
        made.append(
            Document(task, f"{number:08x}{seed}", tuple((context, a) for a in answers), number % 3)
        )
    return made


def drawn(task: str, seed: int, n: int = 8) -> TaskDocuments:
    return TaskDocuments(
        task,
        search=tuple(documents(n, seed=seed, task=task)),
        verify=tuple(documents(n, seed=seed + 100, task=task)),
        judge=tuple(documents(n, seed=seed + 200, task=task)),
        source="train",
        evaluation="test",
        too_long=0,
    )
