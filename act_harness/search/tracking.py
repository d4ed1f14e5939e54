"""What a finished search logs: configuration, figures of merit, its tables, its plots, its heads.

The search is on the disk before this is called. A search that was interrupted and continued, or
repeated, continues its run: the run belongs to the recipe and to the ledger, which is named by all
that decides what was measured.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

from act_harness.search.processes import Processes
from act_harness.tracking import values as tracked
from act_harness.tracking.arms import log_artifact
from act_harness.tracking.wandb_run import open_tracker

if TYPE_CHECKING:
    from act_harness.search.run import SearchResult
    from act_harness.tracking.tracker import TrackingSettings

__all__ = ["search_scalars", "track_search"]

_IMAGES = {"map": "head_map", "ranks": "ranks"}


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
