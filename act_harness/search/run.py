"""One search from recipe to artifact."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from act_harness.artifact import ModelFacts
from act_harness.attention import model_facts
from act_harness.attention.placement import input_device
from act_harness.engines import select_engine
from act_harness.errors import RecipeError
from act_harness.evidence.stats import spearman
from act_harness.search.by_gradient import run_by_gradient
from act_harness.search.choose.effects import HeadEffect, as_rows, both_splits, head_effects
from act_harness.search.choose.judgement import conclude
from act_harness.search.choose.select import Selection, best_of_each_head, refitted
from act_harness.search.choose.sets import ModelSets, SetMeasurement, heads_at_stake
from act_harness.search.compute.measure import Measurement
from act_harness.search.compute.workbench import Workbench
from act_harness.search.ledger import SearchLedger
from act_harness.search.progress import Progress, phases_of
from act_harness.search.record import (
    SearchResult,
    content_sha256,
    finished,
    ledger_folder,
    set_tokens,
    split_record,
    stable_content,
)
from act_harness.support.interruption import saved
from act_harness.support.processes import Processes

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from act_harness.search.choose.effects import TaskScores
    from act_harness.search.documents import Document, TaskDocuments
    from act_harness.search.recipe import Recipe

__all__ = ["SearchResult", "content_sha256", "ledger_folder", "run_search", "stable_content"]


def run_search(
    recipe: Recipe,
    *,
    model: PreTrainedModel,
    documents: Sequence[TaskDocuments],
    facts: ModelFacts | None = None,
    ledgers: str | Path = "search/ledgers",
    output: str | Path | None = None,
    token_budget: int | None = None,
    show_progress: bool = True,
    on_best: Callable[[list[HeadEffect]], object] | None = None,
) -> SearchResult:
    """Find heads as a recipe says, and write them as an artifact.

    A search that was killed continues from its ledger and gives the same artifact. In several
    processes every one calls this; the first writes.

    Args:
        recipe: what to search for.
        model: a loaded causal language model.
        documents: of every task, as :func:`act_harness.search.splits.load_documents` gives them.
        facts: what identifies the model; read off it when None.
        ledgers: folder of the ledgers.
        output: the artifact's file; None: not written.
        token_budget: tokens of a forward on the verify and judge splits; None: by the device.
        show_progress: draw progress bars.
        on_best: called after each chunk with the heads measured so far, the best first.

    Raises:
        RecipeError: the recipe is for another model, a range does not fit it, or documents lack
            what its objective needs.
        UnsupportedModelError: the model cannot be searched.
        InfrastructureError: ledger or artifact cannot be written; what was measured is kept.
    """
    _check_documents(documents, objective=recipe.objective)
    if recipe.method == "gradient":
        return run_by_gradient(
            recipe, model=model, documents=documents, facts=facts, ledgers=ledgers, output=output,
            token_budget=token_budget, show_progress=show_progress,
        )  # fmt: skip
    started = time.monotonic()
    known = facts or model_facts(model)
    grid = heads_at_stake(model, known, recipe)
    processes = Processes.here()
    device = input_device(model)
    recipe = recipe.on(device.type)
    folder, identity = ledger_folder(Path(ledgers), recipe, known, documents, device.type)
    phases = phases_of(
        recipe, list(documents), sum(map(len, grid.values())), processes=processes.count
    )
    with (
        SearchLedger.opened(folder, identity=identity, rank=processes.rank) as ledger,
        saved(lambda: f"what was measured is in {ledger.folder}"),
        Progress(phases, show=show_progress and processes.rank == 0) as progress,
    ):
        if ledger.found:
            progress.say(f"continuing {folder}: {ledger.found} units are there already")
        search = _Search(recipe, model, known, documents, grid, ledger, processes, progress)
        search.measure(on_best)
        effects = search.effects()
        budget = token_budget or set_tokens(device.type)
        selection, content = search.select(effects, budget)
    return finished(
        recipe, facts=known, selection=selection, content=content, effects=effects,
        work=search.measurement.work, started=started, device=device, processes=processes,
        ledger=ledger, output=output,
    )  # fmt: skip


def _check_documents(documents: Sequence[TaskDocuments], *, objective: str) -> None:
    """Refuse documents that a search cannot learn anything from, before it measures.

    Raises:
        RecipeError: a task comes twice, a document has a single choice, or no label where the
            objective needs one.
    """
    tasks = [one.task for one in documents]
    if len(set(tasks)) < len(tasks):
        raise RecipeError(f"the documents hold a task twice: {', '.join(tasks)}; give each once")
    for document in (
        found for one in documents for found in (*one.search, *one.verify, *one.judge)
    ):
        document.check_choices("a search")
        if objective != "entropy" and not document.labelled:
            raise RecipeError(
                f"document {document.key} of task {document.task!r} has no label, objective "
                f"{objective!r} needs one; take method 'gradient' with objective 'entropy', which "
                "needs none"
            )


class _Search:
    """The parts of :func:`run_search` that share what it was given."""

    def __init__(
        self,
        recipe: Recipe,
        model: PreTrainedModel,
        facts: ModelFacts,
        documents: Sequence[TaskDocuments],
        grid: dict[int, tuple[int, ...]],
        ledger: SearchLedger,
        processes: Processes,
        progress: Progress,
    ) -> None:
        self.recipe, self.model, self.facts, self.documents = recipe, model, facts, documents
        self.grid, self.ledger, self.processes = grid, ledger, processes
        self.searched = grid
        """Heads the recipe asks for; ``grid`` shrinks to those that are measured exactly."""
        self.estimates: dict[tuple[int, int, int], float] = {}
        self.progress = progress
        device = input_device(model)
        engine = select_engine(recipe.engine, device=device.type, plans=[recipe.plan])
        self.measurement = Measurement(
            recipe, {d.task: d.search for d in documents}, ledger, processes, engine
        )
        self.verifying = Measurement(
            recipe,
            {d.task: d.verify for d in documents},
            ledger,
            processes,
            engine,
            split="verify",
            work=self.measurement.work,
        )

    def measure(self, on_best: Callable[[list[HeadEffect]], object] | None) -> None:
        """Measure single heads."""

        def after_chunk(_: object) -> None:
            if on_best is not None and self.processes.count == 1:
                on_best(best_of_each_head(self.effects(complete=False)))

        with Workbench(self.model) as bench:
            if self.recipe.method == "screened":
                self._screen(bench)
            self._run(bench, self.measurement, "heads", after_chunk)

    def _run(
        self,
        bench: Workbench,
        measurement: Measurement,
        name: str,
        after_chunk: Callable[[Any], object] = lambda chunk: None,
    ) -> None:
        measurement.run(
            bench,
            self.grid,
            progress=self.progress.done(name),
            known=self.progress.known(name),
            after_chunk=after_chunk,
        )

    def refit(self, selection: Selection) -> Selection:
        """Measure single heads on the verify split too; order the heads by both splits."""
        with Workbench(self.model) as bench:
            self._run(bench, self.verifying, "refit")
        found = []
        for measurement in (self.measurement, self.verifying):
            stock = measurement.baselines()
            found.append((stock, measurement.changes(self.grid, stock)))
        tasks, changes = both_splits(*found)
        documents = sum(len(task.right) for task in tasks)
        return refitted(selection, head_effects(tasks, changes), documents)

    def _screen(self, bench: Workbench) -> None:
        """Estimate all heads and keep the best share of them in the grid."""
        progress, known = self.progress.done("screen"), self.progress.known("screen")
        self.measurement.screen(bench, self.grid, progress=progress, known=known)
        self.estimates = self.measurement.estimates(self.grid)
        self.grid = kept_heads(self.estimates, self.recipe.keep)

    def effects(self, *, complete: bool = True) -> list[HeadEffect]:
        """Return the effect of every measured head."""
        stock = self.measurement.baselines(complete=complete)
        return head_effects(stock, self.measurement.changes(self.grid, stock, complete=complete))

    def sets(self, split: Literal["verify", "judge"], token_budget: int) -> SetMeasurement | None:
        """Return what measures sets on a split; None where no task has documents in it."""
        tasks: dict[str, Sequence[Document]] = {
            d.task: found for d in self.documents if (found := d.of(split))
        }
        if not tasks or (split == "verify" and len(tasks) < len(self.documents)):
            return None
        score = ModelSets(self.model, self.facts, self.recipe, token_budget)
        done = self.progress.done("choose" if split == "verify" else "judge")
        return SetMeasurement(score, self.recipe, tasks, self.ledger, self.processes, split, done)

    def select(
        self, effects: list[HeadEffect], token_budget: int
    ) -> tuple[Selection, dict[str, Any]]:
        """Apply the rule, judge what it chose; return the selection and the artifact's record."""
        recipe = self.recipe
        stock = self.measurement.baselines()
        arms = [task.arm(task.scores) for task in stock]
        selection, judged = conclude(
            effects,
            recipe,
            baseline_accuracy=math.fsum(arm.accuracy for arm in arms) / len(arms),
            grid=self.searched,
            verify=self.sets("verify", token_budget),
            judge=self.sets("judge", token_budget),
            refit=self.refit,
        )
        content = {
            "recipe": recipe.content(),
            "recipe_sha256": recipe.sha256(),
            "splits": {d.task: split_record(d) for d in self.documents},
            "baseline": {
                task.task: {
                    "n": len(task.right),
                    "accuracy": round(arm.accuracy, 6),
                    "corrected_accuracy": (
                        None if arm.corrected is None else round(arm.corrected, 6)
                    ),
                    "margin": float(f"{arm.margins.mean():.6g}"),
                    "margin_spread": float(f"{task.spread:.6g}"),
                }
                for task, arm in zip(stock, arms, strict=True)
            },
            "mass_maps": [m.model_dump(exclude_none=True) for m in recipe.mass_maps()],
            "measured_heads": len({(e.layer, e.head) for e in effects}),
            "searched_heads": sum(map(len, self.searched.values())),
            "screen": self._screened(effects),
            "table": as_rows(effects, [task.task for task in stock]),
            "rule": {
                "name": recipe.rule,
                "order": [list(place) for place in selection.places],
                **selection.trace,
            },
            "judgement": judged,
            "notes": _notes(selection, self.documents, stock, recipe, effects),
        }
        return selection, content

    def _screened(self, effects: list[HeadEffect]) -> dict[str, Any] | None:
        """Return the estimates, and how well they agree with what was measured."""
        if not self.estimates:
            return None
        measured = {e.place: e.effect for e in effects}
        both = [(self.estimates[place], effect) for place, effect in measured.items()]
        agreement = spearman([a for a, _ in both], [b for _, b in both]) if len(both) > 1 else None
        return {
            "keep": self.recipe.keep,
            "rank_correlation_on_kept": (
                None if agreement is None or math.isnan(agreement) else round(agreement, 4)
            ),
            "columns": ["layer", "head", "strength", "estimate"],
            "rows": [
                [*place, float(f"{value:.6g}")] for place, value in sorted(self.estimates.items())
            ],
        }


def kept_heads(
    estimates: dict[tuple[int, int, int], float], keep: float
) -> dict[int, tuple[int, ...]]:
    """Return the share ``keep`` of the heads with the largest estimate of any mass map."""
    best: dict[tuple[int, int], float] = {}
    for (layer, head, _), value in estimates.items():
        best[layer, head] = max(value, best.get((layer, head), value))
    ordered = sorted(best, key=lambda place: (-best[place], place))
    grid: dict[int, list[int]] = {}
    for layer, head in sorted(ordered[: math.ceil(keep * len(ordered))]):
        grid.setdefault(layer, []).append(head)
    return {layer: tuple(heads) for layer, heads in grid.items()}


def _notes(
    selection: Selection,
    documents: Sequence[TaskDocuments],
    stock: Sequence[TaskScores],
    recipe: Recipe,
    effects: Sequence[HeadEffect],
) -> list[str]:
    """Say what a reader of the head list must know."""
    notes = []
    if effects and not any(one.effect for one in effects):  # exactly: nothing was computed anew
        notes.append(
            "no head changed any score: none saw a sink in these prompts, which are too short or "
            "have no column above the threshold"
        )
    if not selection.places:
        notes.append("no head set improved on the untouched model; the artifact is empty")
    if "refit" in selection.trace:
        record = selection.trace["refit"]
        notes.append(
            f"once their number was chosen, heads were ordered anew by search and verify together, "
            f"which kept {record['kept']} of {len(record['before'])}"
        )
    wanted = recipe.judge_documents()
    none = [one.task for one in documents if not one.judge]
    if none:
        notes.append(
            f"not judged on {', '.join(none)}: "
            + (
                "no documents were left for the judge split; lower samples, or prepare the "
                "documents again"
                if wanted
                else "the recipe sets no documents aside for that (judge_samples 0)"
            )
        )
    few = [f"{one.task} {len(one.judge)}" for one in documents if 0 < len(one.judge) < wanted]
    if few:
        notes.append(f"fewer than {wanted} documents judge: {', '.join(few)}")
    loose = [task.task for task in stock if not task.fixed]
    if recipe.objective == "corrected" and loose:
        notes.append(f"no label prior in {', '.join(loose)}: choices differ by document")
    return notes
