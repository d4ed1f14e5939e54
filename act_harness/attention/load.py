"""Models and tokenizers by transformers alone, for machines without lm-eval."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, cast

from act_harness.errors import UnsupportedModelError
from act_harness.support.model_arguments import check_device, check_dtype, check_place, loading

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

__all__ = ["auto_class", "has_encoder", "load_plain_model", "load_plain_tokenizer"]


def has_encoder(config: PretrainedConfig) -> bool:
    """Say whether transformers lists models of this type as encoder and decoder for text."""
    from transformers.models.auto import modeling_auto

    listed = modeling_auto.MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES
    return getattr(config, "model_type", None) in listed


def auto_class(config: PretrainedConfig) -> Any:  # noqa: ANN401 - one of transformers' auto classes
    """Return the class that loads a model of this configuration for text.

    That is ``AutoModelForCausalLM``, and ``AutoModelForImageTextToText`` for models of text and
    images that it does not know and lm-eval's ``hf`` cannot load (Mistral 3, Qwen-VL, Llava).

    Raises:
        UnsupportedModelError: transformers has no such model that goes on with a text.
    """
    import transformers

    causal, seen = transformers.AutoModelForCausalLM, transformers.AutoModelForImageTextToText
    brought = getattr(config, "auto_map", None) or {}  # code that comes with the checkpoint
    if causal.__name__ in brought or type(config) in transformers.MODEL_FOR_CAUSAL_LM_MAPPING:
        return causal
    with_images = type(config) in transformers.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING
    if with_images and not getattr(config, "is_encoder_decoder", False):
        return seen
    reason = "it has an encoder of its own for text" if with_images else "transformers lists none"
    raise UnsupportedModelError(
        f"models of type {getattr(config, 'model_type', None)!r} are no causal language models, "
        f"alone or with images ({reason}); give one that {causal.__name__} or {seen.__name__} loads"
    )


def load_plain_model(folder: str, *, dtype: str = "auto", device: str = "cpu") -> PreTrainedModel:
    """Load a causal language model by transformers alone, where lm-eval is not installed.

    Raises:
        InputError: there is no such dtype or kind of device.
        UnsupportedModelError: it is no causal language model.
        InfrastructureError: the model or device is missing.
    """
    from transformers import AutoConfig

    check_dtype(dtype)
    check_device(device)
    check_place(folder)
    with loading(folder):
        kind = auto_class(AutoConfig.from_pretrained(folder))
        model = kind.from_pretrained(folder, dtype=dtype)
        return cast("PreTrainedModel", model.to(device).eval())


def load_plain_tokenizer(folder: str) -> PreTrainedTokenizerBase:
    """Load the tokenizer of :func:`load_plain_model`.

    Raises:
        InfrastructureError: it cannot be had.
    """
    from transformers import AutoTokenizer

    with loading(folder):
        return cast("PreTrainedTokenizerBase", AutoTokenizer.from_pretrained(folder))
