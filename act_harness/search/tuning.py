"""All runs of a gradient search, and what ``verify`` chooses among them.

The choices are the penalty, the run, the epoch to stop after and the number of heads that keep
their strength. The ledger keeps an epoch's state and verify scores a unit, so that a search which
was killed goes on behind its last whole epoch.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import torch

from act_harness.search.choose.effects import TaskScores
from act_harness.search.choose.sets import Outcome
from act_harness.search.compute.objective import has_fixed_choices, objective_loss
from act_harness.search.compute.read_rows import tokens_of
from act_harness.search.compute.training import State, Training, score_rows, scored_together

if TYPE_CHECKING:
    from act_harness.search.choose.sets import Reading
    from act_harness.search.compute.gradient import StrengthenedModel
    from act_harness.search.documents import Document, TaskDocuments
    from act_harness.search.ledger import SearchLedger
    from act_harness.search.progress import Progress
    from act_harness.search.recipe import Recipe
    from act_harness.support.processes import Processes

__all__ = ["Tuning", "looked_at", "reading_of", "short", "work_of_an_epoch"]

_COUNTED = 2.0
"""Forwards that an artifact counts a backward as, as is usual where weights are trained."""

_SCORED = 4
"""Forwards, about, of documents that are scored together without a gradient."""

_BACKWARD = 1.0
"""Forwards that it costs here: frozen weights need the derivative by their inputs alone."""

Grid = dict[int, tuple[int, ...]]


_SPLITS: tuple[Literal["search"], Literal["verify"]] = ("search", "verify")


class _Run(NamedTuple):
    """One training run."""

    penalty: float
    restart: int


class _Verified(NamedTuple):
    """How strengths do on verify; larger is better, in this order."""

    value: float
    """Of what is chosen by: accuracy, corrected accuracy, or minus the entropy."""
    loss: float
    """Minus the objective's loss there, without a temperature."""


@dataclass
class Tuning:
    """The parts of a search that share what it was given."""

    recipe: Recipe
    documents: Sequence[TaskDocuments]
    ledger: SearchLedger
    processes: Processes
    progress: Progress
    grid: Grid
    opened: StrengthenedModel
    tokens: int
    """Padded tokens of a forward."""
    phase: str = "train"
    """Of the progress bar."""
    history: list[dict[str, Any]] = field(default_factory=list)
    """Loss and verify figures by epoch, of every run."""

    def __post_init__(self) -> None:
        self.verify = {one.task: one.verify for one in self.documents}
        self.training = Training(
            self.opened,
            {one.task: one.search for one in self.documents},
            self.recipe.gradient,
            objective=self.recipe.objective,
            seed=self.recipe.seed,
            tokens=self.tokens,
            processes=self.processes,
            grid=self.grid,
        )
        self._stock: dict[str, TaskScores] = {}
        self._passed: set[tuple[str, ...]] = set()
        self._sizes: dict[str, dict[str, int]] = {}
        """Tokens of each task's documents, by split: counted at the first look."""

    def runs(self) -> list[_Run]:
        """Return what is trained: every penalty, from every start."""
        settings = self.recipe.gradient
        return [_Run(p, n) for p in settings.penalties for n in range(settings.restarts)]

    def train(self) -> tuple[torch.Tensor | None, dict[str, Any]]:
        """Train all runs; return the strengths of the best epoch, None if none improves.

        With them, what they are worth on verify, and which run and epoch they are of.
        """
        untouched = self.verified("untouched", None)
        best, kept = untouched, None
        found: dict[str, Any] = {"run": None, "epoch": 0}
        for run in self.runs():
            state = self.training.start(run.restart)
            for epoch in range(self.recipe.gradient.epochs):
                value = self._epoch(run, epoch, state)
                if value and value.value > untouched.value + 1e-12 and value > best:
                    best, kept = value, state.theta.detach().clone()
                    found = {"run": run._asdict(), "epoch": epoch + 1}
        self.phase = "choose"
        values = {"untouched": round(untouched.value, 6), "best": best.value}
        return kept, {**values, **found}

    def looks(self, epoch: int) -> bool:
        """Say whether an epoch is measured on verify; see :func:`looked_at`."""
        return epoch in looked_at(self.recipe, self.documents)

    def _epoch(self, run: _Run, epoch: int, state: State) -> _Verified | None:
        """Take one epoch, or read it off the ledger; measure it on verify where it is looked at."""
        key, passed = ("epoch", *run, epoch), self.progress.known
        rate = self.training.rate(state.step)
        if key not in self.ledger:
            loss = self.training.epoch(state, epoch, restart=run.restart, penalty=run.penalty)
            if self.processes.rank == 0:
                self.ledger.add(key, {"loss": loss, **state.to_json()})
            passed = self.progress.done
        passed("train")(work_of_an_epoch(self.documents, checkpointing=self.opened.checkpointing))
        self.processes.read_together(self.ledger)
        unit = self.ledger.get(key)
        state.restore(unit)
        self.progress.figures(f"epoch {epoch + 1}, loss {unit['loss']:.3f}, rate {rate:.3f}")
        value = None
        if self.looks(epoch):
            value = self.verified(f"epoch/{run.penalty!r}/{run.restart}/{epoch}", state.theta)
        self.history.append(
            {
                **run._asdict(),
                "epoch": epoch + 1,
                "loss": short(unit["loss"]),
                "verify": short(value.value) if value else None,
                "verify_loss": short(-value.loss) if value else None,
                "sum": short(float(state.theta.detach().abs().sum())),
            }
        )
        if value:
            self.progress.figures(
                f"epoch {epoch + 1}, loss {unit['loss']:.3f}, rate {rate:.3f}, "
                f"verify {value.value:.3f}"
            )
        return value

    def scores(
        self, name: str, split: str, theta: torch.Tensor | None
    ) -> dict[str, list[list[float]]]:
        """Return the scores of a split by task, from the ledger where it has them.

        Nothing is kept for a backward, so tasks share forwards up to several times a step's tokens.
        Those that share them do so again where the ledger has some of them only (killed in
        between): other batches would round otherwise.
        """
        documents = {one.task: one.of(split) for one in self.documents}  # type: ignore[arg-type]
        keys = {task: ("strengths", split, name, task) for task in documents}
        missing = [task for task in documents if keys[task] not in self.ledger]
        for task in documents:
            if task not in missing:
                self._pass(keys[task], len(documents[task]), self.progress.known)
        if missing and split not in self._sizes:
            self._sizes[split] = {
                task: sum(map(tokens_of, found)) for task, found in documents.items()
            }
        sizes = self._sizes[split] if missing else {}
        for group in scored_together(sizes, tokens=_SCORED * self.tokens):
            if not set(missing).intersection(group):
                continue
            together = [document for task in group for document in documents[task]]
            with self.training.products():
                rows = iter(
                    score_rows(
                        self.opened, together, theta, tokens=self.tokens, processes=self.processes
                    )
                )
            for task in group:
                scores = [next(rows) for _ in documents[task]]
                if task not in missing:
                    continue
                if self.processes.rank == 0:
                    self.ledger.add(keys[task], {"scores": scores})
                self._pass(keys[task], len(scores), self.progress.done)
        self.processes.read_together(self.ledger)
        return {task: self.ledger.get(key)["scores"] for task, key in keys.items()}

    def _pass(
        self, key: tuple[str, ...], count: int, passed: Callable[[str], Callable[[int], object]]
    ) -> None:
        """Tell the progress bar of documents; asked for again they cost nothing."""
        if key not in self._passed:
            self._passed.add(key)
            passed(self.phase)(count)

    def verified(self, name: str, theta: torch.Tensor | None) -> _Verified:
        """Return how strengths do on verify."""
        found = self.scores(name, "verify", theta)
        loss = math.fsum(self._loss(task, rows) for task, rows in found.items()) / len(found)
        if self.recipe.objective == "entropy":
            return _Verified(-loss, -loss)
        if not self._stock:
            for task, rows in self.scores("untouched", "verify", None).items():
                self._stock[task] = self._read(self.verify[task], rows)
        outcome = Outcome(
            stock={task: stock.arm(stock.scores) for task, stock in self._stock.items()},
            arms={
                task: self._stock[task].arm(self._read(self.verify[task], rows).scores)
                for task, rows in found.items()
            },
            spreads={task: stock.spread for task, stock in self._stock.items()},
        )
        return _Verified(outcome.score(reading_of(self.recipe)), -loss)

    def _read(self, documents: Sequence[Document], rows: list[list[float]]) -> TaskScores:
        return TaskScores.of(documents, rows, objective=self.recipe.objective)

    def _loss(self, task: str, rows: list[list[float]]) -> float:
        documents = self.verify[task]
        width = max(map(len, rows))
        table = [[*row, *[-math.inf] * (width - len(row))] for row in rows]
        return float(
            objective_loss(
                torch.tensor(table, dtype=torch.float64),
                torch.tensor([document.right for document in documents]),
                objective=self.recipe.objective,
                fixed=has_fixed_choices(documents),
            )
        )

    def choose(
        self, theta: torch.Tensor, value: float
    ) -> tuple[torch.Tensor, list[dict[str, Any]]]:
        """Return the strengths with the number of heads that does best on verify, and the trace.

        Args:
            theta: strengths of the best epoch.
            value: what all of them are worth on verify.
        """
        self.phase = "choose"
        size = theta.abs().amax(dim=0)  # (L, H): of a head's strengths, the larger
        order = size.flatten().argsort(descending=True, stable=True)
        every = int((size > 0).sum())
        tried, best, kept = [], -math.inf, theta
        for count in (*(some for some in self.recipe.gradient.sizes if some < every), every):
            mask = torch.zeros_like(size).flatten()
            mask[order[:count]] = 1.0
            some = theta * mask.view_as(size)
            found = self.verified(f"heads/{count}", some).value if count < every else value
            tried.append({"heads": count, "value": short(found)})
            if found > best + 1e-12:
                best, kept = found, some
        return kept, tried

    def baseline(self) -> dict[str, Any]:
        """Return the untouched model's figures on the search split."""
        found = {}
        for one in self.documents:
            rows = self.scores("untouched", "search", None)[one.task]
            task = self._read(one.search, rows)
            arm = task.arm(task.scores)
            found[one.task] = {
                "n": len(task.right),
                "accuracy": round(arm.accuracy, 6),
                "corrected_accuracy": None if arm.corrected is None else round(arm.corrected, 6),
                "margin": short(float(arm.margins.mean())),
                "margin_spread": short(task.spread),
            }
        return found

    def cost(self, tried: int) -> dict[str, float]:
        """Return how many forwards of a document the search needed, by split."""
        runs, again = len(self.runs()), 1.0 if self.opened.checkpointing else 0.0
        looks = len(looked_at(self.recipe, self.documents))
        return {
            "search": 1 + runs * self.recipe.gradient.epochs * (1 + again + _COUNTED),
            "verify": 1.0 + runs * looks + max(0, tried - 1),  # all heads of an epoch were known
            "backward_counted_as": _COUNTED,
        }


def looked_at(recipe: Recipe, documents: Sequence[TaskDocuments]) -> list[int]:
    """Return the epochs that verify is measured after: the last one, and some before it.

    They are at equal distances, so that looking costs no more than half of what training does.
    """
    searched, verify = (sum(len(one.of(split)) for one in documents) for split in _SPLITS)
    every = math.ceil(2 * verify / ((1 + _BACKWARD) * searched))
    last = recipe.gradient.epochs - 1
    return list(range(last, -1, -every))[::-1]


def work_of_an_epoch(documents: Sequence[TaskDocuments], *, checkpointing: bool) -> int:
    """Return what an epoch costs, in forwards of a document."""
    again = 1 if checkpointing else 0
    return round((1 + again + _BACKWARD) * sum(len(one.search) for one in documents))


def reading_of(recipe: Recipe) -> Reading:
    """Return what strengths are chosen by on verify."""
    if recipe.gradient.criterion == "margin":
        return "margin"
    return "accuracy" if recipe.objective == "margin" else "objective"


def short(value: float) -> float:
    """Return a number as records have it: six digits."""
    return float(f"{value:.6g}")
