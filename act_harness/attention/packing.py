"""Packed forwards: contexts and their answers as one row of tokens, with no pads and no cache.

Everything in a decoder but attention works on single tokens, so a batch of sequences may lie one
behind the other in one row, (1, N): matrix products see real tokens only, and an answer's tokens
stand in the same forward as the context they continue. Only attention must know where sequences
begin. It is served here in two calls a layer: all contexts as a right-padded causal batch (the
prefill, calibrated where a head set is bound), then the answers over their contexts' keys (the
extension, with the sinks that the prefill found). Those are the same two calls that a prefill and
an extension of its cache make, hence the same numbers (semantics, "Phases"). Where torch's flash
attention takes sequences of any lengths (CUDA, half precision), both calls are one, without pads
(:mod:`act_harness.engines.segments`).

::

    token      c0 c1 c2 c3 | d0 d1 | a0 a1 | b0 | e0 e1     a and b answer c, e answers d
    position    0  1  2  3    0  1    4  5    4    2  3     an answer goes on where its context ends

    prefill:   c0 c1 c2 c3         extension:  row    sees
               d0 d1  .  .                     a0     c0 c1 c2 c3 a0  .  .
                                               a1     c0 c1 c2 c3 a0 a1  .
    (. is a pad, or another answer)            b0     c0 c1 c2 c3  .  . b0
                                               e0     d0 d1  .  . e0  .  .
                                               e1     d0 d1  .  . e0 e1  .

Which models can do this, and the switch: :mod:`act_harness.attention.capabilities`.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

import numpy as np
import torch
from torch import Tensor

from act_harness.engines.geometry import Geometry
from act_harness.engines.operation import AttentionCall, LayerState, Stock
from act_harness.engines.segments import (
    Capacity,
    RaggedOutput,
    Segments,
    flash_takes,
    ragged_attention,
    runs,
)
from act_harness.errors import InternalError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    import numpy.typing as npt

__all__ = ["Attends", "Packing", "Rows", "active_packing", "packed", "positions_of"]


class Attends(Protocol):
    """What computes attention over one row of tokens that holds several sequences."""

    def attend(
        self,
        call: AttentionCall,
        *,
        binding: Any,  # noqa: ANN401 - what the attention module is bound to
        run: Callable[[Tensor, Tensor, Tensor, Tensor | None], Tensor],
    ) -> Tensor:
        """See :meth:`Packing.attend`."""
        ...


_active: ContextVar[Attends | None] = ContextVar("act_harness_packing", default=None)


def active_packing() -> Attends | None:
    """Return the packing of the forward under way, None where tokens are not packed."""
    return _active.get()


class Rows(NamedTuple):
    """Answers that share one row of queries over one context."""

    owner: int
    """Number of the context."""
    lengths: tuple[int, ...]
    """Tokens of each answer; an answer sees its context and itself, not its neighbours."""


class _Places:
    """Where the sequences of a padded batch lie in the packed row."""

    def __init__(self, starts: Sequence[int], lengths: Sequence[int]) -> None:
        self.longest = max(lengths)
        step = torch.arange(self.longest)
        length = torch.tensor(lengths)[:, None]
        self.real = step < length  # (S, T)
        # pads repeat their sequence's first token: any finite values would do
        self.index = (torch.tensor(starts)[:, None] + step * self.real).flatten()  # (S * T,)
        self.back = self.real.flatten().nonzero()[:, 0]  # (n,) into the padded batch
        self.count = len(lengths)
        self._moved: dict[torch.device, tuple[Tensor, Tensor]] = {}

    def _on(self, device: torch.device) -> tuple[Tensor, Tensor]:
        """Return ``index`` and ``back`` on a device; layers on one device share them."""
        if device not in self._moved:
            self._moved[device] = self.index.to(device), self.back.to(device)
        return self._moved[device]

    def take(self, values: Tensor) -> Tensor:
        """(1, H, N, D) packed to (S, H, T, D) padded."""
        tokens = values.transpose(1, 2)[0]  # (N, H, D)
        padded = tokens.index_select(0, self._on(tokens.device)[0])
        return padded.view(self.count, self.longest, *tokens.shape[1:]).transpose(1, 2)

    def pad(self, ids: Tensor) -> Tensor:
        """(N,) packed to (S, T) padded."""
        return ids.index_select(0, self._on(ids.device)[0]).view(self.count, self.longest)

    def put(self, output: Tensor) -> Tensor:
        """(S, T, H, D) padded to (n, H, D), the real tokens in their order."""
        return output.flatten(0, 1).index_select(0, self._on(output.device)[1])


class PackedLayer(Protocol):
    """What calibration does for a layer here."""

    def compute(
        self,
        call: AttentionCall,
        *,
        geometry: Geometry,
        state: LayerState | None,
        stock: Stock,
    ) -> tuple[Tensor, LayerState | None]:
        """Return the calibrated attention output, (B, C, H, D), and what it leaves."""
        ...

    def takes_segments(self, capacity: Capacity) -> bool:
        """Whether :meth:`calibrate_segments` computes this layer."""
        ...

    def calibrate_segments(
        self,
        call: AttentionCall,
        stock: RaggedOutput,
        *,
        segments: Segments,
        prompts: Sequence[int],
    ) -> None:
        """Calibrate ``stock.output``, (N, H, D), in place."""
        ...


@dataclass(frozen=True)
class Packing:
    """A packed row: contexts first, then the answers that extend them."""

    lengths: tuple[int, ...]
    """Tokens of each context (and of an answer computed along with it)."""
    prompts: tuple[int, ...]
    """How many of them are prompt."""
    answers: tuple[Rows, ...] = ()
    base: str = "sdpa"
    """The model's kernel, ``sdpa`` or ``eager``."""
    ids: Tensor | None = None
    """(N,) of the tokens, for targets that are found by them."""
    laid_out: Segments | None = None
    """The layout, where it was made elsewhere: attention is over these segments or fails."""
    ways: set[str] = field(default_factory=set)
    """How layers attended: over ``segments``, or in ``padded`` batches."""
    _moved: dict[torch.device, tuple[Geometry, Geometry | None]] = field(default_factory=dict)
    _segments: dict[torch.device, Segments] = field(default_factory=dict)

    @property
    def tokens(self) -> int:
        """N, the length of the packed row."""
        return sum(self.lengths) + sum(sum(rows.lengths) for rows in self.answers)

    @cached_property
    def position_ids(self) -> Tensor:
        """(1, N) positions: every answer goes on where its context ends."""
        return torch.from_numpy(positions_of(self.lengths, self.sizes))[None]

    @property
    def sizes(self) -> list[tuple[int, int]]:
        """(context, tokens) of each answer, in order."""
        return [(rows.owner, size) for rows in self.answers for size in rows.lengths]

    @cached_property
    def _contexts(self) -> _Places:
        starts = torch.tensor([0, *self.lengths]).cumsum(0)[:-1].tolist()
        return _Places(starts, self.lengths)

    @cached_property
    def _answers(self) -> _Places:
        lengths = [sum(rows.lengths) for rows in self.answers]
        starts = torch.tensor([sum(self.lengths), *lengths]).cumsum(0)[:-1].tolist()
        return _Places(starts, lengths)

    @cached_property
    def _owners(self) -> Tensor | None:
        """(R,) context of each row of answers; None where that is its own number."""
        owners = [rows.owner for rows in self.answers]
        return None if owners == list(range(len(self.lengths))) else torch.tensor(owners)

    def _geometries(self, device: torch.device) -> tuple[Geometry, Geometry | None]:
        """Geometry of the contexts and of the answers, the same objects for all layers."""
        if device not in self._moved:
            real = self._contexts.real
            prompt = torch.arange(real.shape[1]) < torch.tensor(self.prompts)[:, None]
            first = Geometry(
                real=real.to(device),
                prompt=(real & prompt).to(device),
                first_row=0,
                first_column=0,
                columns=real.shape[1],
                ids=None if self.ids is None else self._contexts.pad(self.ids.to(device)),
            )
            self._moved[device] = first, self._extension(device) if self.answers else None
        return self._moved[device]

    def _extension(self, device: torch.device) -> Geometry:
        """Geometry of the answers' rows: their contexts' columns, then their own."""
        context = self._contexts.real
        if self._owners is not None:
            context = context[self._owners]
        own = self._answers.real
        number = torch.full(own.shape, -1)
        for row, rows in enumerate(self.answers):
            label = torch.arange(len(rows.lengths)).repeat_interleave(torch.tensor(rows.lengths))
            number[row, : len(label)] = label
        same = (number[:, :, None] == number[:, None, :]).tril() & own[:, None, :]
        seen = context[:, None, :].expand(-1, own.shape[1], -1)
        real = torch.cat([context, own], dim=1)
        return Geometry(
            real=real.to(device),
            prompt=torch.zeros_like(real, device=device),
            first_row=context.shape[1],
            first_column=0,
            columns=real.shape[1],
            mask=torch.cat([seen, same], dim=2)[:, None].to(device),
        )

    def attend(
        self,
        call: AttentionCall,
        *,
        binding: PackedLayer | None,
        run: Callable[[Tensor, Tensor, Tensor, Tensor | None], Tensor],
    ) -> Tensor:
        """Return the attention output of a layer, (1, N, H, D).

        Args:
            call: queries (1, H, N, D), keys and values (1, G, N, D).
            binding: what calibrates this layer; None where nothing does.
            run: stock attention on (query, key, value, mask), the mask in the kernel's form.
        """
        if self.base == "sdpa" and flash_takes(call):
            segments = self._segments_on(call.query.device)
            if binding is None or binding.takes_segments(segments.capacity):
                self.ways.add("segments")
                return self._attend_segments(call, segments, binding)
        if self.laid_out is not None:
            raise InternalError("a layer does not attend over the segments that were laid out")
        self.ways.add("padded")
        first, second = self._geometries(call.query.device)
        state: LayerState | None = None

        def compute(geometry: Geometry, part: AttentionCall) -> Tensor:
            nonlocal state
            mask = geometry.mask if self.base == "sdpa" else _added(geometry, part.query.dtype)
            stock = Stock(lambda: run(part.query, part.key, part.value, mask), kernel=self.base)
            if binding is None:
                return stock()
            output, state = binding.compute(part, geometry=geometry, state=state, stock=stock)
            return output

        contexts = call.each(self._contexts.take)
        parts = [self._contexts.put(compute(first, contexts))]
        if second is not None:
            answers = call.each(self._answers.take)
            keys, values = contexts.key, contexts.value
            if self._owners is not None:
                owners = self._owners.to(call.query.device)
                keys, values = keys.index_select(0, owners), values.index_select(0, owners)
                state = None if state is None else state.select(owners)
            answers = answers._replace(
                key=torch.cat([keys, answers.key], dim=2),
                value=torch.cat([values, answers.value], dim=2),
            )
            parts.append(self._answers.put(compute(second, answers)))
        return torch.cat(parts)[None]

    def _segments_on(self, device: torch.device) -> Segments:
        """Return the packing as segments, the same object for all layers on a device."""
        if self.laid_out is not None:
            return self.laid_out
        if device not in self._segments:
            self._segments[device] = Segments.of(self.lengths, self.prompts, self.sizes, device)
        return self._segments[device]

    def _attend_segments(
        self, call: AttentionCall, segments: Segments, binding: PackedLayer | None
    ) -> Tensor:
        """Attend without padding, contexts and answers in one call of the kernel."""
        row = call.each(lambda values: values.transpose(1, 2)[0])  # (N, H or G, D)
        row = row._replace(key=segments.gather(row.key), value=segments.gather(row.value))
        stock = ragged_attention(row, segments)
        if binding is not None:
            binding.calibrate_segments(row, stock, segments=segments, prompts=self.prompts)
        return stock.output[None]


def _added(geometry: Geometry, dtype: torch.dtype) -> Tensor:
    """Return (B or 1, 1, C, K): what the eager kernel adds to logits, where sdpa takes a mask."""

    def make() -> Tensor:
        seen = geometry.mask
        if seen is None:
            square = (geometry.rows, geometry.columns)
            seen = torch.ones(square, dtype=torch.bool, device=geometry.real.device).tril()[
                None, None
            ]
        added = torch.zeros(seen.shape, dtype=dtype, device=seen.device)
        return added.masked_fill_(~seen, torch.finfo(dtype).min)

    return geometry.scratch(f"added mask in {dtype}", make)


def positions_of(
    lengths: Sequence[int], answers: Sequence[tuple[int, int]]
) -> npt.NDArray[np.int64]:
    """Return the positions of contexts and of (context, tokens) of answers, one after another."""
    begins = [*(0 for _ in lengths), *(lengths[owner] for owner, _ in answers)]
    sizes = [*lengths, *(size for _, size in answers)]
    return runs(np.asarray(begins, dtype=np.int64), np.asarray(sizes, dtype=np.int64))


@contextmanager
def packed(packing: Attends) -> Iterator[None]:
    """Let attention inside the block take its one row of tokens for ``packing``."""
    token = _active.set(packing)
    try:
        yield
    finally:
        _active.reset(token)
