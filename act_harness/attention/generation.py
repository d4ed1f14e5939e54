"""Refusals for ``generate()``: what would break the calibration without anyone noticing.

A forward is right by itself; what a decoding loop makes of its cache is not the forward's to see.
So the model's own loops are looked at before they start.
"""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING, Any

from transformers.cache_utils import StaticCache

from act_harness.attention.cache import find_cache
from act_harness.attention.calls import named_arguments
from act_harness.errors import UnsupportedCallError

if TYPE_CHECKING:
    from collections.abc import Callable

    from transformers import PreTrainedModel

__all__ = ["Guard", "guard", "refuse_continuous_batching", "refuse_unsupported_generation"]

_ASSISTED = ("assistant_model", "prompt_lookup_num_tokens", "assistant_early_exit")

_OTHER_LOOPS = {
    "penalty_alpha": "contrastive search tries continuations on the cache and takes them back",
    "dola_layers": "DoLa decodes with logits of layers in between, by code from elsewhere",
    "force_words_ids": "constrained beams reorder the cache under the calibration's statistics",
    "constraints": "constrained beams reorder the cache under the calibration's statistics",
    "custom_generate": "a decoding loop from elsewhere may reorder, crop or do without the cache",
}

_CACHES = (None, "dynamic", "dynamic_full", "hybrid", "offloaded")
"""Settings of ``cache_implementation`` that stand for a dynamic cache."""


def refuse_unsupported_generation(model: PreTrainedModel, arguments: dict[str, Any]) -> None:
    """Check the settings of one ``generate`` call before it starts.

    Args:
        model: the model, for its default ``generation_config``.
        arguments: the arguments of the call by name, those that were given by position among
            them.

    Raises:
        UnsupportedCallError: the call would chunk the prefill, reorder or crop the cache under the
            statistics, or do without a cache.
    """
    given = arguments.get("generation_config")

    def setting(name: str) -> Any:  # noqa: ANN401 - settings are of any type
        """What transformers would use: the call's, its configuration's, then the model's own."""
        for value in (arguments.get(name), getattr(given, name, None)):
            if value is not None:
                return value
        return getattr(model.generation_config, name, None)

    if setting("prefill_chunk_size") is not None:
        raise UnsupportedCallError(
            "prefill_chunk_size would let each chunk see only the sinks of the chunks before it; "
            "generate without it while attention is calibrated"
        )
    beams = setting("num_beams") or 1
    if beams != 1:  # also what is no number
        raise UnsupportedCallError(
            f"num_beams={beams} reorders the cache under the calibration's statistics; "
            "use num_beams=1 (greedy or sampling) while attention is calibrated"
        )
    if setting("use_cache") is False:
        raise UnsupportedCallError(
            "use_cache=False would make every step a new prefill with other sinks; "
            "generate with the cache while attention is calibrated"
        )
    for name in _ASSISTED:
        if setting(name) is not None:
            raise UnsupportedCallError(
                f"{name} (assisted generation) crops the cache under the calibration's "
                "statistics; generate without it while attention is calibrated"
            )
    for name, reason in _OTHER_LOOPS.items():
        if setting(name) is not None:
            raise UnsupportedCallError(
                f"{name}: {reason}; use greedy decoding or sampling while attention is calibrated"
            )
    _refuse_cache(setting("cache_implementation"), find_cache((), arguments))


def _refuse_cache(implementation: str | None, cache: object) -> None:
    if implementation == "paged":
        refuse_continuous_batching()
    if implementation not in _CACHES:
        raise UnsupportedCallError(
            f"cache_implementation={implementation!r} hides from calibration which keys are whose; "
            "leave it out (the default dynamic cache) while attention is calibrated"
        )
    if isinstance(cache, StaticCache):
        raise UnsupportedCallError(
            "generate() gives a static cache a mask that hides the pads from calibration; leave "
            "past_key_values out (the default dynamic cache) while attention is calibrated"
        )


def refuse_continuous_batching(*_: object) -> None:
    """Refuse ``generate_batch`` and its kin."""
    raise UnsupportedCallError(
        "continuous batching keeps the keys of all sequences in pages, where calibration cannot "
        "follow them; use generate() while attention is calibrated"
    )


class Guard:
    """Stands in for a method of one model and checks its arguments first.

    An object and no closure: a deep copy or a pickle of the model holds a guard of its own, which
    calls the copy's method.
    """

    def __init__(
        self, model: PreTrainedModel, name: str, check: Callable[[Any, dict[str, Any]], None]
    ) -> None:
        """Put it in place.

        Args:
            model: its owner.
            name: the method.
            check: takes the model and the arguments by name, and raises.
        """
        self.model, self.name, self.check = model, name, check
        self.before = {key: model.__dict__[key] for key in (name,) if key in model.__dict__}
        functools.update_wrapper(self, getattr(model, name), assigned=("__doc__",), updated=())
        setattr(model, name, self)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:  # noqa: ANN401 - the method's
        """Check, then call the method itself."""
        method = self.__wrapped__  # type: ignore[attr-defined] # functools' name
        try:
            arguments = named_arguments(method, args, kwargs)
        except TypeError:  # the method says so itself
            return method(*args, **kwargs)
        self.check(self.model, arguments)
        return method(*args, **kwargs)

    def remove(self) -> None:
        """Give the model its method back."""
        if self.model.__dict__.get(self.name) is self:
            delattr(self.model, self.name)
            self.model.__dict__.update(self.before)


def guard(model: PreTrainedModel) -> list[Guard]:
    """Guard the decoding loops of a model.

    ``generate`` with all its arguments; what reads its settings, for calls that pass by the object
    (``GenerationMixin.generate(model, ...)``); and continuous batching's one entrance.
    """
    checks: dict[str, Callable[[Any, dict[str, Any]], None]] = {
        "generate": refuse_unsupported_generation,
        "_prepare_generation_config": refuse_unsupported_generation,
        "init_continuous_batching": refuse_continuous_batching,
    }
    return [Guard(model, name, check) for name, check in checks.items() if hasattr(model, name)]
