"""A model opened up for the search, and tried: chunks are laid out for it and read off it.

How its forwards are entered at a layer is in :mod:`act_harness.search.compute.entered`; that they
give the stock model's logits, and in which of the two ways, is tried whenever a model is opened
(:mod:`act_harness.search.compute.opening`).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from act_harness.attention.families.family import visible_columns
from act_harness.search.compute.entered import EnteredModel
from act_harness.search.compute.layout import Layout
from act_harness.search.compute.opening import Opening

if TYPE_CHECKING:
    from collections.abc import Sequence

    from act_harness.search.compute.records import LayerRecord
    from act_harness.search.compute.structure import Masks
    from act_harness.search.documents import Document

__all__ = ["Workbench"]

_LOGIT_BYTES = 1 << 28
"""Logits become log-probabilities in pieces of at most this many bytes."""


class Workbench(EnteredModel):
    """Opens a model for the search; use as a context manager, the model is stock again after it."""

    def _open(self, base: str) -> None:
        super()._open(base)
        opening = Opening(self)
        if self.obstacle is None:
            self.obstacle = opening.rows_obstacle()
        if self.obstacle is not None:
            opening.whole_sequences()

    def lay_out(self, documents: Sequence[Document], *, share: bool) -> Layout:
        """Lay out a chunk for this model.

        Args:
            documents: at least one.
            share: let all answers of a context share one sequence, where the model allows it.
        """
        if self.obstacle is None:
            return Layout.of(documents, device=self.device, share=share)
        return Layout.of(documents, device=self.device, share=False, pads="right")

    def visible(self, layer: int, record: LayerRecord, masks: Masks) -> Tensor | None:
        """Return what rows see in a recorded layer, (S or 1, 1, T, T) bool; None: causal."""
        if self.obstacle is None:
            return masks.visible(layer)
        return None if record.mask is None else visible_columns(record.mask)

    def logits_of(self, rows: Tensor, tokens: Tensor) -> Tensor:
        """Return float32 logits of ``tokens`` in ``rows`` of :attr:`head_input`, (n,).

        To be used where :attr:`plain_head` says that logits are no more than that.
        """
        head: Any = self.model.get_output_embeddings()
        found: Tensor = (self.head_input[rows].float() * head.weight[tokens].float()).sum(dim=1)
        if head.bias is not None:
            found = found + head.bias[tokens].float()
        return found

    def log_probabilities(self, logits: Tensor, rows: Tensor, tokens: Tensor) -> Tensor:
        """Return log-softmax in float32 of ``tokens`` in ``rows`` of logits, (N,)."""
        piece = max(1, _LOGIT_BYTES // (logits.shape[1] * 4))
        if len(logits) <= piece:
            return torch.log_softmax(logits, dim=1, dtype=torch.float32)[rows, tokens]
        found = torch.empty(len(rows), dtype=torch.float32, device=logits.device)
        for start in range(0, len(logits), piece):
            part = torch.log_softmax(logits[start : start + piece], dim=1, dtype=torch.float32)
            here = (rows >= start) & (rows < start + piece)
            found[here] = part[rows[here] - start, tokens[here]]
        return found
