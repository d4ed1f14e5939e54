"""Every bad input ends in one line that helps, a documented exit code, and nothing written."""

from __future__ import annotations

import json
import re
import shlex
import shutil
import warnings
from pathlib import Path

import pytest
from bad_inputs import INPUTS, make_places
from installed import REPOSITORY, python
from own_tasks import caller, few_tasks

HELPS = re.compile(
    r"expected|did you mean|see `|; |give|name|use |check |has none|Usage", re.IGNORECASE
)


@pytest.fixture(scope="module")
def places(tiny_checkpoint, tmp_path_factory):
    return make_places(tmp_path_factory.mktemp("bad"), tiny_checkpoint)


@pytest.fixture(scope="module", autouse=True)
def quick():
    with few_tasks():
        yield


def tree(folder: Path) -> list[tuple[str, int]]:
    return sorted((str(p), p.stat().st_size) for p in folder.rglob("*") if p.is_file())


def test_there_are_enough():
    assert len({line for line, _, _ in INPUTS}) >= 150
    commands = {shlex.split(line)[0] for line, _, _ in INPUTS}
    assert commands >= {"eval", "search", "compare", "judge", "regress", "fetch", "artifact",
                        "bench", "dashboard", "doctor", "run", "tasks-path", "explore",
                        "sinks", "methods"}  # fmt: skip


@pytest.mark.parametrize(("line", "code", "says"), INPUTS, ids=range(len(INPUTS)))
def test_a_bad_input(line, code, says, places, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    for name in ("OPENAI_API_KEY", "WANDB_API_KEY", "ACT_HARNESS_DATA_DIR"):
        monkeypatch.delenv(name, raising=False)
    folder = Path(places["out"]).parent
    before = tree(folder)
    words = [word.format(**places) for word in shlex.split(line)]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        done = caller(monkeypatch, capsys)(*words)
    assert done.code == code, done.err[-3000:]
    assert "Traceback" not in done.err
    last = done.err.rstrip("\n").splitlines()[-1]
    if not done.err.startswith("Usage"):
        assert done.err.count("act-harness: ") == 1 or last.startswith("act-harness bench"), last
        assert last.startswith("act-harness"), last
        assert len(last) < 2500
    assert re.search(says, done.err), done.err
    assert HELPS.search(done.err), done.err
    out = Path(places["out"])
    if words[0] == "regress" and out.exists():  # a pipeline reads why there is no verdict
        report = json.loads((out / "regress.json").read_text())
        assert report["status"] == ("bad input" if code == 2 else "infrastructure")
        shutil.rmtree(out)
    assert tree(folder) == before
    assert not out.exists()
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
@pytest.mark.parametrize(
    ("line", "code", "says"),
    [
        ("eval --limit 0 --tasks act_demo_word --pretrained x", 2, "--limit is 0"),
        ("run --model hf-act", 2, "no task was named"),
    ],
)
def test_a_process_of_its_own_ends_the_same_way(line, code, says, places, tmp_path):
    words = [word.format(**places) for word in shlex.split(line)]
    done = python("-m", "act_harness", *words, path=(REPOSITORY,))
    assert done.returncode == code, done.stderr
    assert "Traceback" not in done.stderr
    assert says in done.stderr.splitlines()[-1]
