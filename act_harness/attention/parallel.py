"""A model whose heads are split over processes (``tp_plan``), and which of them are in this one.

Query, key and value projections are cut by heads, so a process attends with its own heads and sees
nothing of the others'; only after the output projection are all added up. An artifact, the records
of a forward and whatever else is about heads number them over the whole model: here is what turns
one into the other. A model in one process holds all of its heads, and is asked in the same way.
"""

from __future__ import annotations

import math
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeVar

import torch

from act_harness.attention.dimensions import of_layers
from act_harness.attention.facts import base_model, process_count
from act_harness.errors import InfrastructureError, UnsupportedModelError
from act_harness.support.processes import Processes

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from torch import Tensor, nn
    from transformers import PretrainedConfig

__all__ = ["HeadGroup", "HeldHeads", "check_even_share", "check_shared", "refuse_parts"]

_Any = TypeVar("_Any")


@dataclass(frozen=True)
class HeldHeads:
    """The query heads of one layer that are in this process, a range of the model's."""

    first: int
    """Number of the first of them."""
    count: int
    total: int
    """Heads of the layer in all processes together."""
    counted: bool = True
    """Whether this process reports them: where all hold all heads, only the first one does."""


@dataclass(frozen=True)
class HeadGroup:
    """The processes that hold one model together; a whole model is a group of one."""

    rank: int = 0
    size: int = 1
    _group: Any = None

    @classmethod
    def of(cls, model: nn.Module) -> HeadGroup:
        """Return the group of a loaded model.

        Raises:
            UnsupportedModelError: its processes share more than heads, or cannot be found.
        """
        model = base_model(model)
        count = process_count(model)
        if count == 1:
            return cls()
        kind = type(model).__name__
        mesh: Any = getattr(model, "_device_mesh", None)
        if mesh is None:
            raise UnsupportedModelError(
                f"{kind} says that {count} processes hold its heads and not which; load it "
                "with from_pretrained(..., tp_plan='auto') under torchrun"
            )
        heads = mesh["tp"] if mesh.ndim > 1 else mesh
        if heads.size() != mesh.size():
            raise UnsupportedModelError(
                f"{kind} is spread over {mesh.size()} processes in several ways, {heads.size()} of "
                "which share its heads; calibration works with tp_plan alone"
            )
        return cls(heads.get_local_rank(), heads.size(), heads.get_group())

    @property
    def is_split(self) -> bool:
        """Whether other processes hold a part of the model."""
        return self.size > 1

    def held(self, counts: Mapping[int, int], config: PretrainedConfig) -> dict[int, HeldHeads]:
        """Return the heads in this process by layer. All processes must ask at the same time.

        Args:
            counts: query heads that this process was seen to attend with, by layer.
            config: the decoder's.

        Raises:
            UnsupportedModelError: heads of a layer are missing, or in more than one process.
        """
        if not self.is_split:
            return {layer: HeldHeads(0, count, count) for layer, count in counts.items()}
        seen = self._all(dict(counts))
        configured = of_layers(config, "num_attention_heads")
        found = {}
        for layer, count in counts.items():
            parts = [one.get(layer, 0) for one in seen]
            total = configured[layer]
            if all(part == total for part in parts):  # its projections gather their output
                found[layer] = HeldHeads(0, count, total, counted=self.rank == 0)
            elif sum(parts) == total:
                found[layer] = HeldHeads(sum(parts[: self.rank]), count, total)
            else:
                raise UnsupportedModelError(
                    f"layer {layer} has {total} heads, of which {self.size} processes attend with "
                    f"{', '.join(map(str, parts))}; load the model with another tp_plan"
                )
        return found

    def summed(self, values: Tensor) -> Tensor:
        """Return the sum of a tensor over the processes; each gets the same bits."""
        if self.is_split:
            values = values.contiguous()  # as NCCL asks
            torch.distributed.all_reduce(values, group=self._group)
        return values

    def least(self, value: int) -> int:
        """Return the smallest number among the processes."""
        return min(self._all(value))

    def as_first(self, value: _Any) -> _Any:
        """Return what the first process has there."""
        return self._all(value)[0]

    @contextmanager
    def out_of_memory_together(self) -> Iterator[None]:
        """End where memory runs out: the others would wait for this one, which tries less.

        Raises:
            InfrastructureError: memory ran out in a process that others wait for.
        """
        try:
            yield
        except torch.OutOfMemoryError as error:
            if not self.is_split:
                raise
            raise InfrastructureError(
                f"out of memory in process {self.rank} of {self.size} that share one model, which "
                "cannot go on with less by itself; give a smaller batch_size, or more processes"
            ) from error

    def _all(self, value: _Any) -> list[_Any]:
        return Processes(self.rank, self.size, self._group).gather(value)


def check_even_share(config: PretrainedConfig, size: int, kind: str) -> None:
    """Refuse numbers of processes that would cut heads apart.

    Args:
        config: of a decoder.
        size: processes.
        kind: the model's name, for the message.

    Raises:
        UnsupportedModelError: query or key heads of a layer cannot be shared evenly.
    """
    names = ("num_attention_heads", "num_key_value_heads")
    for queries, keys in zip(*(of_layers(config, name) for name in names), strict=True):
        if not queries or not (queries % size or (keys or queries) % size):
            continue
        common = math.gcd(queries, keys or queries)
        fitting = [str(number) for number in range(2, common + 1) if common % number == 0]
        instead = f"start {' or '.join(fitting)} processes, or " if fitting else ""
        raise UnsupportedModelError(
            f"{kind} has {queries} query and {keys or queries} key heads in a layer, which "
            f"{size} processes cannot share evenly; {instead}load it without tp_plan"
        )


def check_shared(model: nn.Module) -> HeadGroup:
    """Return the group of a loaded model, whose processes can compute it together.

    Raises:
        UnsupportedModelError: heads are cut apart, or transformers joins its logits wrongly.
    """
    model, group = base_model(model), HeadGroup.of(model)
    if not group.is_split:
        return group
    kind = type(model).__name__
    config: Any = model.config
    config = config.get_text_config()
    check_even_share(config, group.size, kind)
    whose: Any = model
    head: Any = whose.get_output_embeddings()
    weight: Any = getattr(head, "weight", None)
    whole = not hasattr(weight, "placements") and len(weight) == config.vocab_size
    if whole and getattr(head, "_is_hooked", False):
        # LFM2 in 5.23: the plan has the head alone, whose tied embeddings are not cut
        raise UnsupportedModelError(
            f"{kind}'s plan joins what {group.size} processes have of its output head, and its "
            "weight, tied to the embeddings, is whole in each: transformers' own logits are "
            "wrong; load it without tp_plan"
        )
    return group


def refuse_parts(model: nn.Module, what: str) -> None:
    """Refuse a model whose heads are split over processes, for work that needs all of them.

    Args:
        model: a loaded model.
        what: the work.

    Raises:
        UnsupportedModelError: its heads are split.
    """
    size = process_count(model)
    if size > 1:
        raise UnsupportedModelError(
            f"{type(base_model(model)).__name__} was loaded with tp_plan over {size} processes, "
            f"each of which has a part of the heads, and {what} needs all of them in one; load it "
            "without tp_plan"
        )
