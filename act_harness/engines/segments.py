"""Attention over segments of one row of tokens: no pads, one launch for all sequences.

A packed forward (:mod:`act_harness.attention.packing`) holds contexts and their answers one behind
the other. A *segment* is a run of queries with the run of keys that it sees, bottom-right aligned:
a context sees itself; an answer sees its context and itself, whose keys are gathered behind one
another. torch's flash attention takes such segments directly (CUDA, half precision), and gives the
log-sum-exp of every row with them.

::

    queries    c0 c1 c2 c3 | d0 d1 | a0 a1             | b0             | e0 e1
    keys       c0 c1 c2 c3 | d0 d1 | c0 c1 c2 c3 a0 a1 | c0 c1 c2 c3 b0 | d0 d1 e0 e1
    segment    0           | 1     | 2                 | 3              | 4

    segment 2 (2 queries, 6 keys):   a0 sees c0 c1 c2 c3 a0
                                     a1 sees c0 c1 c2 c3 a0 a1

Calibration of segments: :mod:`act_harness.engines.triton`.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple, Protocol, runtime_checkable

import numpy as np
import torch
from torch import Tensor

if TYPE_CHECKING:
    from collections.abc import Sequence

    import numpy.typing as npt

    from act_harness.calibration import LayerPlan
    from act_harness.engines.operation import AttentionCall, Report

__all__ = [
    "LONGEST",
    "Capacity",
    "RaggedOutput",
    "SegmentEngine",
    "Segments",
    "flash_takes",
    "lay_out",
    "ragged_attention",
    "runs",
    "upload",
]

LONGEST = 2048
"""Longest context, in tokens, whose sinks one program finds in reasonable time."""


class RaggedOutput(NamedTuple):
    """What the stock kernel computed."""

    output: Tensor  # (N, H, D), fresh: engines write into it
    lse: Tensor  # (H, N) float32, natural logarithm


class Capacity(NamedTuple):
    """How much a layout of segments holds; layouts of one capacity differ in their numbers only."""

    tokens: int
    """N, queries: those of contexts and answers, and pads behind them."""
    contexts: int
    answers: int
    keys: int
    """M, gathered keys; 0 without answers, where keys are the tokens as they are."""
    longest_context: int
    longest_answer: int
    pads: int = 0
    """One more than the most pads; 0 where there are none. A last segment holds them and sees no
    keys."""

    @classmethod
    def of(cls, lengths: Sequence[int], answers: Sequence[tuple[int, int]]) -> Capacity:
        """Return the least one for contexts of ``lengths`` and (context, tokens) of answers."""
        own, longer = sum(lengths), sum(size for _, size in answers)
        repeated = sum(lengths[owner] for owner, _ in answers)
        return cls(
            own + longer,
            len(lengths),
            len(answers),
            own + repeated + longer if answers else 0,
            max(lengths),
            max((size for _, size in answers), default=0),
        )

    def joined(self, other: Capacity) -> Capacity:
        """Return the least capacity for what fits in either, with a segment of pads."""
        larger = Capacity(*map(max, self, other))
        least = min(one.tokens - max(0, one.pads - 1) for one in (self, other))
        # one context more than needed, as the pads belong to a context without sinks
        spare = max(one.contexts + (not one.pads) for one in (self, other))
        # beside answers, contexts without any are gathered too: as many keys as tokens
        keys = max(one.keys or one.tokens for one in (self, other)) if larger.keys else 0
        return larger._replace(contexts=spare, keys=keys, pads=larger.tokens - least + 1)

    @property
    def segments(self) -> int:
        """S, contexts, answers, and the pads."""
        return self.contexts + self.answers + (self.pads > 0)

    @property
    def numbers(self) -> int:
        """How many numbers :func:`lay_out` writes."""
        return self.keys + 8 * self.segments + 2


def lay_out(
    lengths: Sequence[int],
    prompts: Sequence[int],
    answers: Sequence[tuple[int, int]],
    capacity: Capacity,
) -> npt.NDArray[np.int64]:
    """Write the numbers of a layout, for :meth:`Segments.over`.

    Args:
        lengths: tokens of each context.
        prompts: how many of them are prompt.
        answers: (context, tokens) of each answer, in the order of the row.
        capacity: at least what they need; what they leave is filled with empty segments, and with
            one segment of pads.

    Returns:
        (``capacity.numbers``,): columns (M,), table (S, 6), query starts and key starts (S + 1,)
        each.
    """
    size, count = capacity.segments, len(lengths)
    owner, own = np.zeros((2, len(answers)), dtype=np.int64)
    if answers:
        owner, own = np.asarray(answers, dtype=np.int64).T
    length, prompt = np.asarray(lengths), np.asarray(prompts)
    queries, keys, prompted = np.zeros((3, size), dtype=np.int64)
    # empty segments are those of an empty context
    number = np.full(size, capacity.contexts - 1, dtype=np.int64)
    number[: capacity.contexts] = np.arange(capacity.contexts)
    queries[:count] = keys[:count] = length
    prompted[:count] = prompt
    longer = slice(capacity.contexts, capacity.contexts + len(answers))
    queries[longer], keys[longer] = own, own + length[owner]
    prompted[longer], number[longer] = prompt[owner], owner
    if capacity.pads:
        queries[-1] = capacity.tokens - queries.sum()
    query_starts = np.concatenate([[0], queries.cumsum()])
    key_starts = np.concatenate([[0], keys.cumsum()])
    table = np.stack([query_starts[:-1], queries, key_starts[:-1], keys, prompted, number], axis=1)
    columns = np.zeros(capacity.keys, dtype=np.int64)
    if capacity.keys:
        # runs of keys: the contexts as they lie, then each answer's context and the answer itself
        begins = np.stack([query_starts[owner], query_starts[longer]], axis=1)
        sizes = np.stack([length[owner], own], axis=1)
        found = runs(
            np.concatenate([[0], begins.ravel()]), np.concatenate([[length.sum()], sizes.ravel()])
        )
        columns[: len(found)] = found
    return np.concatenate([columns, table.ravel(), query_starts, key_starts])


def runs(begins: npt.NDArray[np.int64], sizes: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
    """Return the whole numbers from each of ``begins`` on, so many as ``sizes`` says, in a row."""
    before = sizes.cumsum() - sizes
    return np.repeat(begins - before, sizes) + np.arange(sizes.sum())


@dataclass(frozen=True)
class Segments:
    """Runs of queries and the keys they see; the same for all layers of a forward."""

    table: Tensor
    """(S, 6) int32: first query, queries, first key, keys, prompt tokens of the segment's context,
    number of that context. Contexts come first, then answers."""
    query_starts: Tensor
    """(S + 1,) int32, where segments begin among the N queries."""
    key_starts: Tensor
    """(S + 1,) int32, where they begin among the gathered keys."""
    columns: Tensor | None
    """(M,) int64 index of the gathered keys among the N tokens; None: the tokens as they are."""
    capacity: Capacity

    @classmethod
    def of(
        cls,
        lengths: Sequence[int],
        prompts: Sequence[int],
        answers: Sequence[tuple[int, int]],
        device: torch.device,
        capacity: Capacity | None = None,
    ) -> Segments:
        """Lay out contexts of ``lengths`` tokens and the answers that follow them in the row.

        Args:
            lengths: tokens of each context.
            prompts: how many of them are prompt.
            answers: (context, tokens) of each answer, in the order of the row.
            device: where the layout is needed.
            capacity: for how much; None for just these.
        """
        capacity = capacity or Capacity.of(lengths, answers)
        return cls.over(upload(lay_out(lengths, prompts, answers, capacity), device), capacity)

    @classmethod
    def over(cls, numbers: Tensor, capacity: Capacity) -> Segments:
        """Read a layout from the numbers of :func:`lay_out`, on the device where it is needed."""
        size = capacity.segments
        rest = numbers[capacity.keys :].to(torch.int32)
        return cls(
            table=rest[: 6 * size].view(size, 6),
            query_starts=rest[6 * size : 7 * size + 1],
            key_starts=rest[7 * size + 1 :],
            columns=numbers[: capacity.keys] if capacity.keys else None,
            capacity=capacity,
        )

    @property
    def contexts(self) -> int:
        """How many segments are contexts; the first ones."""
        return self.capacity.contexts

    @property
    def answers(self) -> int:
        """How many segments are answers; they follow the contexts."""
        return self.capacity.answers

    @property
    def longest_context(self) -> int:
        """No context has more tokens."""
        return self.capacity.longest_context

    @property
    def longest_answer(self) -> int:
        """No answer has more tokens."""
        return self.capacity.longest_answer

    def gather(self, values: Tensor) -> Tensor:
        """(N, G, D) tokens to (M, G, D), the keys or values of the segments one after another."""
        return values if self.columns is None else values.index_select(0, self.columns)


def upload(values: npt.NDArray[np.int64], device: torch.device) -> Tensor:
    """Copy numbers to a device without waiting for what it is doing."""
    held = torch.from_numpy(values)
    return held.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else held


@functools.lru_cache(maxsize=64)
def _has_flash(device: torch.device) -> bool:
    """Whether the device runs torch's flash attention on segments: NVIDIA's from Ampere on."""
    return torch.version.hip is None and torch.cuda.get_device_capability(device) >= (8, 0)


def flash_takes(call: AttentionCall) -> bool:
    """Whether torch's flash attention computes segments of such a call."""
    query, size = call.query, call.value.shape[-1]
    return (
        query.device.type == "cuda"
        and query.dtype in (torch.bfloat16, torch.float16)
        and query.shape[-1] % 8 == 0
        and query.shape[-1] == size <= 256
        and call.softcap is None
        and call.sink_logits is None
        and torch.backends.cuda.flash_sdp_enabled()
        and not query.requires_grad
        and _has_flash(query.device)
    )


def ragged_attention(call: AttentionCall, segments: Segments) -> RaggedOutput:
    """Attend within segments, causal, on a device where :func:`flash_takes` says so.

    Args:
        call: queries (N, H, D), gathered keys and values (M, G, D).
        segments: where sequences begin.
    """
    capacity = segments.capacity
    found = torch.ops.aten._flash_attention_forward(
        call.query, call.key, call.value, segments.query_starts, segments.key_starts,
        max(capacity.longest_context, capacity.longest_answer, capacity.pads),
        capacity.longest_context + capacity.longest_answer, 0.0, True, False, scale=call.scale,
    )  # fmt: skip
    return RaggedOutput(found[0], found[1])


@runtime_checkable
class SegmentEngine(Protocol):
    """An engine that calibrates segments of a packed row, as the Triton engine does."""

    def takes_segments(self, plan: LayerPlan, capacity: Capacity) -> bool:
        """Whether it computes such a plan on segments of such a capacity."""
        ...

    def calibrate_segments(
        self, call: AttentionCall, stock: RaggedOutput, *, segments: Segments, plan: LayerPlan
    ) -> Report:
        """Calibrate ``stock.output`` in place; return what that did to the contexts.

        Args:
            call: queries (N, H, D), gathered keys and values (M, G, D).
            stock: what the stock kernel computed.
            segments: contexts and answers.
            plan: selected heads and their mass maps.
        """
        ...
