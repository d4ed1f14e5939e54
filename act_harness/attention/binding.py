"""What a selected attention module carries: its plan, its cache's state, and its engine's call."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from act_harness.attention.cache import Forward, find_cache, recall, remember, seen_tokens
from act_harness.attention.computing import in_full_precision, refuse_backward
from act_harness.engines.geometry import Geometry
from act_harness.engines.idle import empty_report, idle
from act_harness.engines.operation import AttentionCall, LayerState, Stock
from act_harness.engines.reference import selected_maps
from act_harness.engines.segments import SegmentEngine
from act_harness.errors import InternalError, UnsupportedCallError

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from transformers.cache_utils import Cache

    from act_harness.attention.owner import Owner
    from act_harness.attention.parallel import HeldHeads
    from act_harness.calibration import LayerPlan
    from act_harness.engines.operation import Report
    from act_harness.engines.segments import Capacity, RaggedOutput, Segments

__all__ = ["Binding"]


class Binding:
    """What a selected attention module carries: its plan, and the attachment it belongs to."""

    def __init__(self, attachment: Owner, layer: int, plan: LayerPlan, held: HeldHeads) -> None:
        """Store what the layer is to do.

        Args:
            attachment: what it belongs to.
            layer: its number.
            plan: of all its heads.
            held: which of them are in this process.
        """
        self.attachment, self.layer = attachment, layer
        self.plan = plan if held.count == held.total else plan.part(held.first, held.count)
        self.counted = held.counted
        engine = attachment.engine
        self.segment_engine = engine if isinstance(engine, SegmentEngine) else None
        self.cache: Cache | None = None  # the cache that the forward under way gave the layer

    def note_cache(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Forward pre-hook of the attention module; the interface itself is not told the cache."""
        self.cache = find_cache(args, kwargs)

    def attend(
        self,
        call: AttentionCall,
        mask: Tensor | None,
        *,
        stock: Stock,
        stock_maps: Callable[[], Tensor | None],
    ) -> tuple[Tensor, Tensor | None]:
        """See :class:`act_harness.attention.interface.BoundLayer`."""
        owner, forward = self.attachment, self._forward()
        query, key = call.query, call.key
        cache = self.cache if forward.cache is None else forward.cache
        again = forward.again(cache, self.layer, mask=mask, query=query, key=key, owner=owner.token)
        state: LayerState | None
        if again is not None:
            geometry, state = again[1], again[0].state
        else:
            seen = seen_tokens(cache, self.layer, query.shape[2])
            state, real = recall(cache, self.layer, seen, owner=owner.token, batch=query.shape[0])
            geometry = forward.geometry(key, mask, seen, real)
            forward.note(cache, mask, key, geometry, real)
            if key.shape[2] > geometry.columns:  # a static cache; a view costs a step time
                held = slice(geometry.columns)
                call = call._replace(key=key[:, :, held], value=call.value[:, :, held])
        maps = None
        if forward.maps and stock.kernel == "eager":
            told = self._told(geometry, state)
            maps = self._maps(stock_maps(), call, told, state)
        output, state = self.compute(call, geometry=geometry, state=state, stock=stock)
        if again is not None:
            again[0].keep(cache, self.layer, state, geometry.real)
        else:
            remember(cache, self.layer, state, geometry.real, owner=owner.token)
        return output, maps

    def _maps(
        self,
        maps: Tensor | None,
        call: AttentionCall,
        geometry: Geometry,
        state: LayerState | None,
    ) -> Tensor | None:
        """Return the stock's (B, H, C, K) maps with those of the selected heads calibrated."""
        if maps is None:
            return None
        found = selected_maps(call, geometry=geometry, plan=self.plan, state=state)
        maps = maps.clone()
        heads = torch.tensor(self.plan.heads, device=maps.device)
        held = found.calibrated[..., geometry.first_column :]
        if call.sink_logits is not None:  # most such models' maps are less what the sink takes
            held = held * maps[:, heads].sum(dim=-1, keepdim=True, dtype=held.dtype)
        maps[:, heads, :, : geometry.columns] = held.to(maps.dtype)
        return maps

    def compute(
        self,
        call: AttentionCall,
        *,
        geometry: Geometry,
        state: LayerState | None,
        stock: Stock,
    ) -> tuple[Tensor, LayerState | None]:
        """See :class:`act_harness.attention.packing.PackedLayer`."""
        owner = self.attachment
        forward = self._forward()
        engine, device = owner.engine, call.query.device.type
        owner.calls.add(engine.name)
        geometry = self._told(geometry, state)
        if not self.plan.heads:
            result = idle(geometry, state, stock)
        elif torch.is_autocast_enabled(device):
            compute = partial(engine, call, geometry=geometry, plan=self.plan, state=state)
            result = in_full_precision(compute, device, stock)
        else:  # called as it is: a partial a layer costs a decode step time
            result = engine(call, geometry=geometry, plan=self.plan, state=state, stock=stock)
        if result.report is not None:
            self._report(result.report, geometry.prompt)
        forward.reached.add(self.layer)
        output = result.output
        if torch.is_grad_enabled() and call.query.requires_grad:
            output = refuse_backward(output, engine)
        return output, result.state

    def _told(self, geometry: Geometry, state: LayerState | None) -> Geometry:
        """Return the geometry of a prefill with what the plan's target needs to know of tokens.

        Raises:
            UnsupportedCallError: the forward was given embeddings.
        """
        if state is not None:  # most often a decode step
            return geometry
        target, finder = self.plan.calibration.target, self.attachment.spans
        if target not in ("random", "span"):
            return geometry
        if geometry.ids is None:
            raise UnsupportedCallError(
                f"target {target!r} is found by the ids of the tokens, and this model's decoder "
                "was given embeddings; pass input_ids, or take another target"
            )
        return geometry if finder is None else self._forward().with_span(geometry, finder)

    def takes_segments(self, capacity: Capacity) -> bool:
        """See :class:`act_harness.attention.packing.PackedLayer`."""
        engine = self.segment_engine
        return engine is not None and engine.takes_segments(self.plan, capacity)

    def calibrate_segments(
        self,
        call: AttentionCall,
        stock: RaggedOutput,
        *,
        segments: Segments,
        prompts: Sequence[int],
    ) -> None:
        """See :class:`act_harness.attention.packing.PackedLayer`."""
        owner, engine = self.attachment, self.segment_engine
        if engine is None:
            raise InternalError(f"engine {owner.engine.name} does not calibrate packed segments")
        owner.calls.add(owner.engine.name)
        if self.plan.heads:
            report = engine.calibrate_segments(call, stock, segments=segments, plan=self.plan)
        else:
            report = empty_report(segments.contexts, call.query.device)
        self._report(report, prompts)
        self._forward().reached.add(self.layer)

    def _report(self, report: Report, prompts: Tensor | Sequence[int]) -> None:
        if not self.counted:
            report = empty_report(report.facts.shape[1], report.facts.device)
        self.attachment.note_report(self.layer, report, prompts)

    def _forward(self) -> Forward:
        if self.attachment.forward is None:
            raise InternalError("a calibrated layer was called outside its decoder's forward")
        return self.attachment.forward
