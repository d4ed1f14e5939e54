"""One gradient search from recipe to artifact: train, choose on verify, judge.

Strengths of all heads are tuned together on the split ``search``
(:mod:`act_harness.search.compute.training`), ``verify`` chooses among what was tuned
(:mod:`act_harness.search.tuning`), and ``judge`` says what came of it through the product's own
scorer.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch

from act_harness.artifact import ModelFacts
from act_harness.attention import model_facts
from act_harness.attention.dimensions import widths
from act_harness.attention.placement import input_device
from act_harness.calibration import HeadStrength
from act_harness.engines import select_engine
from act_harness.errors import RecipeError
from act_harness.search.choose.judgement import judged
from act_harness.search.choose.select import Selection
from act_harness.search.choose.sets import ModelSets, SetMeasurement, heads_at_stake
from act_harness.search.compute.gradient import StrengthenedModel
from act_harness.search.compute.measure import Work
from act_harness.search.compute.objective import has_fixed_choices
from act_harness.search.compute.read_rows import tokens_of
from act_harness.search.compute.training import most_in_a_step
from act_harness.search.ledger import SearchLedger
from act_harness.search.progress import Phase, Progress
from act_harness.search.recipe_sections import Controls
from act_harness.search.record import (
    SearchResult,
    finished,
    ledger_folder,
    set_tokens,
    split_record,
)
from act_harness.search.tuning import Tuning, looked_at, reading_of, short, work_of_an_epoch
from act_harness.support.interruption import saved
from act_harness.support.processes import Processes

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from act_harness.engines.triton import TritonEngine
    from act_harness.search.documents import Document, TaskDocuments
    from act_harness.search.recipe import Recipe

__all__ = ["run_by_gradient"]


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
    recipe = recipe.model_copy(update={"controls": _controls(recipe, documents)})
    for one in documents:
        if len(one.verify) < 2:
            raise RecipeError(
                f"task {one.task!r} has {len(one.verify)} verify documents, method 'gradient' "
                "needs at least 2; raise verify_samples or lower samples"
            )
    known = facts or model_facts(model)
    grid, processes = heads_at_stake(model, known, recipe), Processes.here()
    device = input_device(model)
    recipe, checkpointing = _sized(recipe, model, documents, processes)
    kernels = _kernels(recipe, device)
    folder, identity = ledger_folder(
        Path(ledgers), recipe, known, documents, device.type,
        column_sums=kernels.name if kernels else None,
    )  # fmt: skip
    identity = {**identity, "processes": processes.count}
    tokens = recipe.size("chunk_tokens")
    with (
        SearchLedger.opened(folder, identity=identity, rank=processes.rank) as ledger,
        saved(lambda: f"what was tuned is in {ledger.folder}"),
        Progress(
            _phases(recipe, documents, checkpointing=checkpointing, processes=processes.count),
            show=show_progress and not processes.rank,
        ) as progress,
    ):
        if ledger.found:
            progress.say(f"continuing {folder}: {ledger.found} units are there already")
        opened = StrengthenedModel(
            model, recipe.calibration, checkpointing=checkpointing, kernels=kernels
        )
        with opened:
            search = Tuning(recipe, documents, ledger, processes, progress, grid, opened, tokens)
            theta, trace = search.train()
            value = trace.pop("best")
            kept, tried = (None, []) if theta is None else search.choose(theta, value)
            content = _content(recipe, search, trace, tried, theta)
        selection, maps = _selection(recipe, kept)
        chosen = recipe.model_copy(update={"strengths": maps})
        content["rule"]["order"] = [list(place[:2]) for place in selection.places]
        content["judgement"] = _judgement(
            chosen, selection, model, known, documents, search,
            token_budget or set_tokens(device.type),
        )  # fmt: skip
    return finished(
        chosen, facts=known, selection=selection, content=content, effects=[], work=Work(),
        started=started, device=device, processes=processes, ledger=ledger, output=output,
    )  # fmt: skip


def _kernels(recipe: Recipe, device: torch.device) -> TritonEngine | None:
    """Return the engine whose kernels add up columns, where the recipe names it.

    ``auto`` does not take it: in a search it was run by Triton's interpreter alone so far.
    """
    if recipe.engine != "triton":
        return None
    return cast("TritonEngine", select_engine(recipe.engine, device=device.type))


def _controls(recipe: Recipe, documents: Sequence[TaskDocuments]) -> Controls:
    """Return the controls that were asked for, else random head sets where they are cheap.

    Other methods measure each head anyway; here random sets on ``judge`` may cost more than all the
    rest, so they are left out where they would cost more than tuning.
    """
    asked = recipe.controls
    if "random_sets" in asked.model_fields_set:
        return asked
    settings, judge = recipe.gradient, sum(len(one.judge) for one in documents)
    epochs = settings.epochs * settings.restarts * len(settings.penalties)
    tuned = epochs * work_of_an_epoch(documents, checkpointing=False)
    count = asked.random_sets if asked.random_sets * judge <= tuned else 0
    return asked.model_copy(update={"random_sets": count})


def _phases(
    recipe: Recipe, documents: Sequence[TaskDocuments], *, checkpointing: bool, processes: int
) -> dict[str, Phase]:
    """Plan a search in forwards of a document; all processes' in tuning, own ones in judging."""
    searched, verify, judge = (
        sum(len(one.of(split)) for one in documents) for split in ("search", "verify", "judge")
    )
    settings = recipe.gradient
    runs = settings.restarts * len(settings.penalties)
    tuned = runs * settings.epochs * work_of_an_epoch(documents, checkpointing=checkpointing)
    looks = 1 + runs * len(looked_at(recipe, documents))
    found = {
        "train": Phase("tuning", tuned + looks * verify),
        "choose": Phase("choosing heads", len(settings.sizes) * verify + searched),
    }
    if judge:
        found["judge"] = Phase("judging", (2 + recipe.controls.random_sets) * judge / processes)
    return found


def _sized(
    recipe: Recipe,
    model: PreTrainedModel,
    documents: Sequence[TaskDocuments],
    processes: Processes,
) -> tuple[Recipe, bool]:
    """Return the recipe with its sizes, and whether layers are computed again in the backward.

    Neither where half of the device's memory holds what layers keep of a step's tokens. Where the
    recipe leaves both open, smaller forwards come before computing again; the documents of one
    task's batch are held together either way. Processes take the sizes of the smallest device: one
    that cut batches otherwise than the others would score other documents.
    """
    device = input_device(model)
    sized = recipe.on(device.type)
    again = recipe.gradient.checkpointing
    if device.type != "cuda":
        return sized, bool(again)
    config = model.config.get_text_config()
    values = sum(12 * config.hidden_size + 3.5 * wide for wide in widths(config))
    memory = torch.cuda.get_device_properties(device).total_memory
    room = min(processes.gather(int(memory / 2 / (values * model.dtype.itemsize))))
    least = max(
        sum(sorted(map(tokens_of, one.search))[-most_in_a_step(one.search, recipe.gradient) :])
        for one in documents
    )
    if again is None:
        again = room < max(least, recipe.chunk_tokens or 0)
    if not again and recipe.chunk_tokens is None:
        tokens = max(least, min(sized.size("chunk_tokens"), room))
        sized = sized.model_copy(update={"chunk_tokens": tokens})
    return sized, again


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
    search: Tuning,
    tokens: int,
) -> dict[str, Any]:
    blind = _unlabelled(documents)
    tasks: dict[str, Sequence[Document]] = {
        one.task: one.judge for one in documents if one.judge and one.task not in blind
    }
    judge = None
    if tasks:
        judge = SetMeasurement(
            ModelSets(model, facts, recipe, tokens), recipe, tasks, search.ledger,
            search.processes, "judge", search.progress.done("judge"),
        )  # fmt: skip
    return judged(selection, recipe, grid=search.grid, judge=judge, reading=reading_of(recipe))


def _unlabelled(documents: Sequence[TaskDocuments]) -> list[str]:
    """Return the tasks whose documents that judge are not all labelled, as ``entropy`` has them."""
    return [one.task for one in documents if not all(found.labelled for found in one.judge)]


def _content(
    recipe: Recipe,
    search: Tuning,
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
                rows.append([layer, head, *map(short, theta[:, layer, head].tolist())])
    loose = [one.task for one in search.documents if not has_fixed_choices(one.search)]
    notes = []
    if theta is None:
        notes.append("no strengths improved on the untouched model; the artifact is empty")
    blind = _unlabelled(search.documents)
    if blind:
        notes.append(f"not judged on {', '.join(blind)}: documents without a label")
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
        "rule": {"name": "gradient", "criterion": reading_of(recipe), **trace, "tried": tried},
        "notes": notes,
    }
