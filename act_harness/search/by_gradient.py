"""One gradient search from recipe to artifact: train, choose on verify, judge.

Strengths of all heads are tuned together on the split ``search``
(:mod:`act_harness.search.compute.training`). ``verify`` chooses the penalty, the run, the epoch to
stop after and the number of heads that keep their strength, largest first; ``judge`` says what came
of it through the product's own scorer. The ledger keeps an epoch's state and verify scores a unit,
so that a search which was killed goes on behind its last whole epoch.
"""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch

from act_harness.artifact import Artifact, ModelFacts
from act_harness.attention import attach, model_facts
from act_harness.attention.placement import input_device
from act_harness.calibration import HeadStrength
from act_harness.errors import RecipeError
from act_harness.search.choose.effects import TaskScores
from act_harness.search.choose.judgement import judged
from act_harness.search.choose.select import Selection
from act_harness.search.choose.sets import ModelSets, Outcome, SetMeasurement, make_heads
from act_harness.search.compute.gradient import StrengthenedModel
from act_harness.search.compute.measure import Work
from act_harness.search.compute.objective import (
    check_documents,
    has_fixed_choices,
    objective_loss,
)
from act_harness.search.compute.read_rows import tokens_of
from act_harness.search.compute.training import State, Training, scored
from act_harness.search.ledger import SearchLedger
from act_harness.search.processes import Processes
from act_harness.search.progress import Phase, Progress
from act_harness.search.recipe import Controls
from act_harness.search.record import (
    SearchResult,
    content_sha256,
    ledger_folder,
    set_tokens,
    split_record,
)
from act_harness.support import provenance
from act_harness.support.interruption import saved

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from act_harness.search.choose.sets import Reading
    from act_harness.search.documents import Document, TaskDocuments
    from act_harness.search.recipe import Recipe

__all__ = ["run_by_gradient"]

_BACKWARD = 2.0
"""Forwards that a backward is counted as; with frozen weights it is rather one."""

Grid = dict[int, tuple[int, ...]]


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
class _GradientSearch:
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

    def runs(self) -> list[_Run]:
        """Return what is trained: every penalty, from every start."""
        settings = self.recipe.gradient
        return [_Run(p, n) for p in settings.penalties for n in range(settings.restarts)]

    def train(self) -> tuple[torch.Tensor | None, dict[str, Any]]:
        """Train all runs; return the strengths of the best epoch, None if none improves."""
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
        return kept, {"untouched": round(untouched.value, 6), **found}

    def looks(self, epoch: int) -> bool:
        """Say whether an epoch is measured on verify: that is to cost no more than training."""
        searched, verify = (
            sum(map(len, tasks.values())) for tasks in (self.training.tasks, self.verify)
        )
        every = math.ceil(verify / ((1 + _BACKWARD) * searched))
        left = self.recipe.gradient.epochs - 1 - epoch
        return left % every == 0

    def _epoch(self, run: _Run, epoch: int, state: State) -> _Verified | None:
        """Take one epoch, or read it off the ledger; measure it on verify where it is looked at."""
        key, passed = ("epoch", *run, epoch), self.progress.known
        rate = self.training.rate(state.step)
        if key not in self.ledger:
            loss = self.training.epoch(state, epoch, restart=run.restart, penalty=run.penalty)
            if self.processes.rank == 0:
                self.ledger.add(key, {"loss": loss, **state.to_json()})
            passed = self.progress.done
        self.processes.read_together(self.ledger)
        unit = self.ledger.get(key)
        state.restore(unit)
        value = None
        if self.looks(epoch):
            value = self.verified(f"epoch/{run.penalty!r}/{run.restart}/{epoch}", state.theta)
        self.history.append(
            {
                **run._asdict(),
                "epoch": epoch + 1,
                "loss": _short(unit["loss"]),
                "verify": _short(value.value) if value else None,
                "verify_loss": _short(-value.loss) if value else None,
                "sum": _short(float(state.theta.detach().abs().sum())),
            }
        )
        passed("train")(sum(len(one.search) for one in self.documents))
        self.progress.figures(
            f"epoch {epoch + 1}, loss {unit['loss']:.3f}, rate {rate:.3f}"
            + (f", verify {value.value:.3f}" if value else "")
        )
        return value

    @torch.no_grad()
    def scores(
        self, name: str, split: str, theta: torch.Tensor | None
    ) -> dict[str, list[list[float]]]:
        """Return the scores of a split by task, from the ledger where it has them."""
        found = {}
        for one in self.documents:
            documents = one.of(split)  # type: ignore[arg-type]
            key = ("strengths", split, name, one.task)
            if key not in self.ledger:
                _, values = scored(
                    self.opened, documents, theta, tokens=self.tokens, processes=self.processes,
                )  # fmt: skip
                rows = [
                    [round(score, 6) for score in row[: len(document.requests)]]
                    for row, document in zip(values.tolist(), documents, strict=True)
                ]
                if self.processes.rank == 0:
                    self.ledger.add(key, {"scores": rows})
            found[one.task] = key
        self.processes.read_together(self.ledger)
        return {task: self.ledger.get(key)["scores"] for task, key in found.items()}

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
        return _Verified(outcome.score(_reading(self.recipe)), -loss)

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

    def choose(self, theta: torch.Tensor) -> tuple[torch.Tensor, list[dict[str, Any]]]:
        """Return the strengths with the number of heads that does best on verify, and the trace."""
        size = theta.abs().amax(dim=0)  # (L, H): of a head's strengths, the larger
        order = size.flatten().argsort(descending=True, stable=True)
        every = int((size > 0).sum())
        counts = sorted({min(count, every) for count in (*self.recipe.gradient.sizes, every)} - {0})
        best, kept, tried = None, theta, []
        for count in counts:
            mask = torch.zeros_like(size).flatten()
            mask[order[:count]] = 1.0
            some = theta * mask.view_as(size)
            found = self.verified(f"heads/{count}", some)
            self.progress.done("choose")(1)
            tried.append({"heads": count, "value": _short(found.value)})
            if best is None or found.value > best + 1e-12:
                best, kept = found.value, some
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
                "margin": _short(float(arm.margins.mean())),
                "margin_spread": _short(task.spread),
            }
        return found

    def cost(self, tried: int) -> dict[str, float]:
        """Return how many forwards of a document the search needed, by split."""
        epochs = len(self.runs()) * self.recipe.gradient.epochs
        looks = sum(map(self.looks, range(self.recipe.gradient.epochs)))
        again = 1.0 if self.opened.checkpointing else 0.0
        return {
            "search": 1 + epochs * (1 + again + _BACKWARD),
            "verify": 1.0 + len(self.runs()) * looks + tried,
            "backward_counted_as": _BACKWARD,
        }


def run_by_gradient(
    recipe: Recipe,
    *,
    model: PreTrainedModel,
    documents: Sequence[TaskDocuments],
    facts: ModelFacts | None = None,
    ledgers: str | Path = "search/ledgers",
    output: str | Path | None = None,
    token_budget: int | None = None,
    show_progress: bool = True,
) -> SearchResult:
    """Tune the strengths of all heads, and write them as an artifact.

    The arguments and errors are those of :func:`act_harness.search.run.run_search`.
    """
    started = time.monotonic()
    recipe = recipe.model_copy(update={"calibration": recipe.tuned_calibration()})
    if "controls" not in recipe.model_fields_set:  # its controls are targets: random, last, gate
        recipe = recipe.model_copy(update={"controls": Controls(random_sets=0)})
    for one in documents:
        check_documents([*one.search, *one.verify], recipe.objective)
        if len(one.verify) < 2:
            raise RecipeError(
                f"task {one.task!r} has {len(one.verify)} verify documents, method 'gradient' "
                "needs at least 2; raise verify_samples or lower samples"
            )
    known = facts or model_facts(model)
    grid, processes, device = recipe.grid(known), Processes.here(), input_device(model)
    trial = Artifact(name=recipe.name, model=known, calibration=recipe.calibration, heads=grid)
    attach(model, trial, facts=known, engine=recipe.engine).detach()  # refuses what cannot be used
    recipe = recipe.on(device.type)
    folder, identity = ledger_folder(Path(ledgers), recipe, known, documents, device.type)
    identity = {**identity, "processes": processes.count}
    tokens = recipe.size("chunk_tokens")
    with (
        SearchLedger.opened(folder, identity=identity, rank=processes.rank) as ledger,
        saved(lambda: f"what was tuned is in {ledger.folder}"),
        Progress(_phases(recipe, documents), show=show_progress and not processes.rank) as progress,
    ):
        if ledger.found:
            progress.say(f"continuing {folder}: {ledger.found} units are there already")
        opened = StrengthenedModel(
            model, recipe.calibration, checkpointing=_checkpointing(recipe, model, documents)
        )
        with opened:
            search = _GradientSearch(
                recipe, documents, ledger, processes, progress, grid, opened, tokens
            )
            theta, trace = search.train()
            kept, tried = (None, []) if theta is None else search.choose(theta)
            content = _content(recipe, search, trace, tried, theta)
        selection, maps = _selection(recipe, kept)
        chosen = recipe.model_copy(update={"strengths": maps})
        content["rule"]["order"] = [list(place[:2]) for place in selection.places]
        content["judgement"] = _judgement(
            chosen, selection, model, known, documents, search,
            token_budget or set_tokens(device.type),
        )  # fmt: skip
    heads, strengths = make_heads(selection.places, chosen)
    seconds = time.monotonic() - started
    content["run"] = {
        "seconds": round(seconds, 1),
        "device": provenance.describe_device(str(device)),
        "processes": processes.count,
        "units_from_ledger": ledger.found,
        "ledger": folder.name,
    }
    artifact = Artifact(
        name=recipe.name, model=known, calibration=recipe.calibration, heads=heads,
        strengths=strengths, search=content,
        provenance=provenance.collect(seed=recipe.seed, device=str(device)).to_json(),
    )  # fmt: skip
    content["content_sha256"] = content_sha256(artifact)
    artifact = artifact.model_copy(update={"search": content})
    path = artifact.save(output) if output is not None and processes.rank == 0 else None
    return SearchResult(artifact, [], selection, Work(), seconds, path)


def _phases(recipe: Recipe, documents: Sequence[TaskDocuments]) -> dict[str, Phase]:
    searched, verify, judge = (
        sum(len(one.of(split)) for one in documents) for split in ("search", "verify", "judge")
    )
    settings = recipe.gradient
    epochs = settings.epochs * settings.restarts * len(settings.penalties)
    found = {
        "train": Phase("tuning", epochs * searched, 1 + _BACKWARD + verify / searched),
        "choose": Phase("choosing heads", len(settings.sizes) + 1, verify),
    }
    if judge:
        found["judge"] = Phase("judging", (2 + recipe.controls.random_sets) * judge)
    return found


def _checkpointing(
    recipe: Recipe, model: PreTrainedModel, documents: Sequence[TaskDocuments]
) -> bool:
    """Say whether layers are computed again in the backward; see the recipe's setting."""
    if recipe.gradient.checkpointing is not None:
        return recipe.gradient.checkpointing
    device = next(model.parameters()).device
    if device.type != "cuda":
        return False
    config = model.config.get_text_config()
    batches = (sorted(map(tokens_of, one.search))[-recipe.gradient.batch :] for one in documents)
    held = max(recipe.size("chunk_tokens"), *map(sum, batches))  # see Training's groups of tasks
    wide = getattr(config, "intermediate_size", None) or 4 * config.hidden_size
    kept = (16 * config.hidden_size + 4 * wide) * config.num_hidden_layers * model.dtype.itemsize
    return bool(2 * held * kept > torch.cuda.get_device_properties(device).total_memory)


def _reading(recipe: Recipe) -> Reading:
    if recipe.gradient.criterion == "margin":
        return "margin"
    return "accuracy" if recipe.objective == "margin" else "objective"


def _selection(
    recipe: Recipe, theta: torch.Tensor | None
) -> tuple[Selection, tuple[HeadStrength, ...]]:
    """Return the kept heads, strongest first, and a mass map for each of them."""
    if theta is None:
        return Selection(()), ()
    values = theta.double().cpu()
    size = values.abs().amax(dim=0)
    places = sorted(
        ((layer, head) for layer, head in (size > 0).nonzero().tolist()),
        key=lambda place: (-float(size[place]), place),
    )
    maps = []
    for layer, head in places:
        own = [float(f"{value:.8g}") for value in values[:, layer, head].exp().tolist()]
        if recipe.calibration.target == "head":
            maps.append(HeadStrength(mass=recipe.calibration.mass, factor=own[0]))
        elif len(own) == 2:
            maps.append(HeadStrength(mass="reweight", gamma=own[0], gamma_initial=own[1]))
        else:
            maps.append(HeadStrength(mass="reweight", gamma=own[0]))
    kept = tuple((layer, head, number) for number, (layer, head) in enumerate(places))
    return Selection(kept), tuple(maps)


def _judgement(
    recipe: Recipe,
    selection: Selection,
    model: PreTrainedModel,
    facts: ModelFacts,
    documents: Sequence[TaskDocuments],
    search: _GradientSearch,
    tokens: int,
) -> dict[str, Any]:
    tasks: dict[str, Sequence[Document]] = {one.task: one.judge for one in documents if one.judge}
    if recipe.objective == "entropy":
        tasks = {
            task: found
            for task, found in tasks.items()
            if all(0 <= document.right < len(document.requests) for document in found)
        }
    judge = None
    if tasks:
        judge = SetMeasurement(
            ModelSets(model, facts, recipe, tokens), recipe, tasks, search.ledger,
            search.processes, "judge", search.progress.done("judge"),
        )  # fmt: skip
    return judged(selection, recipe, grid=search.grid, judge=judge, reading=_reading(recipe))


def _content(
    recipe: Recipe,
    search: _GradientSearch,
    trace: dict[str, Any],
    tried: list[dict[str, Any]],
    theta: torch.Tensor | None,
) -> dict[str, Any]:
    """Return the artifact's record, without its judgement."""
    count = sum(map(len, search.grid.values()))
    names = ["theta"] if search.opened.shape[0] == 1 else ["theta", "theta_initial"]
    rows = []
    if theta is not None:
        for layer, heads in search.grid.items():
            for head in heads:
                rows.append([layer, head, *map(_short, theta[:, layer, head].tolist())])
    loose = [one.task for one in search.documents if not has_fixed_choices(one.search)]
    notes = []
    if theta is None:
        notes.append("no strengths improved on the untouched model; the artifact is empty")
    if recipe.objective == "corrected" and loose:
        notes.append(f"no label prior in {', '.join(loose)}: choices differ by document")
    return {
        "recipe": recipe.content(),
        "recipe_sha256": recipe.sha256(),
        "splits": {one.task: split_record(one) for one in search.documents},
        "baseline": search.baseline(),
        "mass_maps": [],
        "measured_heads": count,
        "searched_heads": count,
        "screen": None,
        "table": {
            "heads": {"columns": ["layer", "head", *names], "rows": rows},
            "by_task": {"columns": ["task"], "rows": []},
        },
        "training": search.history,
        "forward_equivalents": search.cost(len(tried)),
        "rule": {"name": "gradient", "criterion": _reading(recipe), **trace, "tried": tried},
        "notes": notes,
    }


def _short(value: float) -> float:
    return float(f"{value:.6g}")
