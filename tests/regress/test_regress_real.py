"""The shipped goldens on the real SmolLM2: a clean checkout passes, small changes do not."""

from __future__ import annotations

import shutil
from importlib.util import find_spec

import pytest
from regress_suites import changed_artifact, demo_tasks, drop_head, raise_beta, tasks_with

from act_harness.harness import task_lookup
from act_harness.regress import RegressSettings, run_regress
from act_harness.support import paths

if find_spec("vaderSentiment") is None:  # importing it would hide the lexicon of other tests
    pytest.skip("the demo tasks need vaderSentiment", allow_module_level=True)

SUITE = "smollm2-goldens"
TASK = "act_demo_sentiment"


@pytest.fixture
def regress(smollm, tmp_path, monkeypatch):
    """Run the shipped suite on a few documents."""
    monkeypatch.setattr("lm_eval.evaluator.add_env_info", lambda storage: None)  # asks pip
    monkeypatch.setattr(task_lookup, "_manager", lambda *given: demo_tasks())

    def run(**more):
        return run_regress(
            RegressSettings(SUITE, pretrained=str(smollm), output=tmp_path / "out", **more)
        )

    return run


@pytest.mark.slow
def test_a_clean_checkout_passes(regress):
    found = regress(limit=16)
    assert found.findings == ()
    assert len(found.drifts) == 4
    for row in found.drifts:
        assert (row.documents, row.flips, row.drift <= found.tolerance) == (16, 0, True)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("change", "told"),
    [(raise_beta, "beta 0.4 then, 0.41 now"), (drop_head, "without 1 heads (layer.head 2.0)")],
)
def test_a_changed_head_set_fails(regress, monkeypatch, tmp_path, change, told):
    folder = tmp_path / "artifacts"
    shutil.copytree(paths.artifacts_path(), folder)
    file = folder / "smollm2-135m-instruct" / "demo.json"
    changed_artifact(file, file, change)
    monkeypatch.setattr(paths, "artifacts_path", lambda: folder)
    found = regress(limit=4, tasks=(TASK,))
    assert found.exit_code == 1
    lines = {one.kind: one for one in found.findings}
    assert {one.arm for one in found.findings} == {"demo"}
    assert {one.task for one in found.findings} == {TASK}
    assert told in lines["artifact changed"].text
    # Not the file's hash alone: the scores were compared and moved, all of them.
    assert "4 of 4 documents" in lines["drift"].text
    (drift,) = (row.drift for row in found.drifts if row.arm == "demo")
    assert drift > 3 * found.tolerance
    (drift,) = (row.drift for row in found.drifts if row.arm == "baseline")
    assert drift <= found.tolerance


@pytest.mark.slow
def test_one_changed_character_of_a_prompt_fails(regress, monkeypatch, tmp_path):
    changed = demo_tasks(tasks_with(tmp_path, "Decide", "decide"))
    monkeypatch.setattr(task_lookup, "_manager", lambda *given: changed)
    found = regress(limit=4, tasks=(TASK,))
    assert found.exit_code == 1
    lines = {(one.kind, one.arm): one for one in found.findings}
    assert {one.task for one in found.findings} == {TASK}
    assert "4 of 4 documents" in lines["prompt changed", None].text
    for arm in ("baseline", "demo"):
        assert "4 of 4 documents" in lines["drift", arm].text
