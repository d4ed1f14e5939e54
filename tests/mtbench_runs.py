"""Output folders as ``lm_eval --tasks mt_bench --log_samples`` leaves them, with invented rows."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any


def doc(number: int, category: str = "writing", references: list[str] | None = None) -> Any:
    return {
        "prompt": [f"Question {number}, first part?", f"Question {number}, second part?"],
        "reference": references or [],
        "category": category,
        "prompt_id": number,
    }


def write_run(
    folder: Path,
    rows: list[tuple[Any, list[str]]],
    *,
    arm: str = "baseline",
    sha: str | None = None,
    date: str = "2026-01-02T03-04-05.000001",
    model: str = "some/model",
) -> Path:
    """Write samples and results of one arm; return the samples file."""
    folder.mkdir(parents=True, exist_ok=True)
    lines = [
        {"doc_id": n, "doc": row, "filtered_resps": [answers], "resps": [[answers]]}
        for n, (row, answers) in enumerate(rows)
    ]
    samples = folder / f"samples_mt_bench_{date}.jsonl"
    samples.write_text("".join(json.dumps(line) + "\n" for line in lines))
    facts = {"arm": arm, "artifact_sha256": sha, "model": {"id": model}}
    results = {"config": {"model": "hf-act", "act_harness": facts}}
    (folder / f"results_{date}.json").write_text(json.dumps(results))
    return samples


def graded(*grades: float) -> list[str]:
    """Answers that carry the grade that the test server gives them."""
    return [f"An answer. QUALITY={grade:g}." for grade in grades]
