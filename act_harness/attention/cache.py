"""What a call really is, read off the cache its layer was given, and states that live with caches.

A call over an empty cache (or none) is the prefill of all it holds; over a cache with tokens it is
an extension. What the prefill found is kept on the cache object itself, so that two conversations
over one model do not mix, and is checked against the cache on every use: a cache that was cropped,
reordered in size, or filled by somebody else is an error, never a silent baseline.
"""

from __future__ import annotations

import copy
import inspect
import weakref
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor
from transformers.cache_utils import (
    Cache,
    DynamicCache,
    DynamicLayer,
    EncoderDecoderCache,
    StaticLayer,
    StaticSlidingWindowLayer,
)

from act_harness.engines.geometry import Geometry
from act_harness.engines.operation import LayerState
from act_harness.errors import InternalError, UnsupportedCallError, UnsupportedModelError

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from act_harness.attention.spans import FindSpan

__all__ = [
    "Forward",
    "cache_argument",
    "cache_of",
    "find_cache",
    "recall",
    "refuse_changed",
    "remember",
    "select_cache",
    "visible_of",
]

_STATES = "_act_harness_states"


@dataclass
class _Remembered:
    """What a layer's prefill left on a cache, and whose it is."""

    owner: str  # the attachment's token
    state: LayerState
    real: Tensor  # (B, T) bool
    keys: weakref.ref[Tensor] | None = None  # what the cache then held, and keeps alive

    def keep(self, cache: Cache | None, layer: int, state: LayerState | None, real: Tensor) -> None:
        """Take what a call over the cache leaves."""
        if state is not None:
            self.state, self.real = state, real
        self.keys = _reference(_keys_of(cache, layer))

    def __getstate__(self) -> dict[str, Any]:
        """Give a copy or a pickle the keys themselves, which are those of the copied cache."""
        return {**self.__dict__, "keys": None if self.keys is None else self.keys()}

    def __setstate__(self, state: dict[str, Any]) -> None:
        """See :meth:`__getstate__`."""
        self.__dict__.update({**state, "keys": _reference(state["keys"])})


def _reference(keys: Tensor | None) -> weakref.ref[Tensor] | None:
    return None if keys is None else weakref.ref(keys)


class _Alike(NamedTuple):
    """What a layer's call was told, for the layers of the forward that are told the same."""

    cache: Cache
    states: dict[int, _Remembered]  # the cache's
    mask: Tensor | None
    shape: torch.Size  # of the keys
    device: torch.device
    past: Tensor  # (B, seen) bool: what the layer remembered, the tensor itself
    geometry: Geometry


@dataclass
class Forward:
    """One forward of the decoder: what its tokens are. Lives from pre-hook to post-hook."""

    batch: int
    rows: int
    mask: Tensor | None  # (B, T) as the caller gave it
    prompts: Tensor | None  # (B,) real prompt tokens; None: all
    tokens: Tensor | None = None  # (B,) real tokens, right-padded, where no mask is given
    ids: Tensor | None = None  # (B, C) of the tokens; None where embeddings were given
    maps: bool = False  # whether attention maps are asked for
    reached: set[int] = field(default_factory=set)
    _geometries: dict[tuple[Any, ...], Geometry] = field(default_factory=dict)
    _masks: list[Tensor | None] = field(default_factory=list)  # alive, so that ids stay unique
    cache: Cache | None = None  # that all layers are known to get
    _alike: dict[int, _Alike] = field(default_factory=dict)  # by mask
    _spans: dict[int, tuple[Geometry, Geometry]] = field(default_factory=dict)  # by the first's id

    def geometry(
        self, key: Tensor, mask: Tensor | None, seen: int, past_real: Tensor | None
    ) -> Geometry:
        """Return the geometry of a layer's call; layers with the same mask share it.

        Args:
            key: (B, G, K, D) keys of the call, those of the cache included.
            mask: the model's own mask, (B or 1, 1, C, K) bool or additive; None where causal.
            seen: tokens in the cache before this call.
            past_real: (B, seen) bool, which of them were real tokens; None before a prefill.
        """
        total = seen + self.rows
        columns = min(key.shape[2], total)  # a static cache is longer than what it holds
        place = (id(mask), seen, columns, key.device)
        if place not in self._geometries:
            real = self._real(total, past_real, key.device)
            self._masks.append(mask)
            self._geometries[place] = Geometry(
                real=real,
                prompt=self._prompt(real) if seen == 0 else torch.zeros_like(real),
                first_row=seen,
                first_column=total - columns,
                columns=columns,
                mask=visible_of(mask, columns),
                ids=None if seen or self.ids is None else self.ids.to(key.device),
            )
        return self._geometries[place]

    def with_span(self, geometry: Geometry, finder: FindSpan) -> Geometry:
        """Return the geometry of a prefill with the columns that ``finder`` finds."""
        if id(geometry) not in self._spans:
            if geometry.ids is None:
                raise InternalError("a span is looked for without the ids of the tokens")
            span = torch.zeros(geometry.prompt.shape, dtype=torch.bool)
            prompt, ids = geometry.prompt.cpu(), geometry.ids.cpu()
            for row, own in enumerate(prompt):
                if own.any():
                    span[row, own] = torch.tensor(finder(ids[row, own].tolist()))
            found = replace(geometry, span=span.to(geometry.prompt.device))
            self._spans[id(geometry)] = geometry, found
        return self._spans[id(geometry)][1]

    def note(
        self, cache: Cache | None, mask: Tensor | None, key: Tensor, geometry: Geometry,
        past: Tensor | None,
    ) -> None:  # fmt: skip
        """Keep what a layer's call over a dynamic cache came to, for :meth:`again`."""
        if past is not None and isinstance(cache, DynamicCache) and key.shape[2] == geometry.total:
            states = cache.__dict__[_STATES]
            self._alike[id(mask)] = _Alike(
                cache, states, mask, key.shape, key.device, past, geometry
            )

    def again(
        self,
        cache: Cache | None,
        layer: int,
        *,
        mask: Tensor | None,
        query: Tensor,
        key: Tensor,
        owner: str,
    ) -> tuple[_Remembered, Geometry] | None:
        """Return what :func:`recall` and :meth:`geometry` would, where another layer's holds.

        A layer of a dynamic cache that has been given as many keys, all there are, over the same
        past as a layer before it, differs from that one by its sinks only.
        """
        alike = self._alike.get(id(mask))
        if (
            alike is None
            or cache is not alike.cache
            or key.shape != alike.shape
            or key.device != alike.device
            or query.shape[2] != self.rows
        ):
            return None
        noted = alike.states.get(layer)
        if noted is None or noted.real is not alike.past or noted.owner != owner:
            return None
        return noted, alike.geometry

    def _real(self, total: int, past_real: Tensor | None, device: torch.device) -> Tensor:
        if self.mask is not None:
            if self.mask.shape[1] < total:
                raise UnsupportedCallError(
                    f"attention_mask covers {self.mask.shape[1]} tokens, the sequence has {total}; "
                    "pass one that covers the cached tokens too"
                )
            return self.mask[:, :total].to(device=device, dtype=torch.bool)
        new = torch.ones(self.batch, self.rows, dtype=torch.bool, device=device)
        if self.tokens is not None:
            place = torch.arange(self.rows, device=device)
            new = place < self.tokens.to(device)[:, None]
        return new if past_real is None else torch.cat([past_real.to(device), new], dim=1)

    def _prompt(self, real: Tensor) -> Tensor:
        if self.prompts is None:
            return real
        return real & (real.cumsum(dim=1) <= self.prompts.to(real.device)[:, None])


_INVISIBLE = -1e4
"""An additive mask this low or lower hides a column: its weight is 0 in every dtype."""


def visible_of(mask: Tensor | None, columns: int) -> Tensor | None:
    """Return the model's mask as bool, over the columns in use.

    Looks at the values of an additive mask, once for each mask of a forward.

    Raises:
        UnsupportedModelError: it does more than hide columns, or differs between heads.
    """
    if mask is None:
        return None
    mask = mask[..., :columns]
    if mask.ndim == 4 and mask.shape[1] != 1:
        raise UnsupportedModelError(
            f"the model gives each of {mask.shape[1]} heads a mask of its own, and calibration "
            "reads one for all heads; use artifact=none"
        )
    if mask.dtype == torch.bool:
        return mask
    seen, hidden = mask == 0, mask <= _INVISIBLE
    if not bool((seen | hidden).all()):
        raise UnsupportedModelError(
            "the model adds a bias to its attention scores through the mask (values other than 0 "
            "and minus infinity), which calibration would lose; use artifact=none"
        )
    return seen


_NAMES = ("cache", "past_key_values", "layer_past")
"""What transformers calls a cache: the first from 5.24 on, the second before, the third in layers
of models that have kept an older name."""


def cache_argument(forward: Callable[..., Any]) -> str:
    """Return the name by which a model's or a layer's forward takes its cache."""
    names = inspect.signature(forward).parameters
    return next((name for name in _NAMES if name in names), "past_key_values")


def cache_of(output: Mapping[str, Any]) -> Cache | None:
    """Return the cache that a model's output holds, by whichever name; None where it has none."""
    held = output.keys()  # asking for the older name itself warns from 5.24 on
    return next((output[name] for name in _NAMES if name in held), None)


def find_cache(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Cache | None:
    """Return the cache among the arguments of a call, by its type: names differ by release."""
    for item in (*kwargs.values(), *args):
        if isinstance(item, EncoderDecoderCache):  # RoCBert makes one, without an encoder
            return item.self_attention_cache
        if isinstance(item, Cache):
            return item
    return None


def seen_tokens(cache: Cache | None, layer: int, rows: int) -> int:
    """Tokens in the layer's cache before this call, whose keys have been added to it already."""
    if cache is None:
        return 0
    if layer < len(cache.layers) and isinstance(cache.layers[layer], StaticSlidingWindowLayer):
        raise UnsupportedCallError(
            "calibration cannot follow a static sliding-window cache; use the default dynamic cache"
        )
    return int(cache.get_seq_length(_counting(cache, layer))) - rows


def _counting(cache: Cache, layer: int) -> int:
    """Return the layer whose cache counts a layer's tokens: the one before that shares its keys.

    Gemma 3n and 4 attend over an earlier layer's keys in their last layers, whose own part of the
    cache is empty, or left out (transformers before 5.21). Earlier layers have added the rows of
    the call under way.
    """
    layer = max(0, min(layer, len(cache.layers) - 1))
    while layer > 0 and not hasattr(cache.layers[layer], "get_seq_length"):
        layer -= 1
    return layer


def _keys_of(cache: Cache | None, layer: int) -> Tensor | None:
    """Return the tensor in which a layer of the cache holds its keys; None where that may move."""
    if cache is None or getattr(cache, "offloading", False) or layer >= len(cache.layers):
        return None
    found = cache.layers[layer]
    return found.keys if isinstance(found, (DynamicLayer, StaticLayer)) else None


def refuse_changed(cache: Cache) -> None:
    """Refuse a cache whose keys were exchanged since calibrated rows were added to it.

    Keys that only grew are the tensor that the last call left. Beam search, contrastive search
    and hand-written loops reorder them, and the sinks would stay with the old order.

    Raises:
        UnsupportedCallError: they were.
    """
    for layer, noted in getattr(cache, _STATES, {}).items():
        held = _keys_of(cache, layer)
        if held is None or noted.keys is None or noted.keys() is held:
            continue
        if (held.shape[0], cache.get_seq_length(layer)) == noted.real.shape:  # else: see recall()
            raise UnsupportedCallError(
                "the cache was reordered or changed under the calibration's statistics (beam "
                "search does); take sequences with act_harness.attention.select_cache"
            )


def recall(
    cache: Cache | None, layer: int, seen: int, *, owner: str, batch: int
) -> tuple[LayerState | None, Tensor | None]:
    """Return what the prefill left for this layer and which tokens were real.

    Raises:
        UnsupportedCallError: the cache was not filled under this calibration, or was cropped or
            changed in batch size since.
    """
    if seen == 0:
        return None, None
    noted: _Remembered | None = getattr(cache, _STATES, {}).get(layer)
    if noted is None or noted.owner != owner:
        raise UnsupportedCallError(
            f"the cache holds {seen} tokens that were not computed under this calibration; "
            "start from an empty cache"
        )
    if noted.real.shape[1] != seen:
        raise UnsupportedCallError(
            f"the cache was cropped from {noted.real.shape[1]} to {seen} tokens under the "
            "calibration; prefill again (assisted generation is not supported)"
        )
    if noted.real.shape[0] != batch:
        raise UnsupportedCallError(
            f"the cache was computed for {noted.real.shape[0]} sequences, this call has {batch}; "
            "repeat it with act_harness.attention.select_cache"
        )
    return noted.state, noted.real


def remember(
    cache: Cache | None, layer: int, state: LayerState | None, real: Tensor, *, owner: str
) -> None:
    """Keep what this call leaves for the next one, on the cache itself."""
    if cache is not None and state is not None:
        states = cache.__dict__.setdefault(_STATES, {})
        states[layer] = _Remembered(owner, state, real, _reference(_keys_of(cache, layer)))


def _select_layer(layer: Any, index: Tensor) -> None:  # noqa: ANN401 - a layer of any kind of cache
    """Keep the sequences ``index`` of a layer that is a shallow copy."""
    if not hasattr(layer, "recurrent_states"):
        if layer.is_initialized and layer.keys is not None:  # None: it shares another's keys
            layer.batch_select_indices(index.to(layer.keys.device))
        return
    # recurrent layers keep states in dictionaries, which a shallow copy shares, and write into them
    vars(layer).update({k: dict(v) for k, v in vars(layer).items() if isinstance(v, dict)})
    started = any(layer.is_conv_states_initialized.values())
    if started or any(layer.is_recurrent_states_initialized.values()):
        layer.reorder_cache(index)


def select_cache(cache: Cache, index: Tensor) -> Cache:
    """Return a cache of the sequences ``index`` (repeats allowed); the given one is untouched.

    Calibration states go along. The original can be selected from again.

    Args:
        cache: a dynamic cache, with or without calibration states.
        index: (n,) positions in the batch of ``cache``.
    """
    picked = copy.copy(cache)
    picked.layers = [copy.copy(layer) for layer in cache.layers]
    for layer in picked.layers:
        _select_layer(layer, index)
    if _STATES in cache.__dict__:
        picked.__dict__[_STATES] = {
            number: _Remembered(
                noted.owner,
                noted.state.select(index.to(noted.real.device)),
                noted.real[index.to(noted.real.device)],
                _reference(_keys_of(picked, number)),
            )
            for number, noted in cache.__dict__[_STATES].items()
        }
    return picked
