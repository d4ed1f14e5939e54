"""Models and tokenizers by transformers alone, for machines without lm-eval."""

from __future__ import annotations

from typing import TYPE_CHECKING, cast

from act_harness.support.model_arguments import check_device, check_dtype, check_place, loading

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

__all__ = ["load_plain_model", "load_plain_tokenizer"]


def load_plain_model(folder: str, *, dtype: str = "auto", device: str = "cpu") -> PreTrainedModel:
    """Load a causal language model by transformers alone, where lm-eval is not installed.

    Raises:
        InputError: there is no such dtype or kind of device.
        InfrastructureError: the model or device is missing.
    """
    from transformers import AutoModelForCausalLM

    check_dtype(dtype)
    check_device(device)
    check_place(folder)
    with loading(folder):
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype)
        return cast("PreTrainedModel", model.to(device).eval())


def load_plain_tokenizer(folder: str) -> PreTrainedTokenizerBase:
    """Load the tokenizer of :func:`load_plain_model`.

    Raises:
        InfrastructureError: it cannot be had.
    """
    from transformers import AutoTokenizer

    with loading(folder):
        return cast("PreTrainedTokenizerBase", AutoTokenizer.from_pretrained(folder))
