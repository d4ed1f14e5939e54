"""What is to be the same in one process and in several that share a model's heads.

Run by torchrun it is one of the processes, and writes what it found as ``RANK.json``; called as a
module it is the one to compare with.
"""

from __future__ import annotations

import json
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from lm_eval.api.instance import Instance
from own_tasks import few_tasks, write_own_tasks
from transformers import AutoModelForCausalLM

from act_harness.artifact import Artifact, load_artifact
from act_harness.attention import calibrated, model_facts
from act_harness.attention.parallel import HeadGroup
from act_harness.errors import UnsupportedModelError
from act_harness.harness.eval_settings import EvalSettings
from act_harness.harness.evaluate import run_eval
from act_harness.model import CalibratedHFLM
from act_harness.mtbench.chat import REQUEST_TYPE
from act_harness.scoring.scorer import Item, Scorer
from act_harness.search.compute.workbench import Workbench

CONTEXT = tuple(range(3, 24))
ITEMS = [
    Item(CONTEXT, (40, 50, 30)),
    Item(CONTEXT, (41,)),
    Item(CONTEXT[:11], (41, 49)),
    Item((5, 9, 60, 61, 62, 63, 33), (7, 8)),
]
GATHERED = {
    f"model.layers.*.self_attn.{name}_proj": style
    for name, style in (
        *((name, "colwise_gather_output") for name in "qkv"),
        ("o", "rowwise_split_input"),
    )
}
"""Every process attends with all heads, as Phi-3's own plan has it."""

GENERATES = """
task: own_words
dataset_path: json
dataset_kwargs: {{data_files: {{test: {rows}}}}}
test_split: test
output_type: generate_until
doc_to_text: '{{{{q}}}}'
doc_to_target: wood
generation_kwargs: {{until: ["~"], max_gen_toks: 6, do_sample: true, temperature: 1.0}}
metric_list: [{{metric: exact_match, aggregation: mean, higher_is_better: true}}]
"""


def load(folder: Path, plan: Any = "auto") -> Any:
    more = {"tp_plan": plan} if torch.distributed.is_torchelastic_launched() else {}
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, **more).eval()


def scores(
    model: Any, artifact: Artifact | None, *, share: bool = True, engine: str = "torch"
) -> dict[str, Any]:
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
    return {"words": told[:, ids.shape[1] :].tolist(), "records": records}


def conversations(lm: CalibratedHFLM, kept: Path) -> dict[str, Any]:
    """Two turns of two talks, and once more from what was kept."""
    lm.answers = kept
    generation = {"max_gen_toks": 5, "temperature": 0.7, "seed": 3}
    requests = [
        Instance(
            request_type=REQUEST_TYPE,
            doc={},
            arguments=(
                "",
                {"question": name, "category": "writing", "turns": ["Who?", "Why?"],
                 "system": None, "generation": generation},
            ),
            idx=0,
        )
        for name in ("a", "b")
    ]  # fmt: skip
    said = [list(lm.generate_conversations(requests, disable_tqdm=True)) for _ in range(2)]
    return {
        "said": said,
        "counters": lm.counters.summary(),
        "lm-eval": [lm.rank, lm.world_size],
        "files": sorted(path.name for path in kept.rglob("*.jsonl")),
    }


def evaluation(folder: Path, artifact: Path, out: Path) -> dict[str, Any]:
    """Both arms of choices, with further prompts of a calibrator, and of sampled words."""
    tasks = write_own_tasks(out / "tasks", "own_choices")
    text = GENERATES.format(rows=tasks / "rows.jsonl")
    (tasks / "own_words.yaml").write_text(text)
    split = ",tp_plan=auto" if torch.distributed.is_torchelastic_launched() else ""
    settings = EvalSettings(
        tasks=("own_choices", "own_words"),
        pretrained=str(folder),
        model_args=f"dtype=float32{split}",
        artifact=str(artifact),
        include_path=(str(tasks),),
        calibrators=("content-free",),
        batch_size="4",
        device="cpu",
        limit=3,
        output=out / "runs",
    )
    with few_tasks():
        try:
            outcome = run_eval(settings)
        except SystemExit as ended:
            return {"code": ended.code}
    found: dict[str, Any] = {"folders": len(list((out / "runs").iterdir()))}
    for arm, place in outcome.folders.items():
        rows = [
            json.loads(line)
            for path in sorted(place.glob("samples_*.jsonl"))
            for line in path.read_text().splitlines()
        ]
        (results, asked) = (
            json.loads(path.read_text())
            for name in ("results", "calibrators")
            for path in place.glob(f"{name}_*.json")
        )
        found[arm] = {
            "answers": [row["filtered_resps"] for row in rows],
            "counters": results["config"]["act_harness"]["counters"],
            "calibrators": asked,
        }
    return found


def look(folder: Path, out: Path, artifacts: dict[str, Path]) -> dict[str, Any]:
    """Return it, by name."""
    model = load(folder)
    found: dict[str, Any] = {"facts": model_facts(model).model_dump(mode="json")}
    arms: dict[str, Artifact | None] = {
        "baseline": None,
        **{name: load_artifact(path) for name, path in artifacts.items()},
    }
    for name, artifact in arms.items():
        found[f"{name}: shared"] = scores(model, artifact)
        found[f"{name}: plain"] = scores(model, artifact, share=False)
        found[f"{name}: generated"] = words(model, artifact)
    some = arms["some"]
    found["reference"] = scores(model, some, engine="reference")
    found["gathered"] = scores(load(folder, GATHERED), some)
    split = {"tp_plan": "auto"} if torch.distributed.is_torchelastic_launched() else {}
    lm = CalibratedHFLM(str(folder), artifact=some, dtype="float32", device="cpu", **split)
    found["talks"] = conversations(lm, out / "kept")
    found["evaluation"] = evaluation(folder, artifacts["some"], out)
    return found


def here(folder: Path) -> dict[str, Any]:
    """Return what differs by process."""
    model = load(folder)
    group = HeadGroup.of(model)
    try:
        with Workbench(model):
            refused = ""
    except UnsupportedModelError as error:
        refused = str(error)
    return {
        "ranks": [group.rank, group.size],
        "least": group.least(5 - group.rank),
        "first": group.as_first(group.rank),
        "refused": refused,
    }


if __name__ == "__main__":
    torch.set_num_threads(1)
    folder, out, *paths = map(Path, sys.argv[1:])
    own = here(folder)
    rank = own["ranks"][0]
    (out / str(rank)).mkdir()
    found = look(folder, out / str(rank), {path.stem: path for path in paths})
    (out / f"{rank}.json").write_text(json.dumps({"here": own, "found": found}))
    torch.distributed.destroy_process_group()
