"""A search that is killed, and one in two processes, give the artifact of an undisturbed one."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
from installed import REPOSITORY

from act_harness.artifact import load_artifact
from act_harness.search.run import stable_content

TESTS = REPOSITORY / "tests"


def child(*arguments: str, launcher: tuple[str, ...] = ()) -> str:
    environment = {
        **os.environ,
        "PYTHONPATH": f"{REPOSITORY}{os.pathsep}{TESTS}",
        "OMP_NUM_THREADS": "1",
        "TORCH_DEVICE_BACKEND_AUTOLOAD": "0",
    }
    done = subprocess.run(
        [sys.executable, *launcher, str(TESTS / "search_child.py"), *arguments],
        env=environment,
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    folder = tmp_path_factory.mktemp("undisturbed")
    child("kills", str(folder))
    return stable_content(load_artifact(folder / "out.json"))


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(os, "fork"), reason="kills need fork")
def test_killed_searches_continue_to_the_same_artifact(tmp_path, undisturbed):
    said = child("kills", str(tmp_path), "1", "3", "2", "5", "4", "0.5s")
    assert int(said.split()[-1]) >= 4
    assert undisturbed["heads"]
    assert stable_content(load_artifact(tmp_path / "out.json")) == undisturbed


@pytest.mark.slow
def test_two_processes_give_the_artifact_of_one(tmp_path, undisturbed):
    launcher = ("-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2")
    child("join", str(tmp_path), launcher=launcher)
    assert stable_content(load_artifact(tmp_path / "out.json")) == undisturbed
    assert len(list((tmp_path / "ledgers").glob("*/part-*.jsonl"))) == 2
