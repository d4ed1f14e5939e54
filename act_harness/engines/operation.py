"""The one signature that every engine implements, and the values that pass through it.

An engine takes the query, key and value of one layer and returns that layer's attention output
with the selected heads calibrated. The same call serves a prefill, an extension of a cache and a
forward that holds a prompt and its continuation together; which of these it is, the
:class:`~act_harness.engines.geometry.Geometry` says. Shapes use B sequences,
C rows (queries of this call), K columns (keys of this call), T tokens so far, H query heads,
G key heads, h selected heads and D values per head.
"""

from __future__ import annotations

from dataclasses import dataclass, field, fields
from typing import TYPE_CHECKING, NamedTuple, Protocol, TypeAlias

import torch
from torch import Tensor

from act_harness.calibration import members_of, unknown_member
from act_harness.errors import CalibrationError

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from act_harness.calibration import LayerPlan
    from act_harness.engines.geometry import Geometry

__all__ = [
    "AttentionCall",
    "Engine",
    "EngineResult",
    "LayerState",
    "Members",
    "Report",
    "Stock",
    "masked_logits",
    "masked_softmax",
    "member",
    "pad_columns",
    "unsupported",
    "visible_mass",
]

Members: TypeAlias = "Mapping[str, tuple[str, ...]]"
"""The members that an engine computes of each closed set: target, rule, protect, decode, mass."""

_OF_SINKS = ("rule", "protect")
"""Settings of the detection; a calibration that detects nothing has none of them."""

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
        raise CalibrationError(_refusal(setting, value, "this engine"))
    return value


def unsupported(plan: LayerPlan, computes: Members, *, engine: str) -> list[str]:
    """Return every reason that an engine cannot compute a plan; none where it can.

    Args:
        plan: of one layer.
        computes: what the engine computes.
        engine: its name.
    """
    calibration = plan.calibration
    found = [(name, getattr(calibration, name)) for name in computes]
    found += [("mass", strength.mass) for strength in plan.strengths]
    absent = () if calibration.detects else _OF_SINKS
    reasons = [
        _refusal(name, value, f"engine {engine}")
        for name, value in found
        if value not in computes[name] and not (value is None and name in absent)
    ]
    if not reasons:
        reasons = [calibration.misfit(own) for own in plan.strengths if calibration.misfit(own)]
    return list(dict.fromkeys(reasons))


def _refusal(setting: str, value: object, who: str) -> str:
    """Say of what is not computed whether it exists and ``who`` lacks it, or it is a mistake."""
    if value in members_of(setting):
        return f"{who} does not compute {setting} {value!r}"
    return unknown_member(setting, value)


def pad_columns(values: Tensor, columns: int) -> Tensor:
    """Append zero (or False) columns on the right until the last axis has ``columns``."""
    missing = columns - values.shape[-1]
    return torch.nn.functional.pad(values, (0, missing)) if missing > 0 else values


def masked_logits(
    query: Tensor,
    key: Tensor,
    visible: Tensor,
    scale: float,
    softcap: float | None,
    factor: Tensor | None = None,
    bias: Tensor | None = None,
) -> Tensor:
    """Return (b, h, k, t) what the softmax gets; columns that a row does not see are the lowest.

    ``bias``, (b or 1, h, k or 1, t), is added to the logits. ``factor``, (1, h, 1, 1), is one on
    what the softmax gets: an inverse temperature of each head.
    """
    logits = query @ key.transpose(-1, -2) * scale
    if softcap is not None:
        logits = torch.tanh(logits / softcap) * softcap
    if bias is not None:
        logits = logits + bias
    if factor is not None:
        logits = logits * factor
    return logits.masked_fill(~visible, torch.finfo(logits.dtype).min)


def masked_softmax(
    query: Tensor,
    key: Tensor,
    visible: Tensor,
    scale: float,
    softcap: float | None,
    factor: Tensor | None = None,
    bias: Tensor | None = None,
) -> Tensor:
    """Return (b, h, k, t) attention weights of :func:`masked_logits`.

    Rows that see nothing are all zero. Of heads with a learned sink these are shares of what it
    leaves, which is :func:`visible_mass`.
    """
    logits = masked_logits(query, key, visible, scale, softcap, factor, bias)
    return torch.softmax(logits, dim=-1) * visible


def visible_mass(logits: Tensor, sink_logits: Tensor) -> Tensor:
    """Return (b, h, k, 1): the part of a row's attention that a learned sink leaves to columns.

    Args:
        logits: (b, h, k, t) of :func:`masked_logits`.
        sink_logits: (b or 1, h, k or 1) what the sink adds to a row's softmax, without a value.
    """
    seen = torch.logsumexp(logits, dim=-1, keepdim=True)
    return torch.sigmoid(seen - sink_logits.to(logits.dtype)[..., None])


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
    sink_logits: Tensor | None = None
    """(B or 1, H, C or 1) a logit that a row's softmax has beside its columns, where the model has
    learned one of each head (gpt-oss) or makes one for each row; it has no column and no value."""

    @property
    def by_position(self) -> bool:
        """Whether it holds logits of single rows or columns, beside queries, keys and values."""
        return self.bias is not None or (
            self.sink_logits is not None and self.sink_logits.shape[2] > 1
        )

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
