"""All strengths tuned together: a few epochs of Adam over the search documents.

A step takes one batch of every task, and tasks count alike. The scores of a batch meet in the loss
(its label prior is a mean over them), so they are computed first, in pieces and by all processes;
the loss's derivative by each score is then sent back through the piece it came from. What decides
the next step is all in :class:`State`, so training goes on from one as if it had never stopped.
"""

from __future__ import annotations

import base64
import math
import os
import random
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from act_harness.errors import InfrastructureError
from act_harness.search.compute.objective import has_fixed_choices, objective_loss
from act_harness.search.compute.read_rows import batches_of, forward_cost, tokens_of

if TYPE_CHECKING:
    from act_harness.search.compute.gradient import StrengthenedModel
    from act_harness.search.documents import Document
    from act_harness.search.recipe_sections import GradientMethod
    from act_harness.support.processes import Processes

__all__ = ["State", "Training", "most_in_a_step", "score_rows", "scored", "scored_together"]

_START = 0.1
"""Standard deviation of a random restart's first strengths; the first run starts at 0."""


@dataclass
class State:
    """Everything that decides the next step."""

    theta: Tensor  # (S, L, H) logarithms of the strengths
    log_temperature: Tensor  # (tasks,)
    optimizer: torch.optim.Adam
    step: int = 0

    def to_json(self) -> dict[str, Any]:
        """Return it as plain values, bit for bit."""
        return {
            "step": self.step,
            "tensors": {name: _encoded(tensor) for name, tensor in self._tensors().items()},
        }

    def restore(self, stored: Mapping[str, Any]) -> None:
        """Become the state that :meth:`to_json` wrote."""
        self.step = int(stored["step"])
        with torch.no_grad():
            for place in (self.theta, self.log_temperature):
                self.optimizer.state[place] = {
                    "step": torch.tensor(float(self.step)),
                    "exp_avg": torch.zeros_like(place),
                    "exp_avg_sq": torch.zeros_like(place),
                }
            for name, tensor in self._tensors().items():
                tensor.copy_(_decoded(stored["tensors"][name], tensor))

    def _tensors(self) -> dict[str, Tensor]:
        found = {"theta": self.theta, "log_temperature": self.log_temperature}
        for name, place in list(found.items()):
            for moment in ("exp_avg", "exp_avg_sq"):
                found[f"{name}/{moment}"] = self.optimizer.state[place][moment]
        return found


class Training:
    """The search documents of all tasks, and the steps over them."""

    def __init__(
        self,
        model: StrengthenedModel,
        tasks: Mapping[str, Sequence[Document]],
        settings: GradientMethod,
        *,
        objective: str,
        seed: int,
        tokens: int,
        processes: Processes,
        grid: Mapping[int, Sequence[int]],
    ) -> None:
        """Store what stays the same over all runs.

        Args:
            model: opened.
            tasks: search documents by task.
            settings: epochs, rate, signs, documents of a batch.
            objective: ``corrected``, ``margin`` or ``entropy``.
            seed: of the order of documents and of restarts.
            tokens: padded tokens of a forward.
            processes: that share the documents of each batch.
            grid: heads that may get a strength, by layer.
        """
        self.model, self.tasks, self.settings = model, tasks, settings
        self.objective, self.seed, self.tokens, self.processes = objective, seed, tokens, processes
        self.fixed = {task: has_fixed_choices(found) for task, found in tasks.items()}
        self.parts = {task: _parts(found, settings) for task, found in tasks.items()}
        self.steps = max(self.parts.values())
        """Of an epoch."""
        self.allowed = torch.zeros(model.shape[1:], dtype=model.dtype, device=model.device)
        for layer, heads in grid.items():
            self.allowed[layer, list(heads)] = 1.0

    def start(self, restart: int) -> State:
        """Return the state before the first step: no strength, or small random ones."""
        device, dtype = self.model.device, self.model.dtype
        theta = torch.zeros(self.model.shape, dtype=dtype)
        if restart:
            source = torch.Generator().manual_seed(self.seed * 1009 + restart)
            theta = _START * torch.randn(theta.shape, generator=source, dtype=dtype)
        theta = self._projected(theta.to(device) * self.allowed).requires_grad_()
        temperature = torch.zeros(len(self.tasks), dtype=dtype, device=device, requires_grad=True)
        return State(theta, temperature, torch.optim.Adam([theta, temperature]))

    def epoch(self, state: State, number: int, *, restart: int, penalty: float) -> float:
        """Take the steps of one epoch; return the mean loss, without the penalty.

        Args:
            state: changed in place.
            number: of the epoch, from 0: with seed and restart it decides the order of documents.
            restart: number of the run.
            penalty: factor on the sum of the strengths' sizes.
        """
        order = {
            task: self._order(task, f"{self.seed}/{restart}/{number}/{task}") for task in self.tasks
        }
        total = 0.0
        for step in range(self.steps):
            batches = {task: order[task][step % self.parts[task]] for task in self.tasks}
            total += self._step(state, batches, penalty)
        return total / self.steps

    def rate(self, step: int) -> float:
        """Return the step size: a cosine from the settings' rate to 0 over all steps."""
        share = step / (self.steps * self.settings.epochs)
        return self.settings.rate * 0.5 * (1 + math.cos(math.pi * share))

    def _order(self, task: str, key: str) -> list[list[int]]:
        numbers = list(range(len(self.tasks[task])))
        # a string seed: the same order on every version and machine
        random.Random(key).shuffle(numbers)  # noqa: S311 - no secret
        parts = self.parts[task]
        return [numbers[n::parts] for n in range(parts)]

    def _step(self, state: State, batches: Mapping[str, list[int]], penalty: float) -> float:
        state.optimizer.param_groups[0]["lr"] = self.rate(state.step)
        state.theta.grad = torch.zeros_like(state.theta)
        state.log_temperature.grad = torch.zeros_like(state.log_temperature)
        total = math.fsum(self._tasks(state, batches, some) for some in self._groups(batches))
        slope = state.theta.grad.clone()
        self.processes.sum_together(slope)
        slope += penalty * state.theta.detach().sign()
        state.theta.grad = slope * self.allowed
        state.optimizer.step()
        state.step += 1
        with torch.no_grad():
            state.theta.copy_(self._projected(state.theta))
        if not (math.isfinite(total) and bool(torch.isfinite(state.theta).all())):
            raise InfrastructureError(
                f"the loss of step {state.step} is not finite; check the model's weights and the "
                "dtype, or lower the rate"
            )
        return total

    def _groups(self, batches: Mapping[str, list[int]]) -> list[list[str]]:
        """Return tasks whose batches are scored together: as many as one forward takes.

        What a forward kept for its backward is held until the scores of all its tasks are there, so
        a group is about one forward. A small model's forwards of one task each are mostly waiting.
        """
        sizes = {
            task: sum(tokens_of(self.tasks[task][n]) for n in some)
            for task, some in batches.items()
        }
        return scored_together(sizes, tokens=self.tokens)

    def _tasks(self, state: State, batches: Mapping[str, list[int]], tasks: Sequence[str]) -> float:
        """Add some tasks' gradients to the state's; return their share of the loss."""
        documents = [self.tasks[task][n] for task in tasks for n in batches[task]]
        with self.products():
            pieces, values = scored(
                self.model, documents, state.theta, tokens=self.tokens, processes=self.processes
            )
        by_score = torch.zeros_like(values)
        total, row = 0.0, 0
        for task in tasks:
            rows = slice(row, row + len(batches[task]))
            row = rows.stop
            loss, by_score[rows] = self._loss(state, task, documents[rows], values[rows])
            total += loss
        for numbers, piece in pieces:
            slope = by_score[list(numbers), : piece.shape[1]]
            with _deterministic(self.model.device), self.products():
                piece.backward(torch.where(torch.isfinite(piece.detach()), slope, 0.0))
        return total

    def products(self) -> AbstractContextManager[None]:
        """Return what tuning and choosing compute in: TF32 where the recipe and device have it."""
        return _tf32() if self.settings.tf32 and self.model.device.type == "cuda" else nullcontext()

    def _loss(
        self, state: State, task: str, documents: Sequence[Document], scores: Tensor
    ) -> tuple[float, Tensor]:
        """Return a task's share of the loss, and its derivative by each score."""
        number = list(self.tasks).index(task)
        scores = scores.detach().requires_grad_()
        loss = objective_loss(
            scores,
            torch.tensor([document.right for document in documents], device=scores.device),
            objective=self.objective,
            fixed=self.fixed[task],
            log_temperature=state.log_temperature[number],
        ) / len(self.tasks)
        learned = [scores] if self.objective == "entropy" else [scores, state.log_temperature]
        by_score, *by_temperature = torch.autograd.grad(loss, learned)
        if by_temperature and state.log_temperature.grad is not None:
            state.log_temperature.grad += by_temperature[0]
        return float(loss.detach()), by_score

    def _projected(self, theta: Tensor) -> Tensor:
        """Return strengths with the signs that the settings allow."""
        signs = self.settings.signs
        if signs == "both":
            return theta
        return theta.clamp(max=0.0) if signs == "damp" else theta.clamp(min=0.0)


def _parts(documents: Sequence[Document], settings: GradientMethod) -> int:
    """Return how many batches a task's documents make."""
    return max(1, len(documents) // settings.batch)


def most_in_a_step(documents: Sequence[Document], settings: GradientMethod) -> int:
    """Return how many of a task's documents a step takes: what is left over is dealt out too."""
    return math.ceil(len(documents) / _parts(documents, settings))


def scored_together(sizes: Mapping[str, int], *, tokens: int) -> list[list[str]]:
    """Group tasks, in their order, up to a number of tokens; a larger one stands alone.

    Args:
        sizes: tokens by task.
        tokens: most of a group.
    """
    groups: list[list[str]] = []
    held = 0
    for task, own in sizes.items():
        if groups and held + own <= tokens:
            groups[-1].append(task)
            held += own
        else:
            groups.append([task])
            held = own
    return groups


def score_rows(
    model: StrengthenedModel,
    documents: Sequence[Document],
    theta: Tensor | None,
    *,
    tokens: int,
    processes: Processes,
) -> list[list[float]]:
    """Score documents without a gradient: a row each, as long as its choices, to six digits."""
    with torch.no_grad():
        _, values = scored(model, documents, theta, tokens=tokens, processes=processes)
    return [
        [round(score, 6) for score in row[: len(document.requests)]]
        for row, document in zip(values.tolist(), documents, strict=True)
    ]


def scored(
    model: StrengthenedModel,
    documents: Sequence[Document],
    theta: Tensor | None,
    *,
    tokens: int,
    processes: Processes,
) -> tuple[list[tuple[tuple[int, ...], Tensor]], Tensor]:
    """Score documents, each process its share.

    Returns:
        This process's pieces, (places among the documents, scores (n, choices) with their graph);
        and the scores of all processes, (documents, choices) without a graph, minus infinity where
        a choice is missing.
    """
    batches = batches_of(
        documents, tokens=tokens, device=model.device,
        forward=forward_cost(model.device, model.hidden_size), processes=processes.count,
    )  # fmt: skip
    mine = batches[processes.rank :: processes.count]
    pieces = [(batch.documents, model.scores(batch, theta)) for batch in mine]
    counts = torch.tensor([len(one.requests) for one in documents], device=model.device)
    values = torch.zeros(len(documents), int(counts.max()), dtype=model.dtype, device=model.device)
    for numbers, piece in pieces:
        values[list(numbers), : piece.shape[1]] = piece.detach().clamp(min=-1e30)
    processes.sum_together(values)
    missing = torch.arange(values.shape[1], device=model.device) >= counts[:, None]
    return pieces, values.masked_fill(missing, -torch.inf)


@contextmanager
def _tf32() -> Iterator[None]:
    """Let CUDA's products of float32 matrices round their factors to ten bits."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


@contextmanager
def _deterministic(device: torch.device) -> Iterator[None]:
    """Take backwards that add up in one order: a continued search must find the same.

    For the backward alone, and strictly: where torch only warns, its fused attention keeps the
    backward that is not deterministic.
    """
    if device.type != "cuda":
        yield
        return
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # torch asks for it
    before = torch.are_deterministic_algorithms_enabled()
    warns = torch.is_deterministic_algorithms_warn_only_enabled()
    fills = torch.utils.deterministic.fill_uninitialized_memory  # type: ignore[attr-defined]
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before, warn_only=warns)
        torch.utils.deterministic.fill_uninitialized_memory = fills  # type: ignore[attr-defined]


def _encoded(tensor: Tensor) -> str:
    """Return the values' bytes, little endian."""
    array = tensor.detach().cpu().numpy()
    return base64.b64encode(array.astype(array.dtype.newbyteorder("<")).tobytes()).decode()


def _decoded(text: str, like: Tensor) -> Tensor:
    width = "<f8" if like.dtype == torch.float64 else "<f4"
    array = np.frombuffer(base64.b64decode(text), dtype=width).reshape(tuple(like.shape))
    return torch.from_numpy(array.astype(width[1:]).copy())
