"""Every causal architecture of the installed transformers, made tiny and tried.

Each one is built from its configuration with two layers and random weights, without a download.
What is tried are the claims that hold for a supported model: strength 1 is stock, a sequence scores
alike alone and in a padded batch, cached tokens score as in one piece, greedy generation is the
argmax of scoring, engines agree, and detaching restores the logits to the bit. What these tries
compare with is the model itself; the tests of single families compare with an oracle of their own.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers import GenerationConfig, PreTrainedModel
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES,
)

from act_harness.artifact import Artifact
from act_harness.attention import Attachment, calibrated, model_facts
from act_harness.attention.cache import cache_argument, cache_of
from act_harness.attention.load import auto_class
from act_harness.attention.probe import attending_layers
from act_harness.calibration import Calibration
from act_harness.errors import ActHarnessError, InputError
from act_harness.scoring.trials import try_all
from act_harness.search.compute.gradient import StrengthenedModel
from act_harness.search.compute.opened import OpenedModel
from act_harness.search.compute.workbench import Workbench

__all__ = ["FamilyRow", "architectures", "build_tiny", "try_family"]

_LAYERS = 4  # hybrids have attention in every fourth layer at the least
_TINY: dict[str, int] = {
    **dict.fromkeys(("vocab_size", "text_vocab_size"), 97),
    **dict.fromkeys(
        ("hidden_size", "n_embd", "d_model", "dim", "embedding_size", "word_embed_proj_dim",
         "emb_dim", "embed_dim", "hidden_size_per_layer_input"), 32,
    ),
    **dict.fromkeys(
        ("intermediate_size", "ffn_dim", "ffn_hidden_size", "n_inner", "d_inner", "dff", "d_ff",
         "decoder_ffn_dim", "encoder_ffn_dim", "moe_intermediate_size", "feed_forward_length",
         "shared_expert_intermediate_size", "moe_shared_expert_intermediate_size"), 48,
    ),
    **dict.fromkeys(
        ("num_hidden_layers", "n_layer", "n_layers", "num_layers", "decoder_layers",
         "encoder_layers"), _LAYERS,
    ),
    **dict.fromkeys(
        ("num_attention_heads", "n_head", "n_heads", "num_heads", "attention_heads",
         "decoder_attention_heads", "encoder_attention_heads"), 4,
    ),
    **dict.fromkeys(
        ("num_key_value_heads", "num_kv_heads", "n_groups", "mamba_n_groups",
         "swa_num_key_value_heads"), 2,
    ),
    "swa_num_attention_heads": 4, "swa_head_dim": 8,
    "head_dim": 8, "rotary_dim": 4,
    **dict.fromkeys(
        ("max_position_embeddings", "n_positions", "max_seq_len", "max_sequence_length"), 128
    ),
    **dict.fromkeys(("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts"), 4),
    **dict.fromkeys(
        ("num_experts_per_tok", "moe_topk", "moe_top_k", "top_k_experts", "experts_per_token"), 2
    ),
    "n_group": 1, "topk_group": 1, "n_shared_experts": 1, "first_k_dense_replace": 1,
    "q_lora_rank": 16, "kv_lora_rank": 16, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8,
    "v_head_dim": 8, "vocab_size_per_layer_input": 97, "pad_token_id": 0, "bos_token_id": 1,
    "eos_token_id": 2, "sliding_window": 16, "window_size": 16, "attn_layer_period": 2,
    "attn_layer_offset": 1, "expert_layer_period": 2, "expert_layer_offset": 1,
    "num_kv_shared_layers": _LAYERS // 2,
    "mamba_d_head": 8, "mamba_n_heads": 8, "mamba_expand": 2,
}  # fmt: skip
"""Sizes by the names that configurations give them."""

_MADE = {"head_dim", "pad_token_id", "bos_token_id", "eos_token_id"}
"""Settings that are set also where a configuration leaves them open."""

_DERIVED = {
    "layer_types", "layers_block_type", "mlp_layer_types", "attention_layers", "per_layer_config",
}  # fmt: skip
"""Settings with an entry for each layer, which a configuration makes from its number of layers."""

_MOST_PARAMETERS = 20_000_000
_TOLERANCE = 1e-4
_IDS = (5, 17, 33, 88, 41, 9, 13, 60, 12, 7, 29, 54, 71, 22)
_PROMPT = 9


class FamilyRow(NamedTuple):
    """What was found about one architecture."""

    architecture: str
    route: str = "-"
    engines: str = "-"
    search: str = "-"
    generation: str = "-"
    result: str = ""
    """``works``, or ``refused``, ``wrong``, ``crashes``, ``not built``, or ``stock`` (the stock
    model breaks a claim itself, which says nothing about calibration), and the reason."""


class _WrongError(Exception):
    """A claim that does not hold."""


class _StockError(Exception):
    """A claim that does not hold for the stock model."""


def architectures() -> list[str]:
    """Return the model types that transformers loads for text, alone or with images, sorted."""
    both = MODEL_FOR_CAUSAL_LM_MAPPING_NAMES | MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES
    return sorted(both)


def build_tiny(kind: str) -> PreTrainedModel:
    """Return a random model of a model type with two layers, in float32, on the CPU.

    Raises:
        InputError: it is too large although its sizes were made small.
    """
    config_class = CONFIG_MAPPING[kind]
    config = config_class(**_tiny_settings(config_class().to_dict()))
    text = config.get_text_config()
    if "mrope_section" in getattr(text, "ignore_keys_at_rope_validation", ()):
        text.rope_parameters["mrope_section"] = [2, 1, 1]  # Qwen-VL's axes, of a head's halves
    with torch.device("meta"):
        hollow = auto_class(config).from_config(config, dtype=torch.float32)
    size = sum(one.numel() for one in hollow.parameters())
    if size > _MOST_PARAMETERS:
        raise InputError(
            f"a tiny {kind} has {size:,} parameters, at most {_MOST_PARAMETERS:,} are tried; "
            "its configuration names its sizes in ways that are not known here"
        )
    torch.manual_seed(0)
    model: PreTrainedModel = auto_class(config).from_config(config, dtype=torch.float32).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim == 2 and any(part in name for part in ("q_", "k_", "qkv", "query")):
                parameter.mul_(12)  # attention that has sinks
    return model


def _tiny_settings(given: dict[str, Any]) -> dict[str, Any]:
    """Return the settings of a tiny model, from those of a configuration and its parts."""
    made: dict[str, Any] = {}
    for name, value in given.items():
        if name in ("transformers_version", "model_type", "dtype") or name in _DERIVED:
            continue
        if isinstance(value, dict) and name.endswith("_config"):
            made[name] = _tiny_settings(value)
        elif name == "num_key_value_heads" and value == given.get("num_attention_heads"):
            made[name] = _TINY["num_attention_heads"]  # latent attention needs all of them
        elif name in _TINY and (value is not None or name in _MADE):
            size = _TINY[name]
            made[name] = [size, 2 * size] * (_LAYERS // 2) if isinstance(value, list) else size
        elif name == "is_decoder":
            made[name] = True
        elif name == "attn_layer_indices":  # Bamba's
            made[name] = list(range(1, _LAYERS, 2))
        elif name == "attention_types":  # GPT-Neo's
            made[name] = [[["global", "local"], _LAYERS // 2]]
    if "num_kv_shared_layers" in made:  # Gemma's: the first layers' keys serve the last ones
        made["layer_types"] = ["sliding_attention", "full_attention"] * (_LAYERS // 2)
    if given.get("model_type") == "granitemoehybrid":  # whose own layers are all recurrent
        made["layer_types"] = ["mamba", "attention"] * (_LAYERS // 2)
    if given.get("per_layer_config") and given.get("layer_types"):
        made |= _tiny_layers(given, made)
    return made


def _tiny_layers(given: dict[str, Any], made: dict[str, Any]) -> dict[str, Any]:
    """Return what a configuration says of layers of some types, whose heads are wider."""
    kinds = given["layer_types"]
    own = {kinds[int(layer)]: one for layer, one in given["per_layer_config"].items()}
    types = made.get("layer_types") or kinds[:_LAYERS]
    layers = {
        layer: {**_tiny_settings(own[kind]), "head_dim": 2 * _TINY["head_dim"]}
        for layer, kind in enumerate(types)
        if kind in own
    }
    return {"layer_types": types, "per_layer_config": layers}


def try_family(kind: str) -> FamilyRow:
    """Return the row of one model type; whatever goes wrong is what the row says."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return _try_family(kind)


def _try_family(kind: str) -> FamilyRow:
    try:
        model = build_tiny(kind)
        with torch.no_grad():
            _logits(model, [list(_IDS)])
    except Exception as error:  # noqa: BLE001 - any failure of code that is not ours
        return FamilyRow(kind, result=f"not built: {_line(error)}")
    row = FamilyRow(type(model).__name__)
    try:
        row = _tried(model, row)
    except ActHarnessError as error:
        row = row._replace(result=f"refused: {_line(error)}")
    except _StockError as error:
        row = row._replace(result=f"stock: {_line(error)}")
    except _WrongError as error:
        row = row._replace(result=f"wrong: {error}")
    except Exception as error:  # noqa: BLE001 - the row is about which ones come through
        row = row._replace(result=f"crashes: {type(error).__name__}: {_line(error)}")
    return row


def _tried(model: PreTrainedModel, row: FamilyRow) -> FamilyRow:
    stock = _logits(model, [list(_IDS)])[0]
    with calibrated(model, None) as nothing:
        try:
            _check_batch(model, nothing)
            _check_pieces(model, nothing, stock)
        except Exception as error:
            kind = "" if isinstance(error, _WrongError) else f"{type(error).__name__}: "
            raise _StockError(f"{kind}{error}") from error
    heads = _heads(model)
    artifact = _artifact(model, heads)
    with calibrated(model, artifact, engine="torch") as attachment:
        whole = _calibrated_logits(model, attachment, [list(_IDS)], [_PROMPT])[0]
        _check_batch(model, attachment)
        _check_pieces(model, attachment, whole)
    with calibrated(model, artifact, engine="reference") as attachment:
        again = _calibrated_logits(model, attachment, [list(_IDS)], [_PROMPT])[0]
    _require(again, whole, "engines reference and torch differ")
    with calibrated(model, _artifact(model, heads, beta=1.0)):
        _require(_logits(model, [list(_IDS)])[0], stock, "strength 1 is not stock")
    if not torch.equal(_logits(model, [list(_IDS)])[0], stock):
        raise _WrongError("logits are others after detaching")
    if torch.equal(whole, stock):
        raise _WrongError("calibration changes nothing")
    row = row._replace(route=_route(model), engines="reference, torch", search=_search(model))
    return row._replace(generation=_generation(model, artifact), result="works")


def _heads(model: PreTrainedModel) -> dict[int, tuple[int, ...]]:
    """Return all heads of all layers that can be calibrated."""
    return {layer: tuple(range(heads)) for layer, heads in attending_layers(model).items()}


def _artifact(
    model: PreTrainedModel, heads: dict[int, tuple[int, ...]], **settings: float
) -> Artifact:
    calibration = Calibration(**{"alpha": 1.5, **settings})
    return Artifact(name="tiny", model=model_facts(model), calibration=calibration, heads=heads)


def _logits(model: PreTrainedModel, rows: Sequence[Sequence[int]]) -> list[Tensor]:
    """Return (T, vocabulary) logits of each sequence, in one right-padded batch."""
    longest = max(map(len, rows))
    ids = torch.tensor([[*row, *[0] * (longest - len(row))] for row in rows])
    mask = torch.tensor([[1] * len(row) + [0] * (longest - len(row)) for row in rows])
    padded = {} if len(rows) == 1 else {"attention_mask": mask}
    with torch.no_grad():
        logits = model(input_ids=ids, use_cache=False, **padded).logits
    return [one[: len(row)] for one, row in zip(logits, rows, strict=True)]


def _calibrated_logits(
    model: PreTrainedModel, attachment: Attachment, rows: Sequence[Sequence[int]],
    prompts: Sequence[int],
) -> list[Tensor]:  # fmt: skip
    with attachment.prompts(prompts):
        return _logits(model, rows)


def _check_batch(model: PreTrainedModel, attachment: Attachment) -> None:
    rows = [list(_IDS[:size]) for size in (14, 8, 11, 14, 6)]
    prompts = [9, 5, 8, 4, 3]
    together = _calibrated_logits(model, attachment, rows, prompts)
    for row, prompt, found in zip(rows, prompts, together, strict=True):
        alone = _calibrated_logits(model, attachment, [row], [prompt])[0]
        _require(found, alone, "a sequence scores otherwise in a padded batch")


def _check_pieces(model: PreTrainedModel, attachment: Attachment, whole: Tensor) -> None:
    ids = torch.tensor([_IDS])
    with torch.no_grad():
        first = model(input_ids=ids[:, :_PROMPT], use_cache=True)
        cache = cache_of(first)
        if cache is None:
            raise _WrongError(f"its {type(first).__name__} holds no cache")
        given = {cache_argument(model.forward): cache, "use_cache": True}
        parts = [
            model(input_ids=ids[:, at : at + 1], **given).logits[0]
            for at in range(_PROMPT, len(_IDS))
        ]
    _require(torch.cat(parts), whole[_PROMPT:], "cached tokens score otherwise than in one piece")


def _require(found: Tensor, expected: Tensor, claim: str) -> None:
    off = float((found - expected).abs().max())
    if not off <= _TOLERANCE * max(1.0, float(expected.abs().max())):
        raise _WrongError(f"{claim} (by {off:.2g})")


def _route(model: PreTrainedModel) -> str:
    """Return how requests are scored."""
    found = try_all(model)
    if found.packs is not None and found.packs.value:
        return "packed"
    if found.extends is not None and found.extends.value:
        return "over the cache"
    return "one forward at a time"


def _search(model: PreTrainedModel) -> str:
    single = _opens(Workbench(model))
    tuned = _opens(StrengthenedModel(model, Calibration()))
    return single if single == tuned else f"{single}; by gradient {tuned}"


def _opens(model: OpenedModel) -> str:
    try:
        with model:
            return "yes"
    except ActHarnessError as error:
        return f"no: {_line(error)}"
    except Exception as error:  # noqa: BLE001 - a crash is a finding, too
        return f"crashes: {type(error).__name__}: {_line(error)}"


def _generation(model: PreTrainedModel, artifact: Artifact) -> str:
    try:
        with calibrated(model, artifact) as attachment:
            _check_generation(model, attachment)
    except ActHarnessError as error:
        return f"no: {_line(error)}"
    except _WrongError:
        with calibrated(model, None) as nothing:
            try:
                _check_generation(model, nothing)
            except _WrongError as error:
                return f"as stock's: {_line(error)}"
        raise
    return "yes"


def _check_generation(model: PreTrainedModel, attachment: Attachment) -> None:
    made = model.generate(
        torch.tensor([_IDS[:_PROMPT]]),
        # the model's own would force BART to end
        generation_config=GenerationConfig(max_new_tokens=4, pad_token_id=0, use_cache=True),
        do_sample=False,
    )
    row = made[0].tolist()
    scored = _calibrated_logits(model, attachment, [row[:-1]], [_PROMPT])[0]
    chosen = scored[_PROMPT - 1 :]
    picked = chosen.gather(1, torch.tensor(row[_PROMPT:])[:, None])[:, 0]
    _require(picked, chosen.max(dim=1).values, "generated tokens are not the argmax of scoring")


def _line(error: BaseException) -> str:
    return " ".join(str(error).split())[:160]
