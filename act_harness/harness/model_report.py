"""What ``act-harness doctor --pretrained`` says of a model: each capability, and what decided it.

It loads the model and tries it with a few tokens (:func:`act_harness.scoring.trials.try_all`), in
the dtype and on the device that it is asked for: another may give other answers.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from act_harness.attention.capabilities import Noise
from act_harness.attention.load import load_plain_model
from act_harness.scoring.trials import try_all

if TYPE_CHECKING:
    from act_harness.attention.capabilities import Answer, ModelCapabilities

__all__ = ["report_on", "table"]

_WORDS = {
    "window": "has a window of",
    "rope_limit": "has a rotary limit",
    "calibrates": "can be calibrated",
    "noise": "rounds logits by",
    "packs": "packs requests",
    "packs_segments": "packs by segments",
    "bare_head": "has a bare head",
    "extends": "extends caches",
}
"""How a reader is told of each field of ``ModelCapabilities``."""


def report_on(pretrained: str, *, dtype: str = "auto", device: str | None = None) -> str:
    """Load a model and return its table.

    Args:
        pretrained: hub id or folder.
        dtype: as transformers takes it.
        device: where to load it; None for a GPU where there is one.

    Raises:
        InputError: there is no such dtype or kind of device.
        InfrastructureError: the model or device is missing.
    """
    import torch

    place = device or ("cuda" if torch.cuda.is_available() else "cpu")
    model = load_plain_model(pretrained, dtype=dtype, device=place)
    head = f"{type(model).__name__} in {str(model.dtype).removeprefix('torch.')} on {model.device}"
    return f"{head}\n{table(try_all(model))}"


def table(capabilities: ModelCapabilities) -> str:
    """Return a line for each capability: what it is, the answer, and the reason."""
    rows = [
        (_WORDS.get(name, name), _told(answer), "" if answer is None else answer.reason)
        for name, answer in capabilities
    ]
    widths = [max(len(row[column]) for row in rows) for column in (0, 1)]
    return "\n".join(
        f"{name:<{widths[0]}}  {told:<{widths[1]}}  {reason}".rstrip()
        for name, told, reason in rows
    )


def _told(answer: Answer[object] | None) -> str:
    if answer is None:
        return "untried"
    match answer.value:
        case bool():
            return "yes" if answer.value else "no"
        case None:
            return "no"
        case Noise():
            return f"{answer.value.shape:.2g}"
        case value:
            return str(value)
