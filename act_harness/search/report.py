"""What a finished search leaves beside its artifact: plots, and a tracked run.

The plots are the map of effects, and effect against rank beside the controls; by gradient the map
of strengths, curves of their tuning, and strengths against effects. The run holds
configuration, figures of merit, tables, plots and heads; a search that was interrupted and
continued, or repeated, continues its run, which belongs to the recipe and to the ledger (named by
all that decides what was measured). The search is on the disk before any of this is called.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import asdict
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import numpy.typing as npt

from act_harness.errors import InputError
from act_harness.evidence.head_effects import head_effects
from act_harness.support.processes import Processes
from act_harness.tracking import values as tracked
from act_harness.tracking.arms import log_artifact
from act_harness.tracking.wandb_run import open_tracker

if TYPE_CHECKING:
    from act_harness.artifact import Artifact
    from act_harness.evidence.head_plots import Curve
    from act_harness.search.run import SearchResult
    from act_harness.tracking.tracker import TrackingSettings

Plot = Callable[[Path], Path]
"""Draws into a file, PNG or SVG by its suffix."""

__all__ = [
    "Sets",
    "draw",
    "log_strengths",
    "measured_sets",
    "plots_of",
    "ranked_heads",
    "search_scalars",
    "single_effects",
    "track_search",
]


def draw(result: SearchResult, beside: Path, *, against: Artifact | None = None) -> dict[str, Path]:
    """Draw the plots of a search beside its artifact, under the artifact's file name.

    Recipes share names, files in a folder cannot: two searches never draw over each other.

    Args:
        result: of the search.
        beside: the artifact's file; ``heads.json`` gets ``heads-map.png`` and ``heads-ranks.png``,
            by gradient ``heads-map.png`` and ``heads-curves.png``.
        against: as for :func:`plots_of`; ``heads-effects.png``.

    Returns:
        Name to path.

    Raises:
        InputError: matplotlib is not installed, or ``against`` has no effects of single heads.
        InfrastructureError: a file cannot be written.
    """
    plots = plots_of(result.artifact, against=against)
    return {
        name: plot(beside.with_name(f"{beside.stem}-{name}.png")) for name, plot in plots.items()
    }


def plots_of(artifact: Artifact, *, against: Artifact | None = None) -> dict[str, Plot]:
    """Return what draws the plots of the search that an artifact records, by name.

    Args:
        artifact: of a search, not a published list.
        against: of a search that measured single heads of the same model; strengths tuned by
            gradient are drawn against their effects.

    Raises:
        InputError: ``against`` has no effects of single heads.
    """
    from act_harness.evidence.head_plots import head_map, rank_plot

    name, search = artifact.name, artifact.search or {}
    if search["rule"]["name"] == "gradient":
        return _tuned(artifact, against)
    ranked, sets = ranked_heads(artifact), measured_sets(search)
    label = f"standardised change of the {search['recipe']['objective']} objective"
    return {
        "map": partial(
            head_map,
            single_effects(artifact),
            selected=artifact.heads,
            title=f"{name}: effect of calibrating each head alone",
            label=label,
        ),
        "ranks": partial(
            rank_plot,
            [effect for *_, effect, _ in ranked],
            stderr=[stderr for *_, stderr in ranked],
            selected=artifact.head_count() or None,
            curve=sets.curve,
            controls=sets.controls,
            judged=sets.judged,
            title=f"{name}: heads by effect, and sets of them",
            label=label,
            sets_label=sets.label,
        ),
    }


def _tuned(artifact: Artifact, against: Artifact | None) -> dict[str, Plot]:
    """Return what draws the strengths tuned, how that went, and single heads' effects beside."""
    from act_harness.evidence.head_plots import head_map
    from act_harness.evidence.tuning_plots import strengths_against_effects, training_curves

    search, name = artifact.search or {}, artifact.name
    maps = {f"log strength on {key}": one for key, one in log_strengths(artifact).items()}
    only = next(iter(maps))
    rule, reading = search["rule"], search["rule"]["criterion"]
    entropy = search["recipe"]["objective"] == "entropy"
    found: dict[str, Plot] = {
        "map": partial(
            head_map,
            maps if len(maps) > 1 else maps[only],
            selected=artifact.heads,
            title=f"{name}: strengths tuned together",
            label="log strength" if len(maps) > 1 else only,
        ),
        "curves": partial(
            training_curves,
            search["training"],
            untouched=rule["untouched"],
            taken=rule,
            title=f"{name}: tuning all strengths",
            label="minus the entropy on verify, nats" if entropy else _VERIFIED[reading],
        ),
    }
    if against is not None:
        found["effects"] = partial(
            strengths_against_effects,
            maps,
            single_effects(against),
            title=f"{name} against {against.name}",
        )
    return found


_VERIFIED = {
    "accuracy": "accuracy on verify",
    "objective": "label-prior corrected accuracy on verify",
    "margin": "standardised change of the margin on verify",
}


def log_strengths(artifact: Artifact) -> dict[str, npt.NDArray[np.float64]]:
    """Return log strengths by what they act on, (layers, heads); NaN where none was tuned."""
    facts, search = artifact.model, artifact.search or {}
    own = search["recipe"]["calibration"]
    target = own["mass"] if own["target"] == "head" else own["target"]
    names = ["sinks", "initial"] if target == "both" else [target]
    shape = (len(names), facts.num_hidden_layers, facts.num_attention_heads)
    theta = np.full(shape, np.nan)
    for layer, head, *values in search["table"]["heads"]["rows"]:
        theta[:, layer, head] = values
    return dict(zip(names, theta, strict=True))


def single_effects(artifact: Artifact) -> npt.NDArray[np.float64]:
    """Return each head's best effect alone, (layers, heads), as a search artifact has them.

    Raises:
        InputError: it is of no search that measured heads one by one.
    """
    found = head_effects(artifact)
    if found is None:
        raise InputError(
            f"artifact {artifact.name!r} has no effects of single heads to compare with, expected "
            "one of method 'exhaustive' or 'screened'"
        )
    return found


def ranked_heads(artifact: Artifact) -> list[tuple[int, int, float, float]]:
    """Return layer, head, best effect alone and its standard error, the largest effect first.

    Raises:
        InputError: it is of no search that measured heads one by one.
    """
    best = single_effects(artifact)
    table = (artifact.search or {})["table"]["heads"]
    place, error = (table["columns"].index(name) for name in ("effect", "stderr"))
    found = {
        (row[0], row[1]): (row[place], row[error])
        for row in reversed(table["rows"])  # of equal mass maps the first
        if row[place] == best[row[0], row[1]]
    }
    order = sorted(found, key=lambda head: (-found[head][0], head))
    return [(*head, *found[head]) for head in order]


class Sets(NamedTuple):
    """The right half of the second plot: all in what the set was chosen by, as the summary."""

    label: str
    curve: Curve | None = None
    judged: Curve | None = None
    controls: list[tuple[int, float]] = []  # noqa: RUF012 - never changed


_LABELS = {
    "accuracy": "change of raw accuracy, points",
    "objective": "change of label-prior corrected accuracy, points",
    "margin": "standardised change of the margin",
}


def measured_sets(search: dict[str, Any]) -> Sets:
    """Return how sets changed what they were chosen by, and how the one taken did elsewhere."""
    from act_harness.evidence.head_plots import Curve

    judgement, rule = search.get("judgement", {}), search["rule"]
    held = judgement.get("chosen_by")
    reading = rule.get("criterion") or (held["reading"] if held else "accuracy")
    unit = 1.0 if reading == "margin" else 100.0
    tried, curve, judged = rule.get("tried"), None, None
    if tried and "untouched" in rule:
        changes = [unit * (one["value"] - rule["untouched"]) for one in tried]
        low, high = ([unit * one["interval"][end] for one in tried] for end in (0, 1))
        curve = Curve([one["heads"] for one in tried], changes, low, high)
    if held is None:
        return Sets(_LABELS[reading], curve)
    heads, (low, high) = judgement["heads"], held["interval"]
    if low is not None:
        judged = Curve([heads], [unit * held["difference"]], [unit * low], [unit * high])
    drawn = [(heads, unit * (one - held["untouched"])) for one in held["random_sets"]]
    return Sets(_LABELS[reading], curve, judged, drawn)


# -- the tracked run -------------------------------------------------------------------------------


_IMAGES = {
    "map": "head_map",
    "ranks": "ranks",
    "curves": "training_curves",
    "effects": "strengths_against_effects",
}


def track_search(result: SearchResult, settings: TrackingSettings, *, folder: Path) -> list[str]:
    """Log a search as one run of job type ``search``.

    Args:
        result: of the search; its artifact and plots are on the disk.
        settings: where to track.
        folder: of the artifact; run ids and W&B's own files are kept there.

    Returns:
        Where the run is, as a line; nothing where nothing was logged.

    Raises:
        InfrastructureError: W&B cannot be reached or refuses the key (strict only).
    """
    artifact = result.artifact
    search: dict[str, Any] = artifact.search or {}
    document = artifact.document()
    config = tracked.run_config(
        arm="search",
        model=document["model"],
        artifact=document,
        artifact_sha256=artifact.sha256(),
        engine=search["recipe"].get("engine"),
        provenance=artifact.provenance,
        recipe=search["recipe"],
        splits=search["splits"],
    )
    with open_tracker(
        settings,
        job_type="search",
        name=f"search-{artifact.name}",
        config=config,
        folder=folder,
        identity={
            "recipe": search["recipe_sha256"],
            "ledger": search["run"]["ledger"],
            "group": settings.group,
        },
        rank=Processes.here().rank,
    ) as tracker:
        tracker.scalars(search_scalars(result))
        for name, table in (("effects", "heads"), ("effects_by_task", "by_task")):
            tracker.table(name, search["table"][table]["columns"], search["table"][table]["rows"])
        for kind, path in result.figures.items():
            tracker.image(_IMAGES[kind], path, caption=artifact.name)
        with TemporaryDirectory(prefix="act-harness-") as place:
            log_artifact(tracker, artifact, Path(place), used=False)
        return [line for line in (tracker.describe(),) if line]


def search_scalars(result: SearchResult) -> dict[str, object]:
    """Return a search's numbers: what was measured, the baseline, what the set is worth.

    ``search/...`` rests on the documents that found the heads, ``judge/...`` on documents that
    neither found nor chose them.
    """
    search: dict[str, Any] = result.artifact.search or {}
    found: dict[str, object] = {
        "search/kept_heads": result.artifact.head_count(),
        "search/measured_heads": search["measured_heads"],
        "search/searched_heads": search["searched_heads"],
        "search/seconds": result.seconds,
        "search/units_from_ledger": search["run"]["units_from_ledger"],
        "search/processes": search["run"]["processes"],
        **{f"search/{name}": value for name, value in asdict(result.work).items()},
    }
    for task, baseline in search["baseline"].items():
        found |= {f"search/baseline/{task}/{name}": value for name, value in baseline.items()}
    screen = search.get("screen")
    if screen:
        found["search/screen_rank_correlation"] = screen["rank_correlation_on_kept"]
    return found | _judged(search["judgement"])


def _judged(judgement: Mapping[str, Any]) -> dict[str, object]:
    """Flatten what the judge split says; verdicts are words."""
    found: dict[str, object] = {"judge/verdict": judgement["verdict"]}
    for name, one in judgement["columns"].items():
        drawn = one["random_sets"]["scores"]
        for key in ("untouched", "selected", "difference", "p", "verdict"):
            found[f"judge/{name}/{key}"] = one[key]
        found[f"judge/{name}/interval_low"], found[f"judge/{name}/interval_high"] = one["interval"]
        if drawn:
            found[f"judge/{name}/random_sets_mean"] = math.fsum(drawn) / len(drawn)
            found[f"judge/{name}/random_sets_p"] = one["random_sets"]["p"]
    return found
