"""One of the processes that share a model's heads, or one alone: what it finds, as a file."""

from __future__ import annotations

import json
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM

from act_harness.artifact import Artifact, load_artifact
from act_harness.attention import attach, calibrated, model_facts
from act_harness.attention.parallel import HeadGroup
from act_harness.errors import ActHarnessError
from act_harness.scoring.scorer import Item, Scorer

CONTEXT = tuple(range(3, 24))
ITEMS = [
    Item(CONTEXT, (40, 50, 30)),
    Item(CONTEXT, (41,)),
    Item(CONTEXT[:11], (41, 49)),
    Item((5, 9, 60, 61, 62, 63, 33), (7, 8)),
]


def scores(model: Any, artifact: Artifact | None, *, share: bool, engine: str) -> dict[str, Any]:
    records: dict[str, Any] = {}
    with calibrated(model, artifact, engine=engine) as attachment:
        scorer = Scorer(model, attachment, share=share, batch_size=2)
        found = scorer.score(
            ITEMS, on_prompt=lambda prompt, record: records.update({str(prompt): asdict(record)})
        )
    return {
        "scores": [one.loglikelihood for one in found],
        "greedy": [one.is_greedy for one in found],
        "records": records,
        "packed": scorer.work.packed,
    }


def words(model: Any, artifact: Artifact | None) -> dict[str, Any]:
    ids = torch.tensor([CONTEXT, (0,) * 10 + CONTEXT[:11]])
    mask = torch.ones_like(ids)
    mask[1, :10] = 0
    with calibrated(model, artifact) as attachment:
        told = model.generate(ids, attention_mask=mask, max_new_tokens=6, do_sample=False)
        records = [asdict(one) for one in attachment.records()]
    return {"words": told[:, ids.shape[1] :].tolist(), "last": records}


def look(folder: Path, artifacts: dict[str, Artifact]) -> dict[str, Any]:
    """Return all that is to be the same in one process and in several."""
    more = {"tp_plan": "auto"} if torch.distributed.is_torchelastic_launched() else {}
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, **more).eval()
    found: dict[str, Any] = {"facts": model_facts(model).model_dump(mode="json")}
    arms: dict[str, Artifact | None] = {"baseline": None, **artifacts}
    for name, artifact in arms.items():
        for path, share in (("shared", True), ("plain", False)):
            found[f"{name} {path}"] = scores(model, artifact, share=share, engine="torch")
        found[f"{name} generated"] = words(model, artifact)
    found["reference"] = scores(model, artifacts["some"], share=True, engine="reference")
    group = HeadGroup.of(model)
    found["here"] = [
        group.rank,
        group.size,
        group.least(3 + group.rank),
        group.as_first(group.rank),
    ]
    return found


def refusals(folder: Path, artifacts: dict[str, Artifact]) -> list[str]:
    """Return the lines with which a model is refused."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, tp_plan="auto")
    lines = []
    for artifact in artifacts.values():
        try:
            attach(model.eval(), artifact, facts=artifact.model)
        except ActHarnessError as error:
            lines.append(f"{type(error).__name__}: {error}")
    return lines


if __name__ == "__main__":
    torch.set_num_threads(1)
    what, folder, out, *paths = sys.argv[1:]
    artifacts = {Path(path).stem: load_artifact(path) for path in paths}
    found = {"look": look, "refusals": refusals}[what](Path(folder), artifacts)
    rank = torch.distributed.get_rank() if torch.distributed.is_initialized() else 0
    Path(out, f"{rank}.json").write_text(json.dumps(found))
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()
