"""What a model's structure says about packing: does anything but attention mix tokens?

A convolution, a recurrence or a shift by one position looks at neighbours in the row of tokens,
which in a packed row are another sequence's. Such a model may differ from its plain path by less
than a trial of a few tokens can tell from rounding, so its structure is looked at first. What is
found here costs speed only: the model is scored in padded batches.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import nn

from act_harness.attention.facts import decoder_of

if TYPE_CHECKING:
    from collections.abc import Iterator

    from transformers import PreTrainedModel

__all__ = ["mixing_part"]

_TOKENWISE = {"full_attention", "attention", "dense", "sparse", "moe", "mlp"}
"""Kinds of layers in a configuration whose tokens meet in full attention only, or nowhere."""

_WINDOWED = {"sliding_attention", "chunked_attention"}
"""Kinds that are full attention over no more tokens than a window holds."""

_LISTS = ("layer_types", "layers_block_type", "block_types")

_NEIGHBOURS = (
    nn.RNNBase,
    nn.RNNCellBase,
    nn.ConstantPad1d,
    nn.ConstantPad2d,  # RWKV shifts tokens by padding
    nn.AvgPool1d,
    nn.AvgPool2d,
    nn.MaxPool1d,
    nn.MaxPool2d,
)


def mixing_part(model: PreTrainedModel, *, windowed: bool = False) -> str | None:
    """Return what mixes tokens outside full attention, in words; None where nothing shows.

    Args:
        model: a causal language model; of a multimodal one only the decoder is looked at.
        windowed: whether forwards are kept within its windows, so that those may pass.
    """
    return next(_mixing_parts(model, _TOKENWISE | _WINDOWED if windowed else _TOKENWISE), None)


def _mixing_parts(model: PreTrainedModel, tokenwise: set[str]) -> Iterator[str]:
    decoder = decoder_of(model)
    config = model.config.get_text_config()
    for name in _LISTS:
        kinds = getattr(config, name, None) or ()
        for kind in dict.fromkeys(kinds):
            if kind not in tokenwise:
                yield f"it has layers of type {kind!r}"
    if getattr(model, "_is_stateful", False) or getattr(decoder, "_is_stateful", False):
        yield "it keeps a state beside keys and values"
    for name, module in decoder.named_modules():
        sizes = getattr(module, "kernel_size", ())
        wide = isinstance(module, nn.modules.conv._ConvNd) and any(size != 1 for size in sizes)
        if wide or isinstance(module, _NEIGHBOURS):
            yield f"its {name} ({type(module).__name__}) mixes neighbouring tokens"
