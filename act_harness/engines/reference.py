"""The paper's mathematics, in one place, on materialised attention maps.

Source: Yu et al., ICML 2024 (arXiv 2406.15765), sections 3 and 4. A hidden attention sink is a
column whose mean attention, over the rows that can see it, is above a multiple of the average
(section 3); calibration damps the sinks of a selected head and gives the mass to the other columns
of the same row in proportion (section 4). Other targets and maps are the same operation on other
columns, with another m'; what a map makes of a row is in :mod:`act_harness.engines.strengths`.
The functions take any float dtype; the engine at the end computes in float64 and is the oracle of
all others. Nothing here is fast: every map is stored.

Axes in the comments: b sequence, h selected head, k row (query), t column (key).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from act_harness.calibration import Calibration, HeadStrength, LayerPlan
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
from act_harness.engines.reports import block_report, few_columns, make_report
from act_harness.engines.strengths import RowFactors, Strengths, row_factors
from act_harness.engines.targets import drawn_columns, last_columns, prompt_columns, span_columns
from act_harness.errors import CalibrationError

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

__all__ = [
    "COMPUTES",
    "ReferenceEngine",
    "RowFactors",
    "SelectedMaps",
    "calibrate_weights",
    "find_sinks",
    "prompt_target",
    "row_factors",
    "selected_maps",
]

COMPUTES: Members = {
    "target": ("sinks", "initial", "both", "random", "last", "span", "head"),
    "rule": ("relative", "absolute"),
    "protect": ("initial", "first-flagged", "none"),
    "decode": ("frozen", "running", "off"),
    "mass": ("damp", "reweight", "raise", "gate", "temperature"),
}
"""What the reference computes: every member that the settings have."""

_OF_MAPS = ("sinks", "initial", "both")
"""Targets that :func:`calibrate_weights` knows: the others are about tokens or logits."""


def find_sinks(
    sums: Tensor,  # (b, h, ..., t) attention that each column received
    seen: Tensor,  # (b, 1, ..., t) rows that could see it
    *,
    most: Tensor,  # (b, 1, ..., 1) N: most columns that a row can see
    first: Tensor,  # (b, 1, ..., 1) position of the first real token
    calibration: Calibration,
    at_least: int = 1,
) -> tuple[Tensor, Tensor]:
    """Return the sinks (b, h, ..., t) bool and a/threshold of every column that can be one.

    Paper, section 3: ``S = {t : a[t] > alpha / N} - {initial token}`` with ``a[t]`` the mean
    attention that column t gets. Columns that cannot be sinks have the ratio 0. Of target
    ``initial`` it is that token that is returned, and beside the sinks of target ``both``.
    """
    return _flagged(
        sums, _eligible(seen, most, first, calibration, at_least, sums.dtype), calibration
    )


class _Eligible(NamedTuple):
    """What decides which columns are sinks, apart from what they received."""

    columns: Tensor  # (b, 1, ..., t) bool: those that can be one
    rows: Tensor  # (b, 1, ..., t) that could see each, at least 1
    threshold: Tensor  # (b, 1, ..., 1)
    initial: Tensor | None  # (b, 1, ..., t) bool, of a target that the initial token is in


def _eligible(
    seen: Tensor,
    most: Tensor,
    first: Tensor,
    calibration: Calibration,
    at_least: int,
    dtype: torch.dtype,
) -> _Eligible:
    column = torch.arange(seen.shape[-1], device=seen.device).expand_as(seen)
    target = member("target", calibration.target, COMPUTES)
    initial = ((column == first) & (seen > 0)) if target in ("initial", "both") else None
    most = most.clamp(min=1).to(dtype)
    if target == "initial":  # of which nothing is detected
        return _Eligible(seen > 0, seen, most, initial)
    member("rule", calibration.rule, COMPUTES)  # one that exists may be none of these
    columns = (seen >= calibration.required_rows(most, at_least=at_least)) & (seen > 0)
    if member("protect", calibration.protect, COMPUTES) == "initial":
        columns = columns & (column != first)
    return _Eligible(columns, seen.clamp(min=1), calibration.threshold(most), initial)


def _flagged(sums: Tensor, can: _Eligible, calibration: Calibration) -> tuple[Tensor, Tensor]:
    initial = None if can.initial is None else can.initial.expand_as(sums)
    if initial is not None and calibration.target == "initial":
        return initial, torch.zeros_like(sums)
    ratio = torch.where(can.columns, sums / can.rows / can.threshold, 0.0)
    sinks = ratio > 1
    if member("protect", calibration.protect, COMPUTES) == "first-flagged":
        lowest = sinks & (sinks.cumsum(dim=-1) == 1)
        sinks = sinks & ~lowest
    return sinks if initial is None else sinks | initial, ratio


def prompt_target(sums: Tensor, geometry: Geometry, plan: LayerPlan) -> tuple[Tensor, Tensor]:
    """Return the target set of a prompt (b, h, t) bool, and a/threshold as :func:`find_sinks` does.

    Args:
        sums: (b, h, t) attention that each column received from the prompt's rows.
        geometry: of the prefill.
        plan: what its target is.
    """
    calibration = plan.calibration
    target = member("target", calibration.target, COMPUTES)
    given = None
    if target == "head":
        given = prompt_columns(geometry, plan)
    elif target == "span":
        given = span_columns(geometry, plan)
    elif target == "last" and isinstance(calibration.count, int):
        given = last_columns(geometry, calibration.count).expand(sums.shape)
    if given is not None:
        return given, torch.zeros_like(sums)

    def eligible() -> _Eligible:
        seen, most = geometry.prompt_census
        first = geometry.first[:, None, None]
        return _eligible(seen[:, None], most[:, None, None], first, calibration, 1, sums.dtype)

    can = geometry.scratch(("eligible", calibration, sums.dtype), eligible)
    sinks, ratio = _flagged(sums, can, calibration)
    if target == "last":
        return last_columns(geometry, sinks.sum(dim=-1)), ratio
    if target == "random":
        return drawn_columns(geometry, plan, sinks.sum(dim=-1)), ratio
    return sinks, ratio


def apply_factors(
    weights: Tensor,  # (b, h, k, t)
    sinks: Tensor,  # (b, h, k or 1, t) bool
    strengths: Sequence[HeadStrength] | Strengths,
    active: Tensor,  # (b, 1, k, 1) bool: rows that are calibrated
    initial: Tensor | None = None,  # (b, 1, 1, t) bool: of them, that with a strength of its own
) -> tuple[Tensor, RowFactors]:
    """Return ``A'`` (paper, section 4) and the factors."""
    off = (weights * ~sinks).sum(dim=-1, keepdim=True)  # summed: 1 - m would lose digits
    if initial is None:
        on = (weights * sinks).sum(dim=-1, keepdim=True)
        factors = row_factors(on * active, off, strengths)
    else:
        on = (weights * (sinks & ~initial)).sum(dim=-1, keepdim=True)
        first = (weights * (sinks & initial)).sum(dim=-1, keepdim=True)
        factors = row_factors(on * active, off, strengths, first * active)
    return weights * torch.where(sinks, factors.on(initial), factors.outside), factors


def initial_column(geometry: Geometry, plan: LayerPlan) -> Tensor | None:
    """Return (b, 1, 1, t) bool: the initial token, where the plan has a strength for it alone."""
    if member("target", plan.calibration.target, COMPUTES) != "both":
        return None
    column = torch.arange(geometry.total, device=geometry.real.device)
    return (column == geometry.first[:, None])[:, None, None]


def change_heads(
    weights: Tensor,  # (b, h, k, t)
    heated: Tensor,  # (b, h, k, t) the same from logits times the heads' temperature
    strengths: Strengths,
    active: Tensor,  # (b, h, k, 1) bool: rows that are changed
) -> tuple[Tensor, RowFactors]:
    """Return the maps of heads that change as a whole: ``heated``, times g of ``gate``.

    Rows under ``gate`` are no distributions any more: g times the head's output is what they give.
    """
    changed = heated * strengths.factor("gate")
    one = torch.ones_like(weights[..., :1])
    unmoved = RowFactors(one, one, one * 0, torch.zeros_like(one, dtype=torch.bool))
    return torch.where(active, changed, weights), unmoved


def calibrate_weights(
    weights: Tensor,
    *,
    calibration: Calibration,
    visible: Tensor | None = None,
    strengths: Sequence[HeadStrength] | Strengths | None = None,
) -> Tensor:
    """Calibrate materialised attention maps of one prompt (a prefill).

    Args:
        weights: (batch, heads, rows, columns), rows that sum to 1; every head is calibrated.
        calibration: target set and mass map.
        visible: (batch or 1, 1, rows, columns) bool; causal, aligned to the last row, when None.
        strengths: one mass map per head; the calibration's own for all when None.

    Returns:
        A tensor of the same shape and dtype.

    Raises:
        CalibrationError: the target is not one that maps alone can say.
    """
    if calibration.target not in _OF_MAPS:
        raise CalibrationError(
            f"target {calibration.target!r} cannot be read off attention maps, these can: "
            f"{', '.join(_OF_MAPS)}; attach a head set to a model instead"
        )
    rows, columns = weights.shape[-2:]
    if visible is None:
        visible = torch.ones(rows, columns, dtype=torch.bool, device=weights.device)
        visible = visible.tril(columns - rows)[None, None]
    visible = visible.expand(weights.shape[0], 1, rows, columns)
    plan = LayerPlan.uniform(calibration, tuple(range(weights.shape[1])))
    seen = visible.sum(dim=2)  # (b, 1, t)
    most = visible.sum(dim=3).amax(dim=2, keepdim=True)  # (b, 1, 1)
    first = (seen > 0).int().argmax(dim=2, keepdim=True)
    sinks, _ = find_sinks(weights.sum(dim=2), seen, most=most, first=first, calibration=calibration)
    every = visible.any(dim=3, keepdim=True)
    initial = None
    if calibration.target == "both":
        initial = (torch.arange(columns, device=weights.device) == first)[:, :, None]
    own = strengths or plan.strengths
    return apply_factors(weights, sinks[:, :, None], own, every, initial)[0]


def row_sinks(
    weights: Tensor,  # (b, h, k, t)
    visible: Tensor,  # (b, 1, k, t) bool
    geometry: Geometry,
    plan: LayerPlan,
    state: LayerState | None,
) -> tuple[Tensor, LayerState, Tensor | None]:
    """Return the target of every row (b, h, k or 1, t), the state after it, and a/threshold."""
    calibration, first = plan.calibration, geometry.first[:, None, None]
    ratio = None
    if state is None:
        sums = (weights * geometry.prompt_rows[:, None, :, None]).sum(dim=2)
        sinks, ratio = prompt_target(sums, geometry, plan)
        seen = torch.zeros_like(geometry.prompt_census[0])
        state = LayerState(sinks, torch.zeros_like(sums), seen)
    frozen = pad_columns(state.sinks, geometry.total)
    if member("decode", calibration.decode, COMPUTES) != "running":
        return frozen[:, :, None], LayerState(frozen), ratio
    assert state.sums is not None  # noqa: S101 - 'running' fills both
    assert state.seen is not None  # noqa: S101
    sums = pad_columns(state.sums, geometry.total)[:, :, None] + weights.cumsum(dim=2)
    seen = pad_columns(state.seen, geometry.total)[:, None, None] + visible.cumsum(dim=2)
    most = visible.sum(dim=3, keepdim=True)  # N_k: what row k itself sees
    own, _ = find_sinks(
        sums, seen, most=most, first=first[..., None], calibration=calibration, at_least=2
    )
    rest = geometry.continuation_rows[:, None, :, None]
    after = LayerState(frozen, sums[:, :, -1], seen[:, 0, -1])
    return torch.where(rest, own, frozen[:, :, None]), after, ratio


class SelectedMaps(NamedTuple):
    """The maps of a call's selected heads, over all columns so far; those dropped have weight 0.

    Rows sum to 1. Of heads with a learned sink they are shares of what that leaves, ``mass``.
    """

    weights: Tensor  # (b, h, k, t) as the model has them
    sinks: Tensor  # (b, h, k or 1, t) bool
    calibrated: Tensor  # (b, h, k, t)
    factors: RowFactors
    after: LayerState
    ratio: Tensor | None  # (b, h, t) a/threshold; of a prefill
    mass: Tensor | None  # (b, h, k, 1) what a learned sink leaves; None: the heads have none

    def outputs(self, weights: Tensor, values: Tensor) -> Tensor:
        """Return (b, h, k, d): what the heads give with maps ``weights`` over all columns so far.

        Args:
            weights: (b, h, k, t), these maps, the calibrated ones, or a difference of both.
            values: (b, h, K, d) of the columns that are still held.
        """
        found = weights[..., weights.shape[-1] - values.shape[2] :] @ values
        return found if self.mass is None else found * self.mass


def selected_maps(
    call: AttentionCall,
    *,
    geometry: Geometry,
    plan: LayerPlan,
    state: LayerState | None,
    dtype: torch.dtype = torch.float64,
) -> SelectedMaps:
    """Materialise the attention maps of the selected heads, before and after calibration.

    The arguments are those of :class:`act_harness.engines.operation.Engine`; ``dtype`` computes.
    """
    query, key, _, scale, softcap, bias, sink_logits = call
    heads = torch.tensor(plan.heads, device=query.device)
    group = heads // (query.shape[1] // key.shape[1])
    dropped = (geometry.first_column, 0)  # columns a sliding cache no longer holds: weight 0
    held = torch.nn.functional.pad(key[:, group].to(dtype), (0, 0, *dropped))
    visible = torch.nn.functional.pad(geometry.visible(0, geometry.rows), dropped)
    if bias is not None:
        bias = torch.nn.functional.pad(bias[:, heads, :, : geometry.columns].to(dtype), dropped)
    logits = masked_logits(query[:, heads].to(dtype), held, visible, scale, softcap, bias=bias)
    weights = torch.softmax(logits, dim=-1) * visible
    mass = None if sink_logits is None else visible_mass(logits, sink_logits[:, heads])
    sinks, after, ratio = row_sinks(weights, visible, geometry, plan, state)
    active = geometry.prompt_rows[:, None, :, None]
    if member("decode", plan.calibration.decode, COMPUTES) != "off":
        active = active | geometry.continuation_rows[:, None, :, None]
    own = Strengths.of(plan.strengths, weights)
    if member("target", plan.calibration.target, COMPUTES) == "head":
        heated = masked_softmax(
            query[:, heads].to(dtype),
            held,
            visible,
            scale,
            softcap,
            own.factor("temperature"),
            bias,
        )
        active = active & sinks.any(dim=-1, keepdim=True)  # a sequence without a prompt stays
        changed, factors = change_heads(weights, heated, own, active)
    else:
        initial = initial_column(geometry, plan)
        changed, factors = apply_factors(weights, sinks, own, active, initial)
    return SelectedMaps(weights, sinks, changed, factors, after, ratio, mass)


class ReferenceEngine:
    """Every map in memory, float64 by default: the oracle for the other engines."""

    name = "reference"
    differentiable = True

    def __init__(self, dtype: torch.dtype = torch.float64) -> None:
        self.dtype = dtype

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
        maps = selected_maps(call, geometry=geometry, plan=plan, state=state, dtype=self.dtype)
        heads = torch.tensor(plan.heads, device=call.query.device)
        group = heads // (call.query.shape[1] // call.key.shape[1])
        values = call.value[:, group].to(self.dtype)
        output = stock().clone()
        made = maps.outputs(maps.calibrated, values)
        output[:, :, heads] = made.transpose(1, 2).to(output.dtype)
        report = None
        if maps.ratio is not None:
            few = maps.weights * (maps.sinks & few_columns(geometry)[:, :, None])
            left = 1 - maps.factors.on(initial_column(geometry, plan))  # (b, h, k, 1 or t)
            few_moved = (few * left).sum(-1, keepdim=True)
            sums = block_report(few_moved, maps.factors, geometry.prompt_rows[:, None, :, None])
            report = make_report(
                maps.after.sinks, maps.ratio, sums, geometry, plan, call.query.dtype
            )
        return EngineResult(output, maps.after, report)
