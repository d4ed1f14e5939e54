"""Two processes on the CPU: disjoint shares, the scores and counters of one process."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from importlib.util import find_spec

import pytest
from installed import REPOSITORY

from act_harness.artifact import Artifact
from act_harness.calibration import Calibration

if find_spec("vaderSentiment") is None:  # importing it would hide the lexicon of other tests
    pytest.skip("the demo tasks need vaderSentiment", allow_module_level=True)


def run(arguments, output, *, launcher, artifact, checkpoint):
    environment = {
        **os.environ,
        "PYTHONPATH": str(REPOSITORY),
        "HF_HUB_OFFLINE": "1",
        "OMP_NUM_THREADS": "1",
    }
    model = f"pretrained={checkpoint},dtype=float32,artifact={artifact}"
    done = subprocess.run(
        [*launcher, "-m", "act_harness", "run", "--model", "hf-act", "--model_args", model,
         "--tasks", "act_demo_word", "--limit", "9", "--batch_size", "4", "--device", "cpu",
         "--log_samples", "--output_path", str(output), *arguments],
        env=environment, capture_output=True, text=True, timeout=600, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    (results,) = output.rglob("results_*.json")
    (samples,) = output.rglob("samples_*.jsonl")
    rows = [json.loads(line) for line in samples.read_text().splitlines()]
    return json.loads(results.read_text()), sorted(rows, key=lambda r: r["doc_id"])


@pytest.mark.slow
def test_two_processes_give_what_one_gives(tiny_checkpoint, tmp_path):
    from act_harness.model import CalibratedHFLM

    lm = CalibratedHFLM(str(tiny_checkpoint), artifact="none", dtype="float32", device="cpu")
    artifact = Artifact(
        name="two", model=lm.facts, calibration=Calibration(alpha=1.5),
        heads={0: (0, 1), 1: (1, 3), 2: (2,)},
    ).save(tmp_path / "two.json")  # fmt: skip
    given = {"artifact": artifact, "checkpoint": tiny_checkpoint}
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2"]
    both, rows = run([], tmp_path / "both", launcher=torchrun, **given)
    one, expected = run([], tmp_path / "one", launcher=[sys.executable], **given)
    shares = both["config"]["act_harness"]["requests_by_process"]
    choices = len(expected[0]["resps"])
    # 9 documents: 5 and 4, the shorter share padded with a repeat by lm-eval
    assert shares[0] == 5 * choices
    assert shares[1] in (4 * choices, 5 * choices)
    assert one["config"]["act_harness"]["requests_by_process"] == [9 * choices]
    assert [row["doc_id"] for row in rows] == [row["doc_id"] for row in expected] == list(range(9))
    for row, want in zip(rows, expected, strict=True):
        # lm-eval pads the shorter share by asking for one request again, so resps may hold two
        for found, right in zip(row["filtered_resps"], want["filtered_resps"], strict=True):
            assert float(found[0]) == pytest.approx(float(right[0]), abs=1e-4)
            assert found[1] == right[1]
    assert both["results"] == one["results"]
    counters = [r["config"]["act_harness"]["counters"] for r in (both, one)]
    assert counters[0] == pytest.approx(counters[1], rel=1e-5)
    assert counters[0]["prompts"] == len({row["arguments"]["gen_args_0"]["arg_0"] for row in rows})


@pytest.mark.slow
def test_both_arms_run_in_two_processes(tiny_checkpoint, tmp_path):
    """The second process stays for the second arm, and writes nothing."""
    from act_harness.model import CalibratedHFLM

    lm = CalibratedHFLM(str(tiny_checkpoint), artifact="none", dtype="float32", device="cpu")
    artifact = Artifact(
        name="two", model=lm.facts, calibration=Calibration(alpha=1.5), heads={0: (0, 1)}
    ).save(tmp_path / "two.json")
    environment = {
        **os.environ, "PYTHONPATH": str(REPOSITORY), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1",
    }  # fmt: skip
    done = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2",
         "-m", "act_harness", "eval", "--pretrained", str(tiny_checkpoint), "--model-args",
         "dtype=float32", "--artifact", str(artifact), "--tasks", "act_demo_sentiment",
         "--limit", "5", "--calibrators", "content-free", "--device", "cpu",
         "--output", str(tmp_path / "out")],
        env=environment, capture_output=True, text=True, timeout=600, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert len(list((tmp_path / "out").rglob("results_*.json"))) == 2
    (comparison,) = (tmp_path / "out").rglob("comparison*.json")
    (row, *_) = json.loads(comparison.read_text())["rows"]
    assert row["result"]["documents"] == 5
    asked = list((tmp_path / "out").rglob("calibrators*.json"))  # by the first one alone
    assert ["content_free" in path.read_text() for path in asked] == [True, True]
