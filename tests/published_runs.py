"""Finished evaluations made by hand, as ``act-harness eval`` and lm-eval lay them out."""

from __future__ import annotations

import json
from pathlib import Path

STAMP = "2026-05-01T12-00-00"
BASE = "owner/base-model"
DIGEST = "ab12cd34" + "0" * 56
RIGHT = {"baseline": (1, 0, 0, 0), "act": (1, 1, 1, 0)}
"""Whether each of four documents was answered right."""


def sample(number, right):
    return {
        "doc_id": number, "doc": {"text": "a secret text"}, "target": "0", "arguments": {},
        "resps": [], "filtered_resps": [], "filter": "none", "metrics": ["acc"],
        "doc_hash": f"d{number}", "prompt_hash": f"p{number}", "target_hash": "t",
        "acc": float(right),
    }  # fmt: skip


def results(arm, *, model=BASE, tasks=("sst2",), whole=4, groups=None, record=True):
    score = sum(RIGHT[arm]) / 4
    one = {"alias": "t", "sample_len": 4, "acc,none": score, "acc_stderr,none": 0.25}
    config = {"model": model, "model_args": {"token": "hf_secret"}, "model_dtype": "torch.float32"}
    if record:
        calibrated = arm == "act"
        config["act_harness"] = {
            "arm": "heads" if calibrated else "baseline",
            "artifact": "heads" if calibrated else None,
            "artifact_sha256": DIGEST if calibrated else None,
            "calibration": {"alpha": 5.0} if calibrated else None,
            "heads": 3 if calibrated else 0,
            "model": {"id": model, "dtype": "float32", "adapter": None, "revision": None},
        }
    named = [*tasks, *(groups or {})]
    return {
        "results": {name: dict(one) for name in named},
        "groups": {name: dict(one) for name in groups or {}},
        "group_subtasks": groups or {},
        "configs": {
            task: {
                "task": task, "dataset_path": "nyu-mll/glue", "dataset_name": task,
                "test_split": "validation",
                "metric_list": [{"metric": "acc", "aggregation": "mean"}],
            }
            for task in tasks
        },
        "versions": dict.fromkeys(named, 1.0),
        "n-shot": dict.fromkeys(named, 2),
        "higher_is_better": {name: {"acc": True} for name in named},
        "n-samples": {task: {"original": whole, "effective": 4} for task in tasks},
        "config": config,
        "date": 1777636800.5,
        "lm_eval_version": "0.4.13",
        "transformers_version": "5.23.0",
    }  # fmt: skip


def write_arm(folder, arm, *, stamp=STAMP, **settings):
    folder.mkdir(parents=True, exist_ok=True)
    data = results(arm, **settings)
    for task in data["configs"]:
        rows = [json.dumps(sample(i, right)) for i, right in enumerate(RIGHT[arm])]
        (folder / f"samples_{task}_{stamp}.jsonl").write_text("\n".join(rows) + "\n")
    path = folder / f"results_{stamp}.json"
    path.write_text(json.dumps(data))
    return path


def write_evaluation(output: Path, *, seeds=(), stamp=STAMP, **settings):
    """Write both arms and the folder of their comparison; return the three folders."""
    names = {"baseline": f"m__baseline__{stamp}", "act": f"m__act-heads__{stamp}"}
    folders = {arm: output / name for arm, name in names.items()}
    for arm, folder in folders.items():
        for place in [folder / f"seed-{seed}" for seed in seeds] or [folder]:
            write_arm(place, arm, stamp=stamp, **settings)
    folders["comparison"] = output / f"m__act-heads__comparison__{stamp}"
    folders["comparison"].mkdir()
    (folders["comparison"] / "comparison.json").write_text("{}")
    return folders
