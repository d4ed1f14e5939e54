"""What was tried on a model is remembered as long as nothing that decides it has changed."""

from __future__ import annotations

import weakref
from typing import TYPE_CHECKING, Generic, TypeVar

import torch

from act_harness.attention.interface import base_of
from act_harness.attention.placement import input_device

if TYPE_CHECKING:
    from collections.abc import Hashable

    from transformers import PreTrainedModel

__all__ = ["Trials"]

_Found = TypeVar("_Found")


class Trials(Generic[_Found]):
    """Results by model, and by the kernel, dtype, device and autocast that it was tried with.

    A model object may be moved, cast or given another kernel after a trial; what held before then
    is not known to hold.
    """

    def __init__(self) -> None:
        self._found: weakref.WeakKeyDictionary[PreTrainedModel, dict[Hashable, _Found]] = (
            weakref.WeakKeyDictionary()
        )

    def __contains__(self, model: PreTrainedModel) -> bool:
        return _state(model) in self._found.get(model, {})

    def __getitem__(self, model: PreTrainedModel) -> _Found:
        return self._found[model][_state(model)]

    def __setitem__(self, model: PreTrainedModel, found: _Found) -> None:
        self._found.setdefault(model, {})[_state(model)] = found

    def setdefault(self, model: PreTrainedModel, found: _Found) -> _Found:
        """Return what is known, or else ``found``, which is known from now on."""
        return self._found.setdefault(model, {}).setdefault(_state(model), found)


def _state(model: PreTrainedModel) -> Hashable:
    device = input_device(model)
    cast = torch.is_autocast_enabled(device.type)
    return (
        base_of(model.config.get_text_config()._attn_implementation),
        model.dtype,
        device,
        torch.get_autocast_dtype(device.type) if cast else None,
    )
