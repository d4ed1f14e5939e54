"""The first-order screen: an estimate for every head from one backward pass.

Calibrating head h changes its attention output in some rows; to first order the answer margins
change by the product of that change with the margins' gradient there, summed over rows. One
backward pass of the summed margins gives the gradient at all heads of all layers, so every head and
every mass map is estimated for the price of a few forwards. What is estimated is the sum over a
task's documents of the recipe's objective; with objective ``corrected`` the label prior's own
change is part of it, since it is linear in the scores too.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from act_harness.calibration import LayerPlan
from act_harness.search.compute.chunk import calibrated_change
from act_harness.search.compute.records import LayerRecord

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    import numpy as np
    import numpy.typing as npt

    from act_harness.calibration import Calibration, HeadStrength
    from act_harness.engines.operation import Engine
    from act_harness.search.choose.effects import TaskScores
    from act_harness.search.compute.layout import Layout
    from act_harness.search.compute.workbench import Workbench

__all__ = ["estimate_chunk", "score_weights"]


def score_weights(task: TaskScores) -> npt.NDArray[np.float64]:
    """Return what each score counts in the sum of the margins, (documents, choices).

    The best wrong choice is the baseline's. With the objective ``corrected`` a choice's mean over
    the documents is subtracted from its score, so each document's score also counts, by 1/n, in
    every margin that the choice takes part in.
    """
    import numpy as np

    corrected = task.objective == "corrected" and task.fixed
    given = task.corrected(task.scores) if corrected else task.scores
    rows = np.arange(len(task.right))
    wrong = given.copy()
    wrong[rows, task.right] = -np.inf
    weights = np.zeros(task.scores.shape)
    weights[rows, task.right] += 1.0
    weights[rows, wrong.argmax(axis=1)] -= 1.0
    if corrected:
        weights -= weights.mean(axis=0, keepdims=True)
    return weights


def estimate_chunk(
    bench: Workbench,
    layout: Layout,
    weights: Callable[[Tensor], Tensor],
    *,
    engine: Engine,
    calibration: Calibration,
    strengths: Sequence[HeadStrength],
    grid: dict[int, tuple[int, ...]],
) -> tuple[Tensor, dict[int, Tensor]]:
    """Estimate what every head does to a weighted sum of scores.

    Args:
        bench: the opened model.
        layout: the chunk; its activations of all layers are in memory at once.
        weights: what each score counts, (documents, choices), given the baseline's scores.
        engine: computes calibrated attention.
        calibration: target set.
        strengths: mass maps.
        grid: heads by layer.

    Returns:
        The baseline's scores, (documents, choices) float64, and by layer the estimated change of
        the sum, (strengths, heads) float64.
    """
    masks = bench.masks(layout)
    changes: dict[int, list[Tensor]] = {}
    outputs: dict[int, Tensor] = {}
    geometries: dict[int, object] = {}

    def note(layer: int, record: LayerRecord) -> None:
        if layer not in grid or record.call is None or record.attention is None:
            return
        outputs[layer] = record.attention
        fixed = LayerRecord(
            call=record.call.each(Tensor.detach), attention=record.attention.detach()
        )
        with torch.no_grad():
            changes[layer] = [
                calibrated_change(
                    engine,
                    fixed,
                    LayerPlan(calibration, grid[layer], (strength,) * len(grid[layer]), layer),
                    layout,
                    bench.visible(layer, record, masks),
                    cache=geometries,
                )[0]
                for strength in strengths
            ]

    with _frozen_parameters(bench), torch.enable_grad():
        logits, _ = bench.recorded(
            layout, masks, keep_from=min(grid), on_attention=note, gradient=True
        )
        chosen = bench.log_probabilities(logits, layout.read_place, layout.read_token)
        scores = torch.zeros(layout.documents * layout.choices, dtype=torch.float64)
        scores = scores.to(chosen.device).index_add_(0, layout.read_slot, chosen.detach().double())
        scores = scores.view(layout.documents, layout.choices)
        counts = weights(scores).to(chosen).reshape(-1)[layout.read_slot]
        layers = sorted(outputs)
        gradients = torch.autograd.grad(
            (chosen * counts).sum(), [outputs[layer] for layer in layers]
        )
    result = {}
    for layer, gradient in zip(layers, gradients, strict=True):
        own = gradient[:, :, list(grid[layer])].float()
        result[layer] = torch.stack(
            [(own * change.float()).sum(dim=(0, 1, 3)).double() for change in changes.pop(layer)]
        )
    return scores, result


class _frozen_parameters:  # noqa: N801 - reads as a statement
    """Let no parameter collect a gradient inside the block."""

    def __init__(self, bench: Workbench) -> None:
        self._needed = [p for p in bench.model.parameters() if p.requires_grad]

    def __enter__(self) -> None:
        for parameter in self._needed:
            parameter.requires_grad_(False)

    def __exit__(self, *_: object) -> None:
        for parameter in self._needed:
            parameter.requires_grad_(True)
