"""One device against several: what counts as the same, what a failure becomes, and a run of it."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from importlib.util import find_spec

import pytest

from act_harness.artifact import Artifact, ModelFacts
from act_harness.bench import several, several_checks
from act_harness.bench.several_compare import Arm, Tolerance, compare_arms, compare_artifacts
from act_harness.bench.several_runs import Runner, own_lines, process_of_rank
from act_harness.calibration import Calibration
from act_harness.errors import InfrastructureError, InputError

FLOAT = Tolerance.of("float32")
ANSWERS = {("t", 0): [(-2.0, True), (-40.0, False)], ("t", 1): ["text"]}
ONE = Arm(ANSWERS, {"t acc": 0.5}, {"prompts": 2, "mean": 0.25, "none": None}, (4,))


def differing(**changes):
    return compare_arms({"baseline": ONE}, {"baseline": ONE._replace(**changes)}, FLOAT, exact=True)


def test_the_same_is_the_same():
    assert differing() == (0.0, ())
    assert differing(shares=(2, 2)) == (0.0, ())


@pytest.mark.parametrize(
    ("changes", "largest", "fault"),
    [
        ({"answers": {("t", 0): ANSWERS["t", 0]}}, 0.0, "1 documents instead of 2"),
        (
            {"answers": {**ANSWERS, ("t", 0): [(-2.0, True), (-40.0002, False)]}},
            2e-4,
            "1 answers differ by more than 1e-4",
        ),
        ({"answers": {**ANSWERS, ("t", 1): ["txt"]}}, 0.0, "1 answers differ"),
        ({"scores": {"t acc": 0.75}}, 0.0, "t acc is 0.75 instead of 0.5"),
        ({"scores": {}}, 0.0, "t acc is None instead of 0.5"),
        (
            {"counters": {"prompts": 3, "mean": 0.25, "none": None}},
            0.0,
            "counter prompts is 3 instead of 2",
        ),
        (
            {"counters": {"prompts": 2, "mean": 0.26, "none": 0}},
            0.0,
            "counter mean is 0.26 instead of 0.25",
        ),
    ],
)
def test_what_differs_is_named(changes, largest, fault):
    found = differing(**changes)
    assert found.largest == pytest.approx(largest, abs=1e-9)
    assert fault in "; ".join(found.faults)


def test_tolerances_follow_the_dtype():
    assert FLOAT.holds(-40.00009, -40.0)
    assert not FLOAT.holds(-40.00011, -40.0)
    coarse = Tolerance.of("bfloat16")
    assert coarse.absolute == coarse.relative == 1 / 128
    assert coarse.holds(-40.3, -40.0)  # 41 / 128 = 0.32
    assert not coarse.holds(-40.33, -40.0)
    assert Tolerance.of("float16").relative == 1 / 1024


def test_a_coarse_dtype_decides_what_is_near_a_threshold():
    one, other = (ONE._replace(counters={"prompts_near_threshold": n, "pairs": 4}) for n in (1, 2))
    for dtype, faults in (("float32", 1), ("bfloat16", 0)):
        found = compare_arms({"a": one}, {"a": other}, Tolerance.of(dtype), exact=True)
        assert len(found.faults) == faults


def artifact(path, *, strength, heads):
    facts = ModelFacts(
        id="m", architecture="LlamaForCausalLM", num_hidden_layers=2, num_attention_heads=4
    )
    search = {"rule": {"name": "top", "value": strength}, "run": {"seconds": time.monotonic()}}
    made = Artifact(name="a", model=facts, calibration=Calibration(), heads=heads, search=search)
    return made.save(path)


def test_artifacts_are_the_same_but_for_their_times(tmp_path):
    one = artifact(tmp_path / "1.json", strength=0.5, heads={0: (1,)})
    same = artifact(tmp_path / "2.json", strength=0.5002, heads={0: (1,)})
    other = artifact(tmp_path / "3.json", strength=0.5, heads={0: (2,)})
    found = compare_artifacts(one, same, tolerance=1e-3)
    assert (found.largest, found.faults) == (pytest.approx(2e-4), ())
    (fault,) = compare_artifacts(one, same, tolerance=1e-4).faults
    assert "numbers differ by up to 0.0002" in fault
    (fault,) = compare_artifacts(one, other, tolerance=1e-3).faults
    assert "heads" in fault


def runner(folder, **changes):
    return Runner(**{"devices": 2, "cpu": True, "folder": folder, "seconds": 60, **changes})


def test_what_a_command_said_last_is_its_fault(tmp_path):
    said = "print('bar\\ract-harness: no model'); print('more'); raise SystemExit(2)"
    ran = runner(tmp_path).run("bad", [sys.executable, "-c", said])
    assert (ran.code, ran.fault()) == (2, "act-harness: no model")
    assert own_lines(ran.log.read_text()) == ["act-harness: no model"]
    assert runner(tmp_path).run("good", [sys.executable, "-c", ""]).fault() == ""
    late = runner(tmp_path, seconds=0.2).run(
        "late", [sys.executable, "-c", "import time; time.sleep(60)"]
    )
    assert late.code is None
    assert late.fault().startswith("stopped after")


@pytest.mark.skipif(not os.path.isdir("/proc/self"), reason="reads /proc")  # noqa: PTH112
def test_a_process_is_found_by_its_rank():
    wait = [sys.executable, "-c", "input()"]
    child = subprocess.Popen(wait, env={**os.environ, "RANK": "7"}, stdin=subprocess.PIPE)
    try:
        assert process_of_rank(os.getpid(), 7) == child.pid
        with pytest.raises(InfrastructureError, match="none of rank 8"):
            process_of_rank(os.getpid(), 8)
    finally:
        child.send_signal(signal.SIGKILL)
        child.communicate()


def test_bad_input_is_one_line(tmp_path):
    given = ["--pretrained", str(tmp_path), "--output", str(tmp_path), "--cpu"]
    with pytest.raises(InputError, match="check 'evl' is unknown"):
        several.main([*given, "--only", "evl"])
    with pytest.raises(InfrastructureError, match="9999 GPUs were asked for"):
        several.main([*given[:-1], "--devices", "9999"])
    with pytest.raises(SystemExit) as ended:
        several.main(["--output", str(tmp_path)])
    assert ended.value.code == 2


def test_a_check_that_fails_does_not_end_the_others(tmp_path, monkeypatch, capsys):
    def breaks(given, name):
        raise InputError("it broke")

    def works(given, name):
        return several_checks.Row(name, "same", 0.0, 1.0, 0.5)

    monkeypatch.setattr(several_checks, "CHECKS", {"breaks": breaks, "works": works})
    monkeypatch.setattr(several, "CHECKS", several_checks.CHECKS)
    with pytest.raises(SystemExit) as ended:
        several.main(["--pretrained", "m", "--cpu", "--output", str(tmp_path), "--name", "n"])
    assert ended.value.code == 1
    assert capsys.readouterr().out.splitlines()[:2] == ["breaks: failed (it broke)", "works: same"]
    rows = json.loads((tmp_path / "n.json").read_text())["tables"][0]["rows"]
    assert rows == [
        ["breaks", "failed", None, None, None, "it broke"],
        ["works", "same", 0.0, 1.0, 0.5, ""],
    ]


@pytest.mark.slow
@pytest.mark.skipif(find_spec("vaderSentiment") is None, reason="the demo tasks need it")
def test_two_processes_evaluate_as_one(tiny_checkpoint, tmp_path):
    path = several.main([
        "--cpu", "--pretrained", str(tiny_checkpoint), "--tasks", "act_demo_sentiment",
        "--limit", "5", "--output", str(tmp_path), "--only", "eval", "--timeout", "600", "--name", "several",
    ])  # fmt: skip
    text = path.read_text()
    (row,) = json.loads(path.with_suffix(".json").read_text())["tables"][0]["rows"]
    assert row[:2] == ["eval", "same"]
    assert row[2] <= 1e-4
    assert row[5] == "requests by process: 6, 6"  # of 5 documents, one again for the shorter part
    assert "act_harness eval" in text
    assert str(tmp_path) not in text.split("## Commands")[1]
