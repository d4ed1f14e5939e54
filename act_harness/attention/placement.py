"""Where a model computes: accelerate keeps weights away from there, on a ``meta`` device.

``parallelize=True`` and ``device_map`` may leave weights on the disk or in the CPU's memory; a
hook fetches them when their module is called. Such a weight's own device says nothing.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from act_harness.errors import UnsupportedModelError

if TYPE_CHECKING:
    from torch import nn
    from transformers import PreTrainedModel

__all__ = ["input_device", "on_one_device"]


def input_device(model: PreTrainedModel) -> torch.device:
    """Return the device that token ids go to: where the model looks its first vectors up.

    Raises:
        UnsupportedModelError: it has no weights.
    """
    embeddings: Any = model.get_input_embeddings()
    device: torch.device = embeddings.weight.device
    if device.type != "meta":
        return device
    for module in (embeddings, model):
        execution = _execution_device(module)
        if execution is not None:
            return torch.device(execution)
    raise UnsupportedModelError(
        f"{type(model).__name__} is on the meta device, where there are no weights; load it with "
        "from_pretrained, on a device, or with a device_map"
    )


def on_one_device(model: PreTrainedModel) -> bool:
    """Whether all weights are on one device, none of them on the disk or to be fetched."""
    devices = {parameter.device for parameter in model.parameters()}
    return len(devices) == 1 and next(iter(devices)).type != "meta"


def _execution_device(module: nn.Module) -> Any:  # noqa: ANN401 - a name, a number or a device
    """Return where accelerate's hook lets a module compute; None where it has no such hook."""
    hook: Any = getattr(module, "_hf_hook", None)
    for one in getattr(hook, "hooks", (hook,)):  # a sequence of hooks, or one
        execution = getattr(one, "execution_device", None)
        if execution is not None:
            return execution
    return None
