"""What a gradient search minimises on a batch of one task's documents.

With ``s[c]`` the log-likelihood of choice ``c``: cross-entropy of ``softmax(t * (s - prior))``
against the right choice, the prior being the batch's mean of ``s`` under objective ``corrected``
(where a task's choices are the same for every document) and nothing under ``margin``. ``entropy``
takes no labels: the mean entropy of that distribution, prior subtracted, at t = 1 (the unsupervised
mode of ZeroTuning, arXiv 2505.11739); a learned t would make it small by itself.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from collections.abc import Sequence

    from act_harness.search.documents import Document

__all__ = ["has_fixed_choices", "objective_loss"]


def has_fixed_choices(documents: Sequence[Document]) -> bool:
    """Say whether all documents have the same choices, so that each has a label prior."""
    return len({(document.choices, len(document.requests)) for document in documents}) == 1


def objective_loss(
    scores: Tensor,
    right: Tensor,
    *,
    objective: str,
    fixed: bool,
    log_temperature: Tensor | float = 0.0,
) -> Tensor:
    """Return the mean loss of a batch, a scalar in nats.

    Args:
        scores: (documents, choices) log-likelihoods; minus infinity where a choice is missing.
        right: (documents,) index of the right choice; unused by ``entropy``.
        objective: ``corrected``, ``margin`` or ``entropy``.
        fixed: whether the choices are the same for all documents of the task.
        log_temperature: of the scores; unused by ``entropy``.
    """
    there = torch.isfinite(scores)
    known = scores.masked_fill(~there, 0.0)  # infinity times anything would spoil the gradients
    if fixed and objective != "margin":
        known = known - known.mean(dim=0, keepdim=True)
    if objective == "entropy":
        log = torch.log_softmax(known.masked_fill(~there, -torch.inf), dim=1)
        return -(log.exp() * log.masked_fill(~there, 0.0)).sum(dim=1).mean()
    factor = torch.as_tensor(log_temperature, dtype=scores.dtype, device=scores.device).exp()
    logits = (known * factor).masked_fill(~there, -torch.inf)
    return torch.nn.functional.cross_entropy(logits, right)
