"""What one model can do: an answer and its reason for each capability, tried once.

Some answers are read off the configuration. The others are found by running a few tokens, each by
the module that relies on it, which keeps what it found here, so that no forward is tried twice and
``act-harness doctor --pretrained`` can print all of it.
"""

from __future__ import annotations

import weakref
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Generic, Literal, NamedTuple, TypeVar

import torch

from act_harness.attention.dimensions import of_layers
from act_harness.attention.interface import base_of
from act_harness.attention.placement import input_device
from act_harness.calibration import Calibration
from act_harness.errors import UnsupportedCallError, UnsupportedModelError

if TYPE_CHECKING:
    from collections.abc import Iterator

    from transformers import PretrainedConfig, PreTrainedModel

__all__ = [
    "MODEL_FAILURES",
    "Answer",
    "GraphKind",
    "ModelCapabilities",
    "Noise",
    "Side",
    "capabilities_of",
]

MODEL_FAILURES = (
    AttributeError,
    LookupError,
    RuntimeError,
    TypeError,
    ValueError,
    UnsupportedCallError,
    UnsupportedModelError,
)
"""What a model's own code, or the way into it, raises where it is run otherwise than it expects.

An answer about the model, but for ``torch.OutOfMemoryError``, a RuntimeError that says nothing
about it. What a promise of this package broke (``InternalError``) is no answer either.
"""

Side = Literal["right", "left"]
"""Where a batch is padded."""

GraphKind = tuple[str, Calibration] | None
"""What a captured forward holds beside the model: engine and calibration, or nothing."""

_Value = TypeVar("_Value", covariant=True)

_WINDOWS = ("sliding_window", "attention_chunk_size", "window_size")  # the last is GPT-Neo's


@dataclass(frozen=True)
class Answer(Generic[_Value]):
    """What a model can do, and what said so."""

    value: _Value
    reason: str


class Noise(NamedTuple):
    """Largest changes of stock logits that rounding alone makes."""

    ahead: float
    """When only a later token is another one."""
    shape: float
    """When the same tokens come over a cache, before others, or in a padded batch."""
    steps: bool = False
    """Whether they came one by one over the cache, since several at once are other tokens' logits
    (Jamba's recurrent layers begin anew there)."""


@dataclass
class ModelCapabilities:
    """What a model can do in one state; None where nobody had to know yet.

    A state is its kernel, dtype, device, autocast, and the answers read off its configuration: a
    model object may be moved, cast, or given another kernel or window after a trial, and what held
    before then is not known to hold.
    """

    window: Answer[int | None]
    """Tokens that its narrowest window or chunk holds; None: every layer sees all of them.

    A forward that has no more tokens than that is the same with the window and without.
    """
    rope_limit: Answer[int | None]
    """Tokens that a forward may have before its rotary frequencies change; None: any number.

    With ``dynamic`` and ``longrope`` scaling the frequencies of all tokens follow the longest
    position in a forward, so a request that is longer must be alone in its forward.
    """
    calibrates: Answer[bool] | None = None
    """Whether all its layers can be calibrated (:mod:`act_harness.attention.probe`)."""
    noise: Answer[Noise] | None = None
    """What rounding does to stock logits (:mod:`act_harness.attention.probe`)."""
    packs: Answer[bool] | None = None
    """Whether packed forwards give what separate ones give
    (:mod:`act_harness.attention.packing_trial`)."""
    packs_segments: Answer[bool] | None = None
    """Whether a packed forward attends over segments in every layer, on one device."""
    bare_head: Answer[bool] | None = None
    """Whether logits are the output head's result and nothing more
    (:mod:`act_harness.scoring.head`)."""
    extends: Answer[Side | None] | None = None
    """On which side contexts are padded before answers extend their cache; None: they cannot
    (:mod:`act_harness.scoring.trials`)."""
    graphs: dict[GraphKind, Answer[bool]] = field(default_factory=dict)
    """Whether captured forwards are right (:mod:`act_harness.scoring.graphs`): without calibration
    (None), and with an engine and what it computes."""

    def __iter__(self) -> Iterator[tuple[str, Answer[object] | None]]:
        """Iterate over the capabilities by name."""
        yield from (
            (name, answer) for name, answer in vars(self).items() if not isinstance(answer, dict)
        )
        for about, answer in self.graphs.items():
            yield f"graphs ({'no calibration' if about is None else about[0]})", answer


class _State(NamedTuple):
    kernel: str
    dtype: torch.dtype
    device: torch.device
    autocast: torch.dtype | None
    window: Answer[int | None]
    rope_limit: Answer[int | None]


_known: weakref.WeakKeyDictionary[PreTrainedModel, dict[_State, ModelCapabilities]] = (
    weakref.WeakKeyDictionary()
)


def capabilities_of(model: PreTrainedModel) -> ModelCapabilities:
    """Return what is known of a model in its present state; whoever finds out more adds it.

    Call it inside the block whose autocast the forwards in question run under.
    """
    state = _state(model)
    known = _known.setdefault(model, {})
    if state not in known:
        known[state] = ModelCapabilities(state.window, state.rope_limit)
    return known[state]


def _state(model: PreTrainedModel) -> _State:
    device = input_device(model)
    config = model.config.get_text_config()
    cast = torch.is_autocast_enabled(device.type)
    return _State(
        kernel=base_of(config._attn_implementation),
        dtype=model.dtype,
        device=device,
        autocast=torch.get_autocast_dtype(device.type) if cast else None,
        window=_window(config),
        rope_limit=_rope_limit(config),
    )


def _window(config: PretrainedConfig) -> Answer[int | None]:
    kinds = getattr(config, "attention_layers", None)  # GPT-Neo's
    if kinds is not None and set(kinds) == {"global"}:
        return Answer(None, "its attention layers are all global")
    sizes: dict[int, str] = {}
    for name in _WINDOWS:
        if name == "sliding_window" and getattr(config, "use_sliding_window", True) is False:
            continue
        for size in of_layers(config, name):
            if size is not None:
                sizes.setdefault(int(size), f"{name}={size}")
    if not sizes:
        return Answer(None, "its configuration names none")
    least = min(sizes)
    return Answer(least, f"its configuration says {sizes[least]}")


def _rope_limit(config: PretrainedConfig) -> Answer[int | None]:
    given = getattr(config, "rope_parameters", None) or getattr(config, "rope_scaling", None) or {}
    limits: dict[int, str] = {}
    for one in (given, *(value for value in given.values() if isinstance(value, dict))):
        kind = one.get("rope_type") or one.get("type")
        if kind not in ("dynamic", "longrope"):
            continue
        original = one.get("original_max_position_embeddings") or getattr(
            config, "original_max_position_embeddings", None
        )
        limits[int(original or config.max_position_embeddings)] = kind
        if kind == "dynamic":
            limits[int(config.max_position_embeddings)] = kind
    if not limits:
        return Answer(None, "it has no rotary frequencies that depend on length")
    least = min(limits)
    return Answer(least, f"its rotary frequencies are {limits[least]}: they change beyond it")
