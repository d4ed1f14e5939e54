"""The one signature that every engine implements, and the values that pass through it.

An engine takes the query, key and value of one layer and returns that layer's attention output
with the selected heads calibrated. The same call serves a prefill, an extension of a cache and a
forward that holds a prompt and its continuation together; :class:`Geometry` says which columns are
real tokens, which of them are the prompt, and what each row can see. Shapes use B sequences,
C rows (queries of this call), K columns (keys of this call), T tokens so far, H query heads,
G key heads, h selected heads and D values per head.
"""

from __future__ import annotations

from dataclasses import dataclass, field, fields
from functools import cached_property
from typing import TYPE_CHECKING, NamedTuple, Protocol, TypeAlias

import torch
from torch import Tensor

from act_harness.errors import CalibrationError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping

    from act_harness.calibration import LayerPlan

__all__ = [
    "AttentionCall",
    "Engine",
    "EngineResult",
    "Geometry",
    "LayerState",
    "Members",
    "Report",
    "Stock",
    "masked_softmax",
    "member",
    "pad_columns",
    "refuse_unsupported",
    "unsupported",
]

Members: TypeAlias = "Mapping[str, tuple[str, ...]]"
"""The members that an engine computes of each closed set: target, rule, protect, decode, mass."""

_OF_SINKS = ("rule", "protect")
"""Settings that belong to target ``sinks``; a calibration of another target has none of them."""

_BOUNDARY = {torch.float64: 1e-4, torch.float32: 1e-4}


def boundary(dtype: torch.dtype) -> float:
    """How near a/threshold may come to 1 before rounding decides (semantics, invariant I3)."""
    return _BOUNDARY.get(dtype, 2e-2)


def member(setting: str, value: str | None, computes: Members) -> str:
    """Return which member of its closed set a setting is.

    What engines branch by, so that a member that they do not know is never taken for another.

    Args:
        setting: name of the closed set.
        value: of that setting, in a calibration or in the mass map of one head.
        computes: what the code that branches knows.

    Raises:
        CalibrationError: it does not know that member.
    """
    if value is None or value not in computes[setting]:
        raise CalibrationError(_unknown(setting, value, computes))
    return value


def unsupported(plan: LayerPlan, computes: Members) -> list[str]:
    """Return every reason that an engine cannot compute a plan; none where it can.

    Args:
        plan: of one layer.
        computes: what the engine computes.
    """
    calibration = plan.calibration
    found = [(name, getattr(calibration, name)) for name in computes]
    found += [("mass", strength.mass) for strength in plan.strengths]
    absent = () if calibration.target == "sinks" else _OF_SINKS
    reasons = [
        _unknown(name, value, computes)
        for name, value in found
        if value not in computes[name] and not (value is None and name in absent)
    ]
    return list(dict.fromkeys(reasons))


def refuse_unsupported(engine: Engine, plans: Iterable[LayerPlan]) -> None:
    """Refuse plans that an engine cannot compute, before it is used on any of them.

    Raises:
        CalibrationError: there is such a plan; the line names all reasons.
    """
    reasons = dict.fromkeys(reason for plan in plans for reason in engine.supports(plan))
    if reasons:
        raise CalibrationError(f"engine {engine.name} cannot compute this: {'; '.join(reasons)}")


def _unknown(setting: str, value: object, computes: Members) -> str:
    return f"{setting} {value!r} is unknown, expected one of {', '.join(computes[setting])}"


def pad_columns(values: Tensor, columns: int) -> Tensor:
    """Append zero (or False) columns on the right until the last axis has ``columns``."""
    missing = columns - values.shape[-1]
    return torch.nn.functional.pad(values, (0, missing)) if missing > 0 else values


def masked_softmax(
    query: Tensor,
    key: Tensor,
    visible: Tensor,
    scale: float,
    softcap: float | None,
    bias: Tensor | None = None,
) -> Tensor:
    """Return (b, h, k, t) attention weights; rows that see nothing are all zero."""
    logits = query @ key.transpose(-1, -2) * scale
    if softcap is not None:
        logits = torch.tanh(logits / softcap) * softcap
    if bias is not None:
        logits = logits + bias
    logits = logits.masked_fill(~visible, torch.finfo(logits.dtype).min)
    return torch.softmax(logits, dim=-1) * visible


@dataclass(frozen=True)
class Geometry:
    """Which token is where, for all layers that share a mask.

    Columns are counted in absolute positions 0..T-1, pads included. The rows of the call are the
    positions ``first_row``..T-1, its keys the positions ``first_column``..``first_column``+K-1.
    """

    real: Tensor  # (B, T) bool: not a pad
    prompt: Tensor  # (B, T) bool: real and given, as against scored or generated
    first_row: int
    first_column: int
    columns: int  # K
    mask: Tensor | None = None  # (B or 1, 1, C, K) bool, the model's own; None: causal

    @property
    def total(self) -> int:
        """T, the number of tokens so far, pads included."""
        return self.real.shape[1]

    @property
    def rows(self) -> int:
        """C, the number of query rows of this call."""
        return self.total - self.first_row

    def visible(self, start: int, stop: int) -> Tensor:
        """Return (B, 1, stop - start, K) bool: which columns the rows of a block can see.

        ``start`` and ``stop`` count the rows of this call. Pads are neither rows nor columns.
        """
        last = self.first_column + self.columns
        if self.mask is None:
            row = torch.arange(start, stop, device=self.real.device) + self.first_row
            column = torch.arange(self.first_column, last, device=self.real.device)
            seen = (column[None, :] <= row[:, None])[None, None]
        else:
            seen = self.mask[:, :, start:stop]
        row_real = self.real[:, self.first_row + start : self.first_row + stop]
        column_real = self.real[:, self.first_column : last]
        return seen & row_real[:, None, :, None] & column_real[:, None, None, :]

    @cached_property
    def plain(self) -> bool:
        """Whether stock attention without a mask sees exactly what :meth:`visible` says.

        True for a causal prefill without pads or with pads on the right only (which no real row
        sees), and for one row that sees every column. Looks at values once (on an accelerator
        that waits for it); the layers of a forward share the answer.
        """
        if self.mask is not None or self.first_column != 0 or self.columns != self.total:
            return False
        if self.first_row == 0:
            return not bool((self.real[:, 1:] & ~self.real[:, :-1]).any())
        return self.rows == 1 and bool(self.real.all())

    @cached_property
    def intervals(self) -> tuple[Tensor, Tensor] | None:
        """First and last column that each row sees, (B, C) int32 each, of the held columns.

        Between them a row sees every real column; a row that sees none has 0 and -1. None for
        masks that are not of this kind (looked at once; causal and sliding windows are).
        """
        batch = self.real.shape[0]
        if self.mask is None:
            row = torch.arange(self.rows, dtype=torch.int32, device=self.real.device)
            hi = (row + (self.first_row - self.first_column)).expand(batch, -1).contiguous()
            return torch.zeros_like(hi), hi
        held = self.real[:, self.first_column : self.first_column + self.columns]
        before = torch.nn.functional.pad(held.cumsum(dim=1), (1, 0))  # real ones before a column
        lows, highs, exact = [], [], []
        for start in range(0, self.rows, 512):
            seen = self.visible(start, min(start + 512, self.rows))[:, 0]
            number = seen.sum(dim=2)
            low = seen.to(torch.uint8).argmax(dim=2)
            high = self.columns - 1 - seen.flip(2).to(torch.uint8).argmax(dim=2)
            high = torch.where(number > 0, high, -1)
            between = before.gather(1, high + 1) - before.gather(1, low)
            exact.append(((between == number) | (number == 0)).all())
            lows.append(low)
            highs.append(high)
        if not bool(torch.stack(exact).all()):
            return None
        return torch.cat(lows, 1).to(torch.int32), torch.cat(highs, 1).to(torch.int32)

    @cached_property
    def first(self) -> Tensor:
        """(B,) absolute position of the first real token."""
        return self.real.int().argmax(dim=1)

    @cached_property
    def prompt_rows(self) -> Tensor:
        """(B, C) bool: rows of this call that belong to the prompt."""
        return self.prompt[:, self.first_row :]

    @cached_property
    def continuation_rows(self) -> Tensor:
        """(B, C) bool: rows of this call that are real and do not belong to the prompt."""
        return (self.real & ~self.prompt)[:, self.first_row :]

    @cached_property
    def has_prompt_rows(self) -> bool:
        """Whether any row of this call belongs to a prompt."""
        return self.first_row == 0 and bool(self.prompt.any())

    @cached_property
    def only_prompt(self) -> bool:
        """Whether every row of this call belongs to a prompt: no pads, nothing scored."""
        return self.first_row == 0 and bool(self.prompt.all())

    @cached_property
    def has_continuation_rows(self) -> bool:
        """Whether any row of this call is scored or generated."""
        return not self.__dict__.get("only_prompt", False) and bool(self.continuation_rows.any())

    @cached_property
    def prompt_census(self) -> tuple[Tensor, Tensor]:
        """``seen`` (B, T): prompt rows that see each column; ``n`` (B,): most columns of a row.

        Only for a prefill; ``n`` is N of the paper, limited by a sliding window where there is
        one, since the model's own mask is counted.
        """
        if self.mask is None and self.first_column == 0:  # causal: a row sees all real ones before
            seen = self.prompt.flip(1).cumsum(dim=1).flip(1) * self.real
            return seen, (self.real.cumsum(dim=1) * self.prompt).amax(dim=1)
        seen = torch.zeros_like(self.real, dtype=torch.int64)
        most = torch.zeros(self.real.shape[0], dtype=torch.int64, device=self.real.device)
        for start in range(0, self.rows, 512):
            stop = min(start + 512, self.rows)
            block = self.visible(start, stop)[:, 0] & self.prompt_rows[:, start:stop, None]
            seen[:, self.first_column : self.first_column + self.columns] += block.sum(dim=1)
            most = torch.maximum(most, block.sum(dim=2).amax(dim=1))
        return seen, most


class AttentionCall(NamedTuple):
    """What the attention of one layer is to compute, as the model asks for it.

    In a packed row (:mod:`act_harness.engines.segments`) sequences lie one behind the other:
    queries are (N, H, D), gathered keys and values (M, G, D).
    """

    query: Tensor
    """(B, H, C, D), after rotary embedding."""
    key: Tensor
    """(B, G, K, D), G a divisor of H (grouped-query attention)."""
    value: Tensor
    """(B, G, K, D)."""
    scale: float
    """Factor on query-key products before the softmax."""
    softcap: float | None = None
    """Soft cap on the scaled products, where the model has one (Gemma 2)."""
    bias: Tensor | None = None
    """(B or 1, H, C or 1, K), added to the logits, where the model has one (ALiBi)."""

    def each(self, change: Callable[[Tensor], Tensor]) -> AttentionCall:
        """Return the call with its query, key and value changed alike."""
        return self._replace(
            query=change(self.query), key=change(self.key), value=change(self.value)
        )


class Stock:
    """The model's own attention, and which kernel it runs.

    An engine that knows the kernel may compute the same output together with its log-sum-exp.
    """

    __slots__ = ("kernel", "run")

    def __init__(self, run: Callable[[], Tensor], kernel: str = "") -> None:
        """Store both; one is made for every layer of a decode step, so this is plain.

        Args:
            run: returns the output, (B, C, H, D).
            kernel: ``sdpa`` for torch's ``scaled_dot_product_attention``; empty for anything.
        """
        self.run = run
        self.kernel = kernel

    def __call__(self) -> Tensor:
        """Return the attention output, (B, C, H, D)."""
        return self.run()


@dataclass
class LayerState:
    """What one layer remembers of a sequence for the rows that come after its prefill."""

    sinks: Tensor  # (B, h, T) bool: the prompt's sinks, for decode 'frozen'
    sums: Tensor | None = None  # (B, h, T): attention received so far, for decode 'running'
    seen: Tensor | None = None  # (B, T) int: rows so far that could see each column

    def select(self, index: Tensor) -> LayerState:
        """Return the state of the sequences ``index`` (repeats allowed), as a cache is expanded."""
        picked = {
            item.name: None if (value := getattr(self, item.name)) is None else value[index]
            for item in fields(self)
        }
        return type(self)(**picked)  # type: ignore[arg-type]


@dataclass(frozen=True)
class Report:
    """What calibration did to the prompt rows, per sequence and selected head.

    One tensor, so that a forward's layers are joined, summed and fetched in one go: on an
    accelerator every small operation is a launch.
    """

    facts: Tensor
    """(6, B, h) floating point: number of sinks; of them, those on columns that fewer than four
    prompt rows see; sum over prompt rows of m - m'; the share of it from those columns; prompt rows
    left as they are because u < 1e-6; 1 where some column is so near its threshold that rounding
    decides."""

    @classmethod
    def of(
        cls,
        *,
        sinks: Tensor,
        few_sinks: Tensor,
        moved: Tensor,
        few_moved: Tensor,
        alone: Tensor,
        near: Tensor,
    ) -> Report:
        """Join the facts, (B, h) each."""
        parts = (sinks, few_sinks, moved, few_moved, alone, near)
        return cls(torch.stack([part.to(moved.dtype) for part in parts]))

    @property
    def sinks(self) -> Tensor:
        """(B, h) number of sinks."""
        return self.facts[0]

    @property
    def few_sinks(self) -> Tensor:
        """(B, h) sinks on columns that fewer than four prompt rows see."""
        return self.facts[1]

    @property
    def moved(self) -> Tensor:
        """(B, h) sum over prompt rows of m - m'."""
        return self.facts[2]

    @property
    def few_moved(self) -> Tensor:
        """(B, h) the share of it from columns that few rows see."""
        return self.facts[3]

    @property
    def alone(self) -> Tensor:
        """(B, h) prompt rows left as they are because u < 1e-6."""
        return self.facts[4]

    @property
    def near(self) -> Tensor:
        """(B, h) bool: some column is so near its threshold that rounding decides."""
        return self.facts[5] > 0


@dataclass
class EngineResult:
    """Output of one layer, (B, C, H, D) as transformers expects it, with its by-products."""

    output: Tensor
    state: LayerState | None
    report: Report | None


class Engine(Protocol):
    """The operation *(target set) x (mass map) on selected heads* for one layer."""

    name: str

    def supports(self, plan: LayerPlan) -> list[str]:
        """Return every reason that it cannot compute a plan, see :func:`unsupported`."""
        ...

    def __call__(
        self,
        call: AttentionCall,
        *,
        geometry: Geometry,
        plan: LayerPlan,
        state: LayerState | None,
        stock: Callable[[], Tensor],
    ) -> EngineResult:
        """Attend with the selected heads calibrated.

        Args:
            call: what the layer's attention is to compute.
            geometry: which tokens are real, which are the prompt, and what rows can see.
            plan: selected heads and their mass maps.
            state: what the prefill of these sequences left; None when this call holds it.
            stock: returns the model's own attention output, (B, C, H, D); a :class:`Stock` says
                which kernel it runs.
        """
        ...


@dataclass
class CallCounter:
    """How often each engine computed a layer; tests use it to prove the path they name."""

    calls: dict[str, int] = field(default_factory=dict)

    def add(self, name: str) -> None:
        """Count one layer computed by engine ``name``."""
        self.calls[name] = self.calls.get(name, 0) + 1
