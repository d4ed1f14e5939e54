"""Tiny models with recurrent layers beside attention, whose states show in the logits."""

from __future__ import annotations

import torch
from transformers import AutoModelForCausalLM
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

_SHAPE = {
    "vocab_size": 97, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3,
    "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 128,
    "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
_DELTA = {
    "head_dim": 8, "linear_key_head_dim": 8, "linear_value_head_dim": 8,
    "linear_num_key_heads": 2, "linear_num_value_heads": 4,
    "layer_types": ["linear_attention", "full_attention", "linear_attention"],
}  # fmt: skip
_EXPERTS = {
    "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16,
    "shared_expert_intermediate_size": 16,
}  # fmt: skip
_MAMBA = {
    "mamba_n_heads": 8, "mamba_d_head": 8, "mamba_n_groups": 1, "mamba_d_state": 4,
    "mamba_chunk_size": 8,
}  # fmt: skip
KINDS = {
    "qwen3_next": ({**_DELTA, **_EXPERTS}, [1]),
    "qwen3_5_text": (_DELTA, [1]),
    "falcon_h1": (
        {**_MAMBA, "mamba_n_heads": 4, "mamba_d_ssm": 32, "head_dim": 8},
        [0, 1, 2],
    ),
    "lfm2": ({"layer_types": ["conv", "full_attention", "conv"]}, [1]),
    "granitemoehybrid": (
        {
            **_MAMBA, "layer_types": ["mamba", "attention", "mamba"], "num_local_experts": 0,
            "shared_intermediate_size": 48,
        },
        [1],
    ),
    "bamba": ({**_MAMBA, "attn_layer_indices": [1], "attn_rotary_emb": 8}, [1]),
    "jamba": (
        {
            "attn_layer_period": 2, "attn_layer_offset": 1, "num_experts": 2,
            "num_experts_per_tok": 1, "use_mamba_kernels": False, "mamba_d_state": 4,
            "mamba_dt_rank": 4,
        },
        [1],
    ),
    "zamba2": (
        {
            "num_hidden_layers": 4, "layers_block_type": ["mamba", "hybrid"] * 2,
            "mamba_d_state": 4, "mamba_ngroups": 1, "n_mamba_heads": 8, "mamba_headdim": 8,
            "chunk_size": 8, "use_mem_rope": True, "num_mem_blocks": 1, "adapter_rank": 4,
        },
        [1, 3],
    ),
}  # fmt: skip


def hybrid(kind):
    torch.manual_seed(1)
    model = AutoModelForCausalLM.from_config(CONFIG_MAPPING[kind](**{**_SHAPE, **KINDS[kind][0]}))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim == 2 and ("q_proj" in name or "k_proj" in name):
                parameter.mul_(40)
            elif parameter.ndim >= 2 and "layers" in name:
                parameter.mul_(4)  # what recurrent layers do must show in the logits
    return model.float().eval()
