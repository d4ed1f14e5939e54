"""A search that is killed, and one in two processes, give the artifact of an undisturbed one."""

from __future__ import annotations

import os
import random
import subprocess
import sys

import numpy as np
import pytest
import search_child
import torch
from installed import REPOSITORY

from act_harness.artifact import load_artifact
from act_harness.search.run import stable_content

TESTS = REPOSITORY / "tests"
LAUNCHER = ("-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2")
needs_fork = pytest.mark.skipif(not hasattr(os, "fork"), reason="kills need fork")


def child(*arguments: str, launcher: tuple[str, ...] = (), dies: bool = False) -> str:
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
    assert (done.returncode != 0) == dies, done.stderr
    return done.stderr if dies else done.stdout


def found_in(folder):
    return stable_content(load_artifact(folder / "out.json"))


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    folder = tmp_path_factory.mktemp("undisturbed")
    child("kills", "screened", str(folder))
    return found_in(folder)


@pytest.fixture(scope="module")
def tuned(tmp_path_factory):
    """What an undisturbed gradient search found, and how many units its ledger has."""
    folder = tmp_path_factory.mktemp("tuned")
    threads = torch.get_num_threads()
    search_child.by_gradient(folder)
    torch.set_num_threads(threads)
    (ledger,) = (folder / "ledgers").glob("*/part-*.jsonl")
    return found_in(folder), len(ledger.read_text().splitlines())


LONG = pytest.mark.skipif(
    not os.environ.get("ACT_HARNESS_LONG_TESTS"), reason="long: ACT_HARNESS_LONG_TESTS=1 runs it"
)


@pytest.mark.slow
@needs_fork
def test_killed_searches_continue_to_the_same_artifact(tmp_path, undisturbed):
    said = child("kills", "screened", str(tmp_path), "1", "3", "2", "5", "4", "0.5s")
    assert int(said.split()[-1]) >= 4
    assert undisturbed["heads"]
    assert found_in(tmp_path) == undisturbed


@pytest.mark.slow
def test_two_processes_give_the_artifact_of_one(tmp_path, undisturbed):
    child("join", "screened", str(tmp_path), launcher=LAUNCHER)
    assert found_in(tmp_path) == undisturbed
    assert len(list((tmp_path / "ledgers").glob("*/part-*.jsonl"))) == 2


@pytest.mark.slow
def test_a_search_goes_on_after_one_of_its_processes_was_killed(tmp_path, undisturbed):
    """torchrun ends the other one; both start again from what was measured."""
    told = child("join", "screened", str(tmp_path), "2", launcher=LAUNCHER, dies=True)
    assert "Signal 9 (SIGKILL)" in told
    assert told.count("Traceback") <= 1  # torchrun's own
    assert not (tmp_path / "out.json").exists()
    child("join", "screened", str(tmp_path), launcher=LAUNCHER)
    assert found_in(tmp_path) == undisturbed


@needs_fork
@pytest.mark.parametrize("count", [3, pytest.param(20, marks=[pytest.mark.slow, LONG])])
def test_a_gradient_search_killed_at_random_gives_the_same_artifact(tmp_path, tuned, count):
    """Each search is killed half-way through a write: of an epoch, of scores, of the artifact."""
    whole, units = tuned
    draw, left, moments = random.Random(count), units, []  # noqa: S311 - no secret
    for _ in range(count):  # a continued search writes only what is missing
        moments.append(draw.randint(1, max(1, min(left, 2 * units // count))))
        left -= moments[-1] - 1
    said = child("kills", "gradient", str(tmp_path), *map(str, moments))
    assert int(said.split()[-1]) == count
    assert whole["heads"]
    assert found_in(tmp_path) == whole


@pytest.mark.slow
def test_a_gradient_search_in_two_processes_gives_the_artifact_of_one(tmp_path, tuned):
    """They add up gradients in another order: strengths agree to 1e-3, the chosen heads fully."""
    child("join", "gradient", str(tmp_path), launcher=LAUNCHER)
    whole, found = tuned[0], found_in(tmp_path)
    assert found["heads"] == whole["heads"]
    assert found["search"]["rule"]["run"] == whole["search"]["rule"]["run"]
    assert found["search"]["rule"]["epoch"] == whole["search"]["rule"]["epoch"]
    mine, theirs = (np.array(one["search"]["table"]["heads"]["rows"]) for one in (whole, found))
    np.testing.assert_allclose(mine, theirs, atol=1e-3)
    for key in ("value", "heads"):
        assert [one[key] for one in found["search"]["rule"]["tried"]] == pytest.approx(
            [one[key] for one in whole["search"]["rule"]["tried"]], abs=1e-4
        )
    assert len(list((tmp_path / "ledgers").glob("*/part-*.jsonl"))) == 2  # they judge in turns
