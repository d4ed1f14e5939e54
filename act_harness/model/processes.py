"""Several processes behind one model: who takes which documents, and all answers joined."""

from __future__ import annotations

import logging
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from lm_eval.models.huggingface import HFLM

from act_harness.attention.facts import base_model
from act_harness.attention.parallel import HeadGroup, check_shared
from act_harness.attention.placement import input_device
from act_harness.support.launcher import too_few_documents
from act_harness.support.processes import Processes

if TYPE_CHECKING:
    from collections.abc import Iterator

    from act_harness.attention.counters import CalibrationCounters

__all__ = ["ProcessesMixin"]

_logger = logging.getLogger("lm_eval.models.act_harness")  # lm-eval shows its own loggers only


class ProcessesMixin(HFLM):
    """Deals documents out to processes, and brings together what they found."""

    counters: CalibrationCounters
    head_group: HeadGroup
    processes: Processes
    requests: list[int]
    """Answered by each process since the arm was chosen."""

    def share_work(self, processes: Processes) -> None:
        """Have lm-eval deal out documents to these processes.

        HFLM counts the GPUs of this machine instead, and takes a process's number on it for its
        number among all. Processes that share one model's heads (``tp_plan``) are one to lm-eval:
        all of them compute every request.
        """
        self.head_group = check_shared(self.model)
        self.processes = Processes() if self.head_group.is_split else processes
        self._rank, self._world_size = self.processes.rank, self.processes.count
        if self.head_group.is_split:
            self._device = input_device(base_model(self.model))  # HFLM numbers CPUs too
        accelerator = getattr(self, "accelerator", None)
        if accelerator is not None:
            self._device = accelerator.device

    @contextmanager
    def alone(self) -> Iterator[None]:
        """Let this process ask the model inside the block what the others do not ask."""
        before = self.processes
        self.share_work(Processes(before.rank))
        try:
            yield
        finally:
            self.share_work(before)

    def all_gather(self, tensor: torch.Tensor) -> torch.Tensor:
        """Return what each process gave: lm-eval asks how many requests they have of a task.

        Raises:
            InputError: one of them has none; lm-eval would wait for it for ever.
        """
        found = self.processes.gather(tensor.cpu())
        if tensor.ndim == 0 and not all(map(bool, found)):
            without = next(n for n, one in enumerate(found) if not one)
            raise too_few_documents(self.processes.count, without=without)
        return torch.stack(found) if tensor.ndim == 0 else torch.cat(found)

    def gather_object(self, obj: Any, dst: int = 0) -> list[Any] | None:  # noqa: ANN401 - as HFLM
        """Return in process ``dst`` what each process gave, and None in the others."""
        found = self.processes.gather(obj)
        return found if self.rank == dst else None

    def barrier(self) -> None:
        """Wait until all processes are here."""
        self.processes.meet()

    @property
    def leads(self) -> bool:
        """Whether this process writes and says what a run comes to: one of all that run it."""
        return bool(self.rank == 0 and self.head_group.rank == 0)

    def _share_counters(self, requests: int) -> None:
        """Join the counters of all processes (the results are written by the first alone)."""
        gathered = self.processes.gather((self.counters, requests))
        for other, _ in gathered:
            self.counters.merge(other)
        taken = [count for _, count in gathered]
        if self.world_size > 1 and self.leads:
            _logger.info("%d processes took %s requests", len(taken), ", ".join(map(str, taken)))
        before = self.requests or [0] * len(taken)
        self.requests = [sum(both) for both in zip(before, taken, strict=True)]
