"""A chunk of documents, its baseline forward kept, and what variants are held against it.

All that the exact pass knows before it looks at a layer: the baseline's records, what calibration
changes in a recorded layer's attention output, and how a variant's logits become changes of the
answers' log-probabilities.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from act_harness.calibration import Calibration, HeadStrength, LayerPlan
from act_harness.errors import InternalError
from act_harness.search.compute.layout import Layout
from act_harness.search.compute.packs import GROUP_COST
from act_harness.search.compute.records import LayerRecord

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from act_harness.engines.operation import Engine
    from act_harness.search.compute.workbench import Workbench

__all__ = ["RecordedChunk", "calibrated_change"]


class RecordedChunk:
    """One chunk and its baseline forward."""

    def __init__(
        self,
        bench: Workbench,
        layout: Layout,
        *,
        engine: Engine,
        calibration: Calibration,
        strengths: Sequence[HeadStrength],
        first_layer: int,
        pack_tokens: int,
    ) -> None:
        """Run the baseline and keep what the layers from ``first_layer`` on need.

        Args:
            bench: the opened model.
            layout: the chunk.
            engine: computes calibrated attention.
            calibration: target set; its own mass map is not used.
            strengths: mass maps to try on every head.
            first_layer: lowest layer that will be asked for.
            pack_tokens: most rows (variants x rows) of a packed forward.
        """
        self.bench, self.layout, self.engine = bench, layout, engine
        self.calibration, self.strengths = calibration, tuple(strengths)
        self.pack_tokens = pack_tokens
        self.group_cost = GROUP_COST.get(bench.device.type, GROUP_COST["cuda"])
        self.masks = bench.masks(layout)
        self._geometries: dict[int, object] = {}
        with torch.no_grad():
            logits, self.records = bench.recorded(layout, self.masks, keep_from=first_layer)
            self.base = bench.log_probabilities(logits, layout.read_place, layout.read_token)
            self.base_logits = bench.logits_of(layout.read_place, layout.read_token)

    def baseline(self) -> Tensor:
        """Return (documents, choices) float64 log-likelihoods of the untouched model."""
        return self._slots(self.base.double()[None]).view(self.layout.documents, -1)

    def change(
        self, layer: int, record: LayerRecord, heads: tuple[int, ...], strength: HeadStrength
    ) -> tuple[Tensor, Tensor]:
        """Return ``out' - out`` of each head, (S, T, h, D), and its sinks, (S, h, T)."""
        return calibrated_change(
            self.engine,
            record,
            LayerPlan(self.calibration, heads, (strength,) * len(heads), layer),
            self.layout,
            self.bench.visible(layer, record, self.masks),
            cache=self._geometries,
        )

    def changes(self, read: Tensor, rows: int, run: Callable[..., Tensor]) -> Tensor:
        """Run variants; return the change of every read token's log-probability, (V, N) float64.

        Args:
            read: (V, N) index of each answer token's row among those that are read, -1 where the
                variant has none.
            rows: how many are read.
            run: given ``headless``, (rows,) bool, returns logits of the others.
        """
        layout, bench = self.layout, self.bench
        found = torch.zeros(read.shape, dtype=torch.float64, device=read.device)
        known = read >= 0  # (V, N)
        level = layout.level[layout.read_place] & bench.plain_head  # (N,)
        headless = torch.zeros(rows, dtype=torch.bool, device=read.device)
        headless[read[known & level]] = True
        logits = run(headless=headless)
        index = (~headless).cumsum(dim=0) - 1  # of each row among those with logits
        for some, before in ((known & level, self.base_logits), (known & ~level, self.base)):
            place, tokens = read[some], layout.read_token.expand_as(read)[some]
            if before is self.base:
                after = bench.log_probabilities(logits, index[place], tokens)
            else:
                after = bench.logits_of(place, tokens)
            found[some] = after.double() - before.double().expand_as(read)[some]
        return found

    def _slots(self, tokens: Tensor) -> Tensor:
        """Sum (V, N) values of answer tokens to (V, documents * choices)."""
        layout = self.layout
        size = layout.documents * layout.choices
        slots = torch.zeros(len(tokens), size, dtype=torch.float64, device=tokens.device)
        return slots.index_add_(1, layout.read_slot, tokens.double())


def calibrated_change(
    engine: Engine,
    record: LayerRecord,
    plan: LayerPlan,
    layout: Layout,
    visible: Tensor | None,
    *,
    cache: dict[int, object] | None = None,
) -> tuple[Tensor, Tensor]:
    """Return what calibration changes in a layer's attention output, and where.

    Args:
        engine: computes the plan's heads.
        record: queries, keys, values and attention output of the layer.
        plan: heads and their mass maps.
        layout: the chunk.
        visible: the layer's mask, (S or 1, 1, T, T) bool; None: causal.
        cache: keeps the geometry of each mask between calls.

    Returns:
        ``out' - out`` of each head, (S, T, h, D), exactly 0 in rows that do not change, and the
        heads' sinks among the prompt's columns, (S, h, T) bool.
    """
    if record.call is None:
        raise InternalError("a layer's queries were not recorded")
    attention = record.attention
    if attention is None:
        raise InternalError("a layer's attention output was not recorded")
    geometries = {} if cache is None else cache
    if id(visible) not in geometries:
        geometries[id(visible)] = layout.geometry(visible)
    result = engine(
        record.call,
        geometry=geometries[id(visible)],  # type: ignore[arg-type]
        plan=plan,
        state=None,
        stock=lambda: attention,
    )
    if result.state is None:
        raise InternalError("the engine does not say which columns are sinks")
    heads = list(plan.heads)
    return result.output[:, :, heads] - attention[:, :, heads], result.state.sinks
