"""The output head during a forward: which rows it is given, and what it was given.

A vocabulary is wide, so logits are wanted of the scored rows only. What a model does to logits
after its head (soft caps, scales) is elementwise, so it is kept; ``logits_to_keep`` of transformers
could only keep the same positions of all sequences.
"""

from __future__ import annotations

from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch

from act_harness.attention.capabilities import Answer, capabilities_of
from act_harness.attention.placement import input_device

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from torch import Tensor
    from transformers import PreTrainedModel

__all__ = ["bare_head", "head_input", "rows_only"]


@contextmanager
def rows_only(
    model: PreTrainedModel, places: list[tuple[int, int]], *, keep: bool = False
) -> Iterator[list[Tensor]]:
    """Let the output head see only the hidden states of ``places``, as (1, rows, hidden).

    Args:
        model: a causal language model.
        places: (sequence, position) of the rows.
        keep: let the head see one row only; all are in the list that the block is given.
    """
    picked: list[Tensor] = []

    def select(hidden: Tensor) -> Tensor:
        index = torch.tensor(places, device=hidden.device)
        picked.append(hidden[index[:, 0], index[:, 1]])
        return picked[0][None, : 1 if keep else None]

    with _selecting(model, select):
        yield picked


@contextmanager
def head_input(model: PreTrainedModel) -> Iterator[list[Tensor]]:
    """Collect what the output head is given, (1, N, hidden), and let it see the first row only."""
    seen: list[Tensor] = []

    def select(hidden: Tensor) -> Tensor:
        seen.append(hidden)
        return hidden[:, :1]

    with _selecting(model, select):
        yield seen


@contextmanager
def _selecting(model: PreTrainedModel, select: Callable[[Tensor], Tensor]) -> Iterator[None]:
    def before(module: torch.nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        return (select(args[0]), *args[1:])

    hook = model.get_output_embeddings().register_forward_pre_hook(before)
    try:
        yield
    finally:
        hook.remove()


def bare_head(model: PreTrainedModel) -> Answer[bool]:
    """Return whether logits are the output head's result and nothing more.

    Soft caps and scales come after the head. Tried once; calibration must be suspended.
    """
    known = capabilities_of(model)
    if known.bare_head is None:
        ids = torch.arange(2, 5, device=input_device(model))[None]
        with torch.no_grad():
            with rows_only(model, [(0, 0), (0, 2)]) as picked:
                logits = model(input_ids=ids, use_cache=False).logits
            head = model.get_output_embeddings()
            same = bool(picked) and torch.equal(head(picked[0][None]).to(logits), logits)
        told = "are" if same else "are not"
        known.bare_head = Answer(same, f"tried: logits {told} what the output head returns")
    return known.bare_head
