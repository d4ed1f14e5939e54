"""Small suites for the tests of ``act-harness regress``."""

from __future__ import annotations

import functools
import json
import shutil
from pathlib import Path
from typing import Any

import yaml

from act_harness.artifact import ModelFacts
from act_harness.regress.baseline import (
    ArmInfo,
    Baseline,
    Spread,
    StoredAnswer,
    StoredDocument,
    StoredMeasurement,
    TaskRecord,
)

TASKS = Path(__file__).resolve().parents[1] / "tasks"
FACTS = ModelFacts(
    id="small", architecture="LlamaForCausalLM", num_hidden_layers=2, num_attention_heads=4
)


@functools.cache
def demo_tasks(folder: Path = TASKS):
    """lm-eval's task manager with the demo tasks alone: its own index takes seconds to build."""
    from lm_eval.tasks import TaskManager

    return TaskManager(include_path=str(folder / "demo"), include_defaults=False)


def write_suite(folder: Path, place: Path | str, artifacts: list[str], **more: Any) -> Path:
    """Write ``suite.yaml`` for a model folder; returns the folder."""
    content = {
        "name": folder.name,
        "model": {"name": "tiny", "look_in": [str(place)], **more.pop("model", {})},
        "artifacts": artifacts,
        "tasks": ["act_demo_sentiment", "act_demo_word"],
        "limit": 6,
        "batch_size": 8,
        "variations": [{"batch_size": 1, "threads": 1, "reverse": True}],
        **more,
    }
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "suite.yaml").write_text(yaml.safe_dump(content))
    return folder


def tasks_with(folder: Path, old: str, new: str) -> Path:
    """Copy the demo tasks to a folder, with one text replaced in ``demo_sentiment``."""
    target = folder / "tasks"
    shutil.copytree(TASKS / "demo", target / "demo")
    for name in ("_hub_yaml", "hub_task.py"):
        shutil.copy(TASKS / name, target / name)
    file = target / "demo" / "sentiment.yaml"
    text = file.read_text()
    if text.count(old) != 1:
        raise ValueError(f"{old!r} is {text.count(old)} times in {file}")
    file.write_text(text.replace(old, new))
    return target


def changed_artifact(source: Path, target: Path, change: Any) -> Path:
    """Write an artifact with ``change`` applied to its parsed content."""
    content = json.loads(source.read_text())
    change(content)
    target.parent.mkdir(parents=True, exist_ok=True)
    target.write_text(json.dumps(content))
    return target


def raise_beta(content: dict[str, Any]) -> None:
    content["calibration"]["beta"] += 0.01


def drop_head(content: dict[str, Any]) -> None:
    layer = min(content["heads"], key=int)
    content["heads"][layer] = content["heads"][layer][1:]


def answer(right: bool, *, label: int = 0, margin: float = 1.0, **more: Any) -> StoredAnswer:
    """An answer of two choices."""
    scores = [-1.0, -1.0]
    best = label if right else 1 - label
    scores[best] += margin
    return StoredAnswer(
        scores=tuple(scores), prediction=best, metrics={"acc": float(right)}, **more
    )


def measurement(*, arms: dict[str, list[StoredAnswer]], task: str = "task") -> StoredMeasurement:
    """One task of two choices; the right one is always the first."""
    documents = tuple(
        StoredDocument(
            id=index, filter="none", doc=f"d{index}", prompt=f"p{index}", requests=f"r{index}",
            target="t", label=0, choices="c",
            arms={arm: answers[index] for arm, answers in arms.items()},
        )
        for index in range(len(next(iter(arms.values()))))
    )  # fmt: skip
    scores = {
        arm: {"acc,none": sum(one.metrics["acc"] for one in answers) / len(answers)}
        for arm, answers in arms.items()
    }
    infos = {arm: ArmInfo(sha256=None if arm == "baseline" else "s" * 64) for arm in arms}
    record = TaskRecord(
        version="1", higher_is_better={"acc": True}, scores=scores, documents=documents
    )
    return StoredMeasurement(model=FACTS, arms=infos, tasks={task: record})


def stored(found: StoredMeasurement, *, spread: float = 0.0) -> Baseline:
    """A measurement as a baseline whose scores spread by so much from run to run."""
    spreads = {
        task: {
            arm: Spread(drift=0.0, flips=0, spread={"acc,none": spread}) for arm in record.scores
        }
        for task, record in found.tasks.items()
    }
    return Baseline(
        suite="suite", identity={}, reason="test", provenance={}, drift=1e-4, alpha=0.05,
        variations=("repeated",), spread=spreads, measurement=found,
    )  # fmt: skip
