"""Attention over segments of one row of tokens: no pads, one launch for all sequences.

A packed forward (:mod:`act_harness.attention.packed`) holds contexts and their answers one behind
the other. A *segment* is a run of queries with the run of keys that it sees, bottom-right aligned:
a context sees itself; an answer sees its context and itself, whose keys are gathered behind one
another. torch's flash attention takes such segments directly (CUDA, half precision), and gives the
log-sum-exp of every row with them. Calibration of segments: :mod:`act_harness.engines.triton`.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple, Protocol, runtime_checkable

import torch
from torch import Tensor

if TYPE_CHECKING:
    from collections.abc import Sequence

    from act_harness.calibration import LayerPlan
    from act_harness.engines.operation import Report

__all__ = [
    "LONGEST",
    "RaggedOutput",
    "SegmentEngine",
    "Segments",
    "flash_takes",
    "ragged_attention",
]

LONGEST = 2048
"""Longest context, in tokens, whose sinks one program finds in reasonable time."""


class RaggedOutput(NamedTuple):
    """What the stock kernel computed."""

    output: Tensor  # (N, H, D), fresh: engines write into it
    lse: Tensor  # (H, N) float32, natural logarithm


@dataclass(frozen=True)
class Segments:
    """Runs of queries and the keys they see; the same for all layers of a forward."""

    table: Tensor
    """(S, 6) int32: first query, queries, first key, keys, prompt tokens of the segment's context,
    number of that context. Contexts come first."""
    query_starts: Tensor
    """(S + 1,) int32, where segments begin among the N queries."""
    key_starts: Tensor
    """(S + 1,) int32, where they begin among the gathered keys."""
    columns: Tensor | None
    """(M,) int64 index of the gathered keys among the N tokens; None: the tokens as they are."""
    contexts: int
    """How many segments are contexts."""
    longest_context: int
    longest_answer: int
    longest_key: int

    @classmethod
    def of(
        cls,
        lengths: Sequence[int],
        prompts: Sequence[int],
        answers: Sequence[tuple[int, int]],
        device: torch.device,
    ) -> Segments:
        """Lay out contexts of ``lengths`` tokens and the answers that follow them in the row.

        Args:
            lengths: tokens of each context.
            prompts: how many of them are prompt.
            answers: (context, tokens) of each answer, in the order of the row.
            device: where the layout is needed.
        """
        count = len(lengths)
        owners = [*range(count), *(owner for owner, _ in answers)]
        queries = [*lengths, *(size for _, size in answers)]
        keys = [*lengths, *(lengths[owner] + size for owner, size in answers)]
        query_starts = torch.tensor([0, *queries]).cumsum(0)
        key_starts = torch.tensor([0, *keys]).cumsum(0)
        table = torch.stack(
            [
                query_starts[:-1],
                torch.tensor(queries),
                key_starts[:-1],
                torch.tensor(keys),
                torch.tensor(prompts)[owners],
                torch.tensor(owners),
            ],
            dim=1,
        )
        index = None
        if answers:
            begins = query_starts.tolist()
            parts = [torch.arange(begins[count])]
            for number, (owner, size) in enumerate(answers, start=count):
                parts.append(torch.arange(begins[owner], begins[owner] + lengths[owner]))
                parts.append(torch.arange(begins[number], begins[number] + size))
            index = torch.cat(parts).to(device)
        packed = torch.cat([table.flatten(), query_starts, key_starts]).to(torch.int32).to(device)
        size = table.numel()
        return cls(
            table=packed[:size].view(-1, 6),
            query_starts=packed[size : size + len(query_starts)],
            key_starts=packed[size + len(query_starts) :],
            columns=index,
            contexts=count,
            longest_context=max(lengths),
            longest_answer=max((size for _, size in answers), default=0),
            longest_key=max(keys),
        )

    @property
    def count(self) -> int:
        """S."""
        return len(self.table)

    def gather(self, values: Tensor) -> Tensor:
        """(N, G, D) tokens to (M, G, D), the keys or values of the segments one after another."""
        return values if self.columns is None else values.index_select(0, self.columns)


@functools.lru_cache(maxsize=64)
def _has_flash(device: torch.device) -> bool:
    """Whether the device runs torch's flash attention on segments: NVIDIA's from Ampere on."""
    return torch.version.hip is None and torch.cuda.get_device_capability(device) >= (8, 0)


def flash_takes(query: Tensor, value: Tensor, softcap: float | None) -> bool:
    """Whether torch's flash attention computes segments of such queries and values, (..., D)."""
    return (
        query.device.type == "cuda"
        and query.dtype in (torch.bfloat16, torch.float16)
        and query.shape[-1] % 8 == 0
        and query.shape[-1] == value.shape[-1] <= 256
        and softcap is None
        and torch.backends.cuda.flash_sdp_enabled()
        and not query.requires_grad
        and _has_flash(query.device)
    )


def ragged_attention(
    query: Tensor, key: Tensor, value: Tensor, segments: Segments, *, scale: float
) -> RaggedOutput:
    """Attend within segments, causal, on a device where :func:`flash_takes` says so.

    Args:
        query: (N, H, D).
        key: (M, G, D), gathered.
        value: (M, G, D), gathered.
        segments: where sequences begin.
        scale: factor on query-key products.
    """
    longest = max(segments.longest_context, segments.longest_answer)
    found = torch.ops.aten._flash_attention_forward(
        query, key, value, segments.query_starts, segments.key_starts,
        longest, segments.longest_key, 0.0, True, False, scale=scale,
    )  # fmt: skip
    return RaggedOutput(found[0], found[1])


@runtime_checkable
class SegmentEngine(Protocol):
    """An engine that calibrates segments of a packed row, as the Triton engine does."""

    def takes_segments(self, plan: LayerPlan, segments: Segments) -> bool:
        """Whether it computes such a plan on such segments."""
        ...

    def calibrate_segments(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        stock: RaggedOutput,
        *,
        segments: Segments,
        plan: LayerPlan,
        scale: float,
    ) -> Report:
        """Calibrate ``stock.output`` in place; return what that did to the contexts.

        Args:
            query: (N, H, D).
            key: (M, G, D), gathered.
            value: (M, G, D), gathered.
            stock: what the stock kernel computed.
            segments: contexts and answers.
            plan: selected heads and their mass maps.
            scale: factor on query-key products.
        """
        ...
