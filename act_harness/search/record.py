"""What a search leaves behind: its result, the name of its ledger, the hash of its content."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from act_harness.artifact import Artifact, ModelFacts
from act_harness.search.choose.judgement import describe
from act_harness.search.choose.sets import make_heads
from act_harness.search.ledger import VERSION, SearchLedger
from act_harness.support import provenance
from act_harness.support.atomic import canonical_json

if TYPE_CHECKING:
    import torch

    from act_harness.search.choose.effects import HeadEffect
    from act_harness.search.choose.select import Selection
    from act_harness.search.compute.measure import Work
    from act_harness.search.documents import TaskDocuments
    from act_harness.search.recipe import Recipe
    from act_harness.support.processes import Processes

__all__ = [
    "SearchResult",
    "content_sha256",
    "finished",
    "ledger_folder",
    "measured_facts",
    "set_tokens",
    "split_record",
    "stable_content",
]

_SET_TOKENS = {"cpu": 4096, "cuda": 32768}


def set_tokens(device: str) -> int:
    """Return the tokens of a forward where whole sets are measured: what fills the device."""
    return _SET_TOKENS.get(device, _SET_TOKENS["cpu"])


@dataclass(frozen=True)
class SearchResult:
    """What a search found."""

    artifact: Artifact
    effects: list[HeadEffect]
    """Every measured (layer, head, mass map)."""
    selection: Selection
    work: Work
    seconds: float
    path: Path | None = None
    """Where the artifact was written; None on processes other than the first."""
    figures: dict[str, Path] = field(default_factory=dict)

    def summary(self) -> str:
        """Return a few lines for the terminal."""
        search = self.artifact.search or {}
        lines = [
            f"{self.artifact.head_count()} of {search['measured_heads']} measured heads selected "
            f"(rule {search['rule']['name']}, {self.seconds:.0f} s)"
        ]
        if search["run"]["units_from_ledger"]:
            lines.append(f"  continued: {search['run']['units_from_ledger']} units were there")
        reason = search["rule"].get("reason")
        lines += [f"  {reason}"] if reason else []
        lines += describe(search["judgement"])
        lines += [f"  note: {note}" for note in search.get("notes", [])]
        if self.path is not None:
            lines.append(f"written to {self.path}")
        if self.figures:
            lines.append(f"drawn to {' and '.join(map(str, self.figures.values()))}")
        return "\n".join(lines)


def ledger_folder(
    root: Path,
    recipe: Recipe,
    facts: ModelFacts,
    documents: Sequence[TaskDocuments],
    device: str,
    *,
    column_sums: str | None = None,
) -> tuple[Path, dict[str, Any]]:
    """Return the folder of a search's ledger, named by all that decides its numbers, and that.

    ``column_sums`` names the kernels that add up columns in a gradient search: they round
    otherwise than plain torch, and a column may lie at its threshold.
    """
    identity = {
        "version": VERSION,
        "recipe": recipe.measured(),
        "model": measured_facts(facts),
        "documents": {d.task: [d.digest("search"), d.digest("verify")] for d in documents},
        "device": device,
        **({"column_sums": column_sums} if column_sums else {}),
    }
    name = "".join(c if c.isalnum() or c in "-_." else "-" for c in "+".join(recipe.tasks))[:40]
    return root / f"{name}-{provenance.sha256_json(identity)[:12]}", identity


def measured_facts(facts: ModelFacts) -> dict[str, Any]:
    """Return what of a model decides what is measured."""
    return {key: value for key, value in facts.model_dump().items() if key not in _NOT_MEASURED}


# A moved folder is the same model, and the tokenizer's work is in the documents' digests: the same
# files read by another release of transformers continue a search.
_NOT_MEASURED = {
    "id",
    "revision",
    "num_key_value_heads",
    "tokenizer_sha256",
    "tokenizer_probe_sha256",
    "chat_template_sha256",
    "chat_probe_sha256",
    "adds_bos",
}


def finished(
    recipe: Recipe,
    *,
    facts: ModelFacts,
    selection: Selection,
    content: dict[str, Any],
    effects: list[HeadEffect],
    work: Work,
    started: float,
    device: torch.device,
    processes: Processes,
    ledger: SearchLedger,
    output: str | Path | None,
) -> SearchResult:
    """Make a search's artifact, and write it in the first process.

    Args:
        recipe: with the mass maps of the selected heads.
        facts: of the model.
        selection: the heads.
        content: the artifact's record; what differs between reruns is added here.
        effects: of single heads, where they were measured.
        work: done.
        started: ``time.monotonic()`` at the search's start.
        device: searched on.
        processes: of the search.
        ledger: of the search.
        output: the artifact's file; None: not written.
    """
    heads, strengths = make_heads(selection.places, recipe)
    seconds = time.monotonic() - started
    content["run"] = {
        "seconds": round(seconds, 1),
        "device": provenance.describe_device(str(device)),
        "processes": processes.count,
        "units_from_ledger": ledger.found,
        "ledger": ledger.folder.name,
    }
    artifact = Artifact(
        name=recipe.name,
        model=facts,
        calibration=recipe.calibration,
        heads=heads,
        strengths=strengths,
        search=content,
        provenance=provenance.collect(seed=recipe.seed, device=str(device)).to_json(),
    )
    content["content_sha256"] = content_sha256(artifact)
    artifact = artifact.model_copy(update={"search": content})
    path = artifact.save(output) if output is not None and processes.rank == 0 else None
    return SearchResult(artifact, effects, selection, work, seconds, path)


_DRAWN = {"num_key_value_heads"}
"""Facts that only pictures show; artifacts made before they were recorded keep their hash."""


def stable_content(artifact: Artifact) -> dict[str, Any]:
    """Return the part of an artifact that a rerun reproduces byte for byte in canonical JSON."""
    content = artifact.document()
    del content["provenance"]
    search = dict(content["search"] or {})
    for key in ("run", "content_sha256", "held_out"):
        search.pop(key, None)
    model = {key: value for key, value in content["model"].items() if key not in _DRAWN}
    return {**content, "model": model, "search": search}


def content_sha256(artifact: Artifact) -> str:
    """Return the hash of :func:`stable_content`."""
    return provenance.sha256_text(canonical_json(stable_content(artifact)))


def split_record(documents: TaskDocuments) -> dict[str, Any]:
    """Return what an artifact says about a task's documents."""
    return {
        "source": documents.source,
        "evaluation": documents.evaluation,
        "num_fewshot": documents.num_fewshot,
        "search": {"n": len(documents.search), "sha256": documents.digest("search")},
        "verify": {"n": len(documents.verify), "sha256": documents.digest("verify")},
        "judge": {"n": len(documents.judge), "sha256": documents.digest("judge")},
        "too_long": documents.too_long,
    }
