"""Task files as a user writes them, and a command line that is called in this process."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import NamedTuple

import pytest

from act_harness.cli import app as cli
from act_harness.support import paths

DEMO = Path(__file__).resolve().parents[1] / "tasks" / "demo"

YAML = """
task: {name}
tag: own_tag
dataset_path: json
dataset_kwargs:
  data_files:
    test: {rows}
test_split: test
output_type: multiple_choice
doc_to_text: '{{{{q}}}}'
doc_to_choice: '{{{{ch}}}}'
doc_to_target: y
target_delimiter: ''
metric_list:
  - metric: acc
  - metric: acc_norm
"""
WORDS = ("lamp", "violin", "ladder", "kettle", "drum", "barrel", "wagon", "pencil")


def write_own_tasks(folder: Path, *names: str) -> Path:
    """Write tasks of eight questions each, rows beside them; returns the folder."""
    folder.mkdir(parents=True, exist_ok=True)
    rows = folder / "rows.jsonl"
    lines = [
        json.dumps(
            {"q": f"Q: What is a {word} made of?\nA:", "ch": [" wood", " seven"], "y": n % 2}
        )
        for n, word in enumerate(WORDS)
    ]
    rows.write_text("\n".join(lines) + "\n", encoding="utf-8")
    for name in names:
        text = YAML.format(name=name, rows=rows)
        (folder / f"{name}.yaml").write_text(text, encoding="utf-8")
    return folder


@contextmanager
def few_tasks() -> Iterator[None]:
    """Let lm-eval index the demo tasks alone beside ``--include_path``: seconds, not a minute."""
    import lm_eval.evaluator  # noqa: F401 - before the patches: it keeps what it imports by name
    from lm_eval.tasks import TaskManager

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("lm_eval.tasks.TaskManager", partial(TaskManager, include_defaults=False))
        patch.setattr(paths, "task_route", lambda: paths.TaskRoute(False, ""))
        patch.setattr(paths, "tasks_path", lambda: DEMO)
        # keeps pytest's streams
        patch.setattr("lm_eval.utils.setup_logging", lambda *given, **more: None)
        patch.setattr("lm_eval.evaluator.add_env_info", lambda storage: None)  # asks pip
        yield


class Ended(NamedTuple):
    """How a command ended."""

    code: int
    out: str
    err: str


def caller(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Callable[..., Ended]:
    """Return a function that runs the command line as the installed script does."""

    def run(*arguments: object) -> Ended:
        monkeypatch.setattr(sys, "argv", ["act-harness", *map(str, arguments)])
        with pytest.raises(SystemExit) as stop:
            cli.main()
        output = capsys.readouterr()
        assert isinstance(stop.value.code, int)
        return Ended(stop.value.code, output.out, output.err)

    return run
