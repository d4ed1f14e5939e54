"""All heads' effects on one document's margin from one backward pass, to first order.

A head's output at a row moves by a vector that is known when its map is: the output of the
calibrated map less that of the stock model's. The margin's gradient by the output, times the
vector, summed over rows, is what calibrating this head alone adds to the margin where the layers
above answer in proportion. For ``damp`` that is the derivative by beta, times how far beta is from
1: a head's output is linear in it. Elsewhere nothing is left out within the head, as a derivative
by a strength would.
"""

from __future__ import annotations

from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from act_harness.attention.head_set import head_set
from act_harness.attention.lifecycle import prepare
from act_harness.engines.operation import EngineResult, LayerState, unsupported
from act_harness.engines.reference import COMPUTES, selected_maps
from act_harness.errors import UnsupportedModelError
from act_harness.exploration.effects import grid_shape
from act_harness.exploration.maps import groups_of, last_logits
from act_harness.search.compute.read_rows import rows_of

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping

    import numpy.typing as npt
    from torch import Tensor, nn
    from transformers import PreTrainedModel

    from act_harness.calibration import Calibration, HeadStrength, LayerPlan
    from act_harness.engines.geometry import Geometry
    from act_harness.engines.operation import AttentionCall
    from act_harness.search.documents import Document

__all__ = ["first_order_effects"]


class _Moving:
    """An engine that moves each head's output by a part of what calibration would move it."""

    name = "first-order"
    differentiable = True

    def __init__(self, parts: Tensor) -> None:
        """Store (L, H) parts: 0 is the stock model, and where the derivative is taken."""
        self.parts = parts

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
        output = stock()
        steps = torch.zeros_like(output)
        sinks = []
        with torch.no_grad():
            values = call.value.float()
            for some in groups_of(plan, len(geometry.real) * geometry.rows * geometry.total):
                maps = selected_maps(
                    call, geometry=geometry, plan=some, state=state, dtype=torch.float32
                )
                heads = torch.tensor(some.heads, device=output.device)
                group = heads // (call.query.shape[1] // call.key.shape[1])
                moved = maps.outputs(maps.calibrated - maps.weights, values[:, group])
                steps[:, :, heads] = moved.transpose(1, 2).to(output.dtype)
                sinks.append(maps.after.sinks)
        part = self.parts[plan.layer].to(output.dtype)
        kept = LayerState(torch.cat(sinks, dim=1))
        return EngineResult(output + part[:, None] * steps, kept, None)


def first_order_effects(
    model: PreTrainedModel,
    document: Document,
    *,
    calibration: Calibration,
    strengths: Mapping[tuple[int, int], HeadStrength],
    before: npt.NDArray[np.float64],
    tokenizer: Any = None,  # noqa: ANN401 - any transformers tokenizer
) -> npt.NDArray[np.float64]:
    """Return (layers, heads) first-order effects of each head alone on the margin, in nats.

    A layer without strengths has NaN: it does not attend.

    Args:
        model: the stock model.
        document: prompt and answers. One forward and backward where its two best answers are read
            behind the same tokens, else one for each of the two.
        calibration: what is done in the head.
        strengths: mass map of every head, by (layer, head).
        before: (choices,) log-likelihoods of the stock model: they say which answer is the rival.
        tokenizer: of the document; target ``span`` needs it.

    Raises:
        UnsupportedModelError: the model cannot be calibrated, or passes no gradient on.
    """
    shape = grid_shape(model, strengths)
    places: dict[int, tuple[int, ...]] = {}
    for layer, head in sorted(strengths):
        places[layer] = (*places.get(layer, ()), head)
    every = head_set(
        model,
        places,
        calibration=calibration,
        strengths={n: {head: strengths[n, head] for head in own} for n, own in places.items()},
        name="every-head",
    )
    rival = int(np.argmax(np.where(np.arange(len(before)) == document.right, -np.inf, before)))
    signs = {document.right: 1.0, rival: -1.0}
    found = np.zeros(shape)
    with torch.inference_mode(mode=False), torch.enable_grad(), _frozen(model):
        parts = torch.zeros(shape, requires_grad=True)
        attachment = prepare(
            model, every, tokenizer=tokenizer, engine=_Moving(parts), facts=every.model
        )
        with attachment.engaged():
            for row in rows_of(document):
                reads = [read for read in row.reads if read.choice in signs]
                if not reads:
                    continue
                with attachment.prompts([row.prompt]):
                    logits = last_logits(
                        model, row.tokens, rows=len(row.tokens) - row.prompt + 1, gradient=True
                    )
                known = torch.log_softmax(logits.double(), dim=-1)
                margin = sum(
                    signs[read.choice] * known[read.row - row.prompt + 1, read.token]
                    for read in reads
                )
                if not isinstance(margin, torch.Tensor) or not margin.requires_grad:
                    raise UnsupportedModelError(
                        f"{type(model).__name__} passes no gradient on to its attention"
                    )
                found += torch.autograd.grad(margin, parts)[0].numpy()
    found[[layer for layer in range(shape[0]) if layer not in places]] = np.nan
    return found


@contextmanager
def _frozen(model: nn.Module) -> Iterator[None]:
    """Ask for no gradient of weights inside the block: less is kept for the backward."""
    asked = [one for one in model.parameters() if one.requires_grad]
    for one in asked:
        one.requires_grad_(False)
    try:
        yield
    finally:
        for one in asked:
            one.requires_grad_(True)
