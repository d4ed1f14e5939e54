"""Blockwise engine in plain PyTorch: any device, O(block x columns) memory, selected heads only.

The unselected heads are the model's own attention kernel, untouched. For the selected heads the
rows are visited in blocks, twice where a prompt has to be read whole before its sinks are known:
once for the column means, once for the output (the weights are kept in between where they fit).
In a causal prefill the kernel's log-sum-exp makes weights out of products without a softmax, and a
block ends at its own diagonal. The output of a row is ``outside * sum of A V off the sinks +
inside * sum of A V on them``, both sums accumulated in float32 (float64 for a float64 model), so
that rows whose mass lies almost wholly on the sinks lose no digits. Rows that calibration does not
change keep the kernel's own output.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from act_harness.engines.geometry import Geometry
from act_harness.engines.operation import (
    AttentionCall,
    EngineResult,
    LayerState,
    Members,
    masked_logits,
    masked_softmax,
    member,
    pad_columns,
    unsupported,
    visible_mass,
)
from act_harness.engines.reference import find_sinks, initial_column, prompt_target
from act_harness.engines.reports import BlockReport, block_report, few_columns, make_report
from act_harness.engines.stock import attend_with_lse
from act_harness.engines.strengths import RowFactors, Strengths, row_factors

if TYPE_CHECKING:
    from collections.abc import Callable

    from act_harness.calibration import LayerPlan

__all__ = ["TorchEngine"]

COMPUTES: Members = {
    "target": ("sinks", "initial", "both", "random", "last", "span", "head"),
    "rule": ("relative", "absolute"),
    "protect": ("initial", "first-flagged", "none"),
    "decode": ("frozen", "running", "off"),
    "mass": ("damp", "reweight", "raise", "gate", "temperature"),
}
"""What this engine computes; detection and mass maps are the reference's."""


_CAUSAL_ROWS = 256
"""Rows of a block in a causal prefill: fewer waste less beyond the diagonal, more call less."""


@dataclass(frozen=True)
class _Sinks:
    """The sinks of a layer that are the same for all rows, as indices into the held columns."""

    index: Tensor  # (b, h, s) column of each sink, padded with other columns
    valid: Tensor  # (b, h, 1, s) 1.0 for a sink, 0.0 for padding
    value: Tensor  # (b, h, s, d) values of the sinks
    others: Tensor  # (b, h, t, d + 1) values off the sinks, 0 on them; last: 1 off, 0 on
    initial: Tensor | None  # (b, h, 1, s) bool: that with a strength of its own

    @classmethod
    def of(cls, sinks: Tensor, value: Tensor, initial: Tensor | None) -> _Sinks:
        """Gather from ``sinks`` (b, h, t) bool and ``value`` (b, h, t, d)."""
        most = int(sinks.sum(dim=-1).max())
        index = sinks.int().sort(dim=-1, descending=True, stable=True).indices[..., :most]
        valid = sinks.gather(-1, index)[:, :, None].to(value.dtype)
        picked = value.gather(2, index[..., None].expand(*index.shape, value.shape[-1]))
        others = torch.nn.functional.pad(value, (0, 1), value=1.0)
        others = others.masked_fill_(sinks[..., None], 0.0)
        if initial is not None:
            initial = initial[:, 0].expand_as(sinks).gather(-1, index)[:, :, None]
        return cls(index, valid, picked, others, initial)

    def on(self, weights: Tensor) -> Tensor:
        """Weights on the sinks, (b, h, k, s); columns beyond those of ``weights`` are unseen."""
        width = weights.shape[-1]
        index = self.index[:, :, None].expand(-1, -1, weights.shape[2], -1)
        if width < self.others.shape[2]:
            held = self.valid * (self.index < width)[:, :, None]
            return weights.gather(-1, index.clamp(max=width - 1)) * held
        return weights.gather(-1, index) * self.valid


class TorchEngine:
    """See the module; the default engine wherever no faster one exists."""

    name = "torch"
    differentiable = True

    def __init__(self, block_elements: int = 1 << 24) -> None:
        """Store how many weights (sequences x heads x rows x columns) may be held at a time."""
        self.block_elements = block_elements

    def supports(self, plan: LayerPlan) -> list[str]:
        """See :class:`act_harness.engines.operation.Engine`."""
        return unsupported(plan, COMPUTES, engine=self.name)

    def __call__(
        self,
        call: AttentionCall,
        *,
        geometry: Geometry,
        plan: LayerPlan,
        state: LayerState | None,
        stock: Callable[[], Tensor],
    ) -> EngineResult:
        """See :class:`act_harness.engines.operation.Engine`."""
        output, lse = attend_with_lse(call, geometry=geometry, stock=stock)
        layer = _Layer(self, call, geometry, plan)
        head = member("target", plan.calibration.target, COMPUTES) == "head"
        if geometry.first_row == 0 and lse is not None and not head:
            layer.use_lse(lse)
        report = None
        ratio = None
        if state is None:
            state, ratio = layer.detect()
        if head:
            after, sums = layer.change_heads(state, output), layer.no_report()
        elif layer.nothing_to_do(state):
            after, sums = LayerState(pad_columns(state.sinks, geometry.total)), layer.no_report()
        else:
            after, sums = layer.calibrate(state, output)
        if ratio is not None:
            report = make_report(state.sinks, ratio, sums, geometry, plan, call.query.dtype)
        return EngineResult(output, after, report)


class _Layer:
    """One call of the engine: the selected heads' tensors and the loop over blocks of rows."""

    def __init__(
        self, engine: TorchEngine, call: AttentionCall, geometry: Geometry, plan: LayerPlan
    ) -> None:
        query, key, value, self.scale, self.softcap, bias, sink_logits = call
        self.geometry, self.plan = geometry, plan
        self.dtype = torch.float64 if query.dtype == torch.float64 else torch.float32
        self.heads = torch.tensor(plan.heads, device=query.device)
        group = self.heads // (query.shape[1] // key.shape[1])
        self.query = query[:, self.heads].to(self.dtype)
        self.key = key[:, group].to(self.dtype)
        self.value = value[:, group].to(self.dtype)
        self.bias = None if bias is None else bias[:, self.heads, :, : geometry.columns]
        self.sink_logits = None if sink_logits is None else sink_logits[:, self.heads]
        per_row = self.query.shape[0] * len(plan.heads) * geometry.columns
        self.block = max(1, min(geometry.rows, engine.block_elements // max(per_row, 1)))
        self.keeps = self.block >= geometry.rows
        self.running = member("decode", plan.calibration.decode, COMPUTES) == "running"
        self.frozen = member("decode", plan.calibration.decode, COMPUTES) == "frozen"
        self.strengths = Strengths.of(plan.strengths, self.query)
        self.initial = initial_column(geometry, plan)
        if self.initial is not None:  # of the held columns
            self.initial = self.initial[..., geometry.first_column :]
        self.causal = False
        self._kept: dict[int, Tensor] = {}  # weights by first row, where all of them fit

    def use_lse(self, lse: Tensor) -> None:
        """Let products become weights with the kernel's log-sum-exp, (B, H, C).

        It rides along as one more dimension of queries and keys: the product is the logarithm of
        the weight.
        """
        self.causal = True
        self.block = min(self.block, _CAUSAL_ROWS)
        own = -lse[:, self.heads, :, None].to(self.dtype)
        self.query = torch.cat([self.query * self.scale, own], dim=-1)
        self.key = torch.nn.functional.pad(self.key, (0, 1), value=1.0)

    def blocks(self) -> range:
        """First rows of the blocks."""
        return range(0, self.geometry.rows, self.block)

    def weights(self, start: int, factor: Tensor | None = None) -> Tensor:
        """(b, h, k, t) attention weights of a block; rows of pads are meaningless.

        In a causal prefill the columns end where the block's last row does. ``factor``, (1, h, 1,
        1), is one on the logits.
        """
        if start in self._kept:
            return self._kept.pop(start)
        stop = min(start + self.block, self.geometry.rows)
        rows = self.query[:, :, start:stop]
        if not self.causal:
            visible = self.geometry.visible(start, stop)
            bias = self._bias(start, stop)
            return masked_softmax(rows, self.key, visible, self.scale, self.softcap, factor, bias)
        weights = (rows @ self.key[:, :, :stop].transpose(-1, -2)).exp_()
        weights[..., start:].tril_()
        return weights

    def _bias(self, start: int, stop: int) -> Tensor | None:
        bias = self.bias
        if bias is None:
            return None
        return (bias if bias.shape[2] == 1 else bias[:, :, start:stop]).to(self.dtype)

    def less_learned(self, result: Tensor, start: int) -> Tensor:
        """Return a block's ``result`` (b, h, k, d) less what learned sinks take of its rows."""
        if self.sink_logits is None:
            return result
        stop = min(start + self.block, self.geometry.rows)
        logits = masked_logits(
            self.query[:, :, start:stop], self.key, self.geometry.visible(start, stop),
            self.scale, self.softcap, bias=self._bias(start, stop),
        )  # fmt: skip
        learned = self.sink_logits
        own = learned if learned.shape[2] == 1 else learned[:, :, start:stop]
        return result * visible_mass(logits, own)

    def detect(self) -> tuple[LayerState, Tensor]:
        """First visit: the prompt's sinks, and a/threshold of every column."""
        geometry = self.geometry
        sums = self.query.new_zeros(*self.query.shape[:2], geometry.total)
        prompt = geometry.prompt_rows.to(self.dtype)[:, None, None]  # (b, 1, 1, k)
        detects = geometry.has_prompt_rows and self.plan.calibration.detects
        for start in self.blocks() if detects else ():
            weights = self.weights(start)
            part = prompt[..., start : start + self.block] @ weights
            sums[..., : weights.shape[-1]] += part[:, :, 0]
            if self.keeps:
                self._kept[start] = weights
        sinks, ratio = prompt_target(sums, geometry, self.plan)
        seen = torch.zeros_like(geometry.prompt_census[0])
        return LayerState(sinks, torch.zeros_like(sums), seen), ratio

    def nothing_to_do(self, state: LayerState) -> bool:
        """Whether no row of this call can change (looked at where that costs no waiting)."""
        if self.running or self.query.is_cuda:
            return False
        return not bool(state.sinks.any())

    def no_report(self) -> BlockReport:
        """Block sums of a call that changed nothing."""
        zero = self.query.new_zeros(self.query.shape[:2])
        return BlockReport(zero, zero, zero.long())

    def change_heads(self, state: LayerState, output: Tensor) -> LayerState:
        """Write heads that change as a whole into ``output`` (b, k, heads, d)."""
        geometry = self.geometry
        frozen = pad_columns(state.sinks, geometry.total)  # the prompt
        gate = self.strengths.factor("gate")
        temperature = self.strengths.factor("temperature")
        heated = self.strengths.are("temperature")
        active = geometry.prompt_rows | (geometry.continuation_rows & self.frozen)
        active = active[:, None, :, None] & frozen.any(dim=-1)[..., None, None]  # (b, h, k, 1)
        for start in self.blocks():
            stop = min(start + self.block, geometry.rows)
            rows = output[:, start:stop].transpose(1, 2)
            kept = rows[:, self.heads]
            changed = kept.to(self.dtype)
            if "temperature" in self.strengths.masses:
                weights = self.weights(start, temperature)
                value = self.value[:, :, : weights.shape[-1]]
                changed = torch.where(heated, self.less_learned(weights @ value, start), changed)
            changed = (changed * gate).to(output.dtype)
            rows[:, self.heads] = torch.where(active[:, :, start:stop], changed, kept)
        return LayerState(frozen)

    def calibrate(self, state: LayerState, output: Tensor) -> tuple[LayerState, BlockReport]:
        """Second visit: write the selected heads into ``output`` (b, k, heads, d)."""
        geometry = self.geometry
        held = slice(geometry.first_column, geometry.first_column + geometry.columns)
        frozen = pad_columns(state.sinks, geometry.total)
        shared = _Sinks.of(frozen[..., held], self.value, self.initial)
        few_slot = None
        if geometry.has_prompt_rows:
            columns = few_columns(geometry)[..., held].expand(-1, shared.index.shape[1], -1)
            few_slot = columns.gather(-1, shared.index)[:, :, None]
        after = LayerState(frozen)
        if self.running:
            after = LayerState(frozen, state.sums, state.seen)
        report = self.no_report()
        for start in self.blocks():
            stop = min(start + self.block, geometry.rows)
            report = report + self._block(start, stop, shared, few_slot, after, output)
        return after, report

    def _block(
        self,
        start: int,
        stop: int,
        shared: _Sinks,
        few: Tensor | None,
        after: LayerState,
        output: Tensor,
    ) -> BlockReport:
        geometry = self.geometry
        prompt = geometry.prompt_rows[:, None, start:stop, None]
        rest = geometry.continuation_rows[:, None, start:stop, None]
        weights = self.weights(start)
        own = self._running_sinks(start, stop, weights, after) if self.running else None
        on = shared.on(weights)
        # Sinks are left out by zeros in the values, not in the weights: one pass over them less.
        off = weights @ shared.others[:, :, : weights.shape[-1]]
        active = prompt | rest if self.frozen else prompt
        factors = self._factors(on, off[..., -1:], active, shared.initial)
        scaled = _scaled(factors, on, shared.value, shared.initial)
        result = factors.outside * off[..., :-1] + scaled
        if own is not None and geometry.has_continuation_rows:
            result, factors = self._mix_running(weights, own, rest, result, factors)
        changed = (factors.inside != 1) | (factors.outside != 1)
        result = self.less_learned(result, start)
        rows = output[:, start:stop].transpose(1, 2)
        kept = rows[:, self.heads]
        rows[:, self.heads] = torch.where(changed, result.to(output.dtype), kept)
        few_moved = factors.moved * 0
        if few is not None:
            few_moved = (on * few * (1 - factors.on(shared.initial))).sum(-1, keepdim=True)
        return block_report(few_moved, factors, prompt)

    def _factors(
        self, on: Tensor, off: Tensor, active: Tensor, initial: Tensor | None
    ) -> RowFactors:
        """Return the factors of the rows ``active``, by the weights ``on`` the target's columns."""
        if initial is None:
            return row_factors(on.sum(-1, keepdim=True) * active, off, self.strengths)
        first = (on * initial).sum(-1, keepdim=True)
        rest = (on * ~initial).sum(-1, keepdim=True)
        return row_factors(rest * active, off, self.strengths, first * active)

    def _running_sinks(self, start: int, stop: int, weights: Tensor, after: LayerState) -> Tensor:
        """Sinks of each row by the rows up to it, (b, h, k, t); moves ``after`` on."""
        geometry = self.geometry
        assert after.sums is not None  # noqa: S101 - 'running' fills both
        assert after.seen is not None  # noqa: S101
        last = geometry.first_column + weights.shape[-1]
        held = slice(geometry.first_column, last)
        visible = geometry.visible(start, stop)[..., : weights.shape[-1]]
        wide = weights.new_zeros(*weights.shape[:3], geometry.total)
        wide[..., held] = (weights * visible).cumsum(dim=2)
        wide += pad_columns(after.sums, geometry.total)[:, :, None]
        seen = torch.zeros_like(wide[:, :1], dtype=torch.int64)
        seen[..., held] = visible.cumsum(dim=2)
        seen += pad_columns(after.seen, geometry.total)[:, None, None]
        after.sums, after.seen = wide[:, :, -1].clone(), seen[:, 0, -1].clone()
        sinks, _ = find_sinks(
            wide,
            seen,
            most=visible.sum(dim=3, keepdim=True),
            first=geometry.first[:, None, None, None],
            calibration=self.plan.calibration,
            at_least=2,
        )
        return sinks[..., held]

    def _mix_running(
        self, weights: Tensor, own: Tensor, rest: Tensor, result: Tensor, factors: RowFactors
    ) -> tuple[Tensor, RowFactors]:
        """Replace the continuation rows by what their own sinks ``own`` make of them."""
        value = self.value[:, :, : weights.shape[-1]]
        on, off = weights * own, weights * ~own
        initial = None if self.initial is None else self.initial[..., : weights.shape[-1]]
        mine = self._factors(on, off.sum(-1, keepdim=True), rest, initial)
        changed = mine.outside * (off @ value) + _scaled(mine, on, value, initial)
        mixed = [
            None if a is None or b is None else torch.where(rest, a, b)
            for a, b in zip(mine, factors, strict=True)
        ]
        return torch.where(rest, changed, result), RowFactors(*mixed)  # type: ignore[arg-type]


def _scaled(factors: RowFactors, on: Tensor, value: Tensor, initial: Tensor | None) -> Tensor:
    """Return (b, h, k, d): what the target's columns add to the output."""
    if initial is None:
        return factors.inside * (on @ value)
    return (factors.on(initial) * on) @ value
