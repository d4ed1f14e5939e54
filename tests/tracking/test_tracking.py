"""Runs of W&B in offline mode, read back from their run files; a server that refuses; no server."""

from __future__ import annotations

import contextlib
import json
import logging
import sys
import threading

import pytest
from wandb_files import (
    KEY,
    items,
    no_server,  # noqa: F401
    only_run,
    quiet_wandb,  # noqa: F401
    records,
    refusing_server,  # noqa: F401
    wait_for_the_end,
)

from act_harness.errors import InfrastructureError, InputError, ResultError
from act_harness.support import atomic
from act_harness.tracking import wandb_run as tracking

wandb = pytest.importorskip("wandb")

OFFLINE = tracking.TrackingSettings(project="p", group="g", tags=("t",), mode="offline")


@pytest.fixture(scope="module", autouse=True)
def stop_wandb():
    yield
    wandb.teardown()


pytestmark = pytest.mark.usefixtures("quiet_wandb")


def open_offline(folder, *, job_type="act", name="m__act", settings=OFFLINE, **config):
    return tracking.open_tracker(
        settings, job_type=job_type, name=name, config={"arm": "act", **config}, folder=folder
    )


def test_an_offline_run_is_complete(tmp_path):
    heads = tmp_path / "heads.json"
    heads.write_text('{"heads": {"1": [2]}}')
    picture = tmp_path / "map.png"
    from matplotlib.image import imsave

    imsave(picture, [[0.0, 1.0], [1.0, 0.0]])
    config = {"artifact": {"heads": {"1": [2, 3]}, "calibration": {"beta": 0.4}}, "seed": None}
    with open_offline(tmp_path, **config) as tracker:
        assert tracker.run_id
        tracker.scalars({"org/task/acc": 0.5, "t/acc": 1, "none": None, "nan": float("nan"),
                         "t/acc_verdict": "improved", "yes": True})  # fmt: skip
        tracker.table("samples/org/task", ["id", "target"], [[0, 1], [1, ["a", "b"]], [2, None]])
        tracker.table("empty", ["a"], [])
        tracker.image("head_map", picture, caption="heads")
        tracker.artifact("org/heads", [heads], kind="head-set", used=True, metadata={"n": 1})
        tracker.artifact("made", [heads], kind="head-set", used=False)

    found = only_run(tmp_path)
    assert (found.run.run_group, found.run.job_type) == ("g", "act")
    assert (found.run.project, found.run.display_name) == ("p", "m__act")
    assert list(found.run.tags) == ["t"]
    assert found.config["arm"] == "act"
    assert found.config["artifact"] == config["artifact"]
    assert found.logged("org/task/acc") == [0.5]
    assert found.logged("t/acc") == [1]
    assert found.summary["t/acc_verdict"] == "improved"
    assert found.summary["yes"] is True
    assert (found.summary["none"], found.summary["nan"]) == (None, None)
    (table,) = found.logged("samples/org/task")
    stored = json.loads(found.file(table).read_text())
    assert stored["data"] == [[0, "1"], [1, '["a", "b"]'], [2, None]]
    (image,) = found.logged("head_map")
    assert found.file(image).read_bytes()[:4] == b"\x89PNG"
    assert image["caption"] == "heads"
    used = {one.name: one.use_after_commit for one in found.artifacts if one.type == "head-set"}
    assert used == {"org-heads": True, "made": False}
    (kept,) = [one for one in found.artifacts if one.name == "org-heads"]
    assert [entry.path for entry in kept.manifest.contents] == ["heads.json"]
    assert json.loads(kept.metadata) == {"n": 1}
    assert found.exit_code == 0


def test_a_resumed_command_continues_its_run_and_arms_have_their_own(tmp_path):
    ids = []
    for job_type, name in (("act", "m"), ("baseline", "m"), ("act", "m"), ("act", "other")):
        with open_offline(tmp_path, job_type=job_type, name=name) as tracker:
            tracker.scalars({"x": 1})
            ids.append(tracker.run_id)
    assert ids[0] == ids[2]
    assert len(set(ids)) == 3
    assert set(json.loads((tmp_path / tracking.RUN_IDS).read_text()).values()) == set(ids)


def test_runs_that_start_at_once_keep_their_ids(tmp_path, monkeypatch):
    """Each read the list before the other had written it, so one id was lost: a second run."""
    slow = threading.Barrier(2)
    write = tracking.write_json

    def write_together(*given, **more):
        with contextlib.suppress(threading.BrokenBarrierError):
            slow.wait(0.5)
        return write(*given, **more)

    monkeypatch.setattr(tracking, "write_json", write_together)
    found = {}

    def start(name):
        found[name] = tracking._run_id(tmp_path, OFFLINE, "act", name, None)

    both = [threading.Thread(target=start, args=(name,)) for name in ("a", "b")]
    for one in both:
        one.start()
    for one in both:
        one.join()
    assert len(found) == 2
    kept = json.loads((tmp_path / tracking.RUN_IDS).read_text())
    assert sorted(kept.values()) == sorted(found.values())


def test_another_identity_is_another_run(tmp_path):
    def run_id(**identity):
        with tracking.open_tracker(
            OFFLINE, job_type="act", name="n", config={}, folder=tmp_path, identity=identity
        ) as tracker:
            assert "wandb sync" in tracker.describe()
            return tracker.run_id

    assert run_id(tasks=("a",), limit=None) == run_id(limit=None, tasks=["a"])
    assert run_id(tasks=("b",), limit=None) != run_id(tasks=("a",), limit=None)


def test_both_arms_may_be_open_at_once(tmp_path):
    with open_offline(tmp_path, job_type="baseline", name="a") as one:
        with open_offline(tmp_path, job_type="act", name="b") as two:
            two.scalars({"x": 2})
        one.scalars({"x": 1})
    assert (one.run_id, two.run_id) == (None, None)  # closed
    values = []
    for path in tmp_path.glob("wandb/offline-run-*/*.wandb"):
        wait_for_the_end(path)
        values += [items(r.history.item)["x"] for r in records(path) if r.HasField("history")]
    assert sorted(values) == [1, 2]


def test_an_exception_marks_the_run_as_failed(tmp_path):
    with pytest.raises(ZeroDivisionError), open_offline(tmp_path):
        raise ZeroDivisionError
    assert only_run(tmp_path).exit_code == 1


def test_a_broken_list_of_run_ids_is_named(tmp_path):
    (tmp_path / tracking.RUN_IDS).write_text("{")
    expected = r"wandb_runs\.json is not JSON .*delete it to start new runs"
    with pytest.raises(ResultError, match=expected):
        open_offline(tmp_path)


# -- nothing to track ------------------------------------------------------------------------------


@pytest.mark.parametrize(("settings", "rank"), [(None, 0), (OFFLINE, 1)])
def test_the_null_tracker_takes_everything(tmp_path, settings, rank):
    with tracking.open_tracker(
        settings, job_type="act", name="n", config={}, folder=tmp_path, rank=rank
    ) as tracker:
        tracker.scalars({"x": object()})
        tracker.table("t", [], [])
        tracker.image("i", "no such file")
        tracker.artifact("a", ["no such file"], kind="k", used=True)
        tracker.configure({"x": 1})
        assert (tracker.run_id, tracker.url, tracker.describe()) == (None, None, "")
    assert list(tmp_path.iterdir()) == []


def test_disabled_means_nothing_is_tracked(tmp_path, monkeypatch):
    monkeypatch.setenv("WANDB_MODE", "disabled")
    settings = tracking.TrackingSettings(project="p")
    with tracking.open_tracker(
        settings, job_type="act", name="n", config={}, folder=tmp_path
    ) as tracker:
        assert tracker.run_id is None
    assert list(tmp_path.iterdir()) == []


def test_without_wandb_the_pip_line_is_named(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(InputError, match=r"needs wandb.*pip install 'wandb>"):
        open_offline(tmp_path)
    assert isinstance(tracking.active_run(), tracking.NullTracker)


def test_a_run_that_lm_eval_opened_is_used_and_left_open(tmp_path):
    assert isinstance(tracking.active_run(), tracking.NullTracker)
    run = wandb.init(project="q", dir=tmp_path, mode="offline", settings={"silent": True})
    try:
        with tracking.active_run() as tracker:
            tracker.scalars({"counters/share": 0.25})
            tracker.table("heads", ["layer"], [[1]])
            tracker.configure({"arm": "act"})
        run.log({"after": 1}, step=1)  # a step of the owner's choice, none of which was used up
    finally:
        run.finish()
    found = only_run(tmp_path)
    assert found.logged("counters/share") == [0.25]
    assert found.logged("after") == [1]
    assert found.table("heads") == [{"layer": 1}]
    assert found.config["arm"] == "act"


def test_a_failure_in_a_run_of_lm_evals_never_ends_the_evaluation(monkeypatch, caplog):
    from act_harness.tracking import arms as tracked_runs

    lax = tracking.WandbTracker(Broken(), settings=online(strict=False), owned=False)
    monkeypatch.setattr(Broken, "config", {}, raising=False)
    monkeypatch.setattr(tracked_runs, "active_run", lambda: lax)
    tracked_runs.log_to_open_run({"arm": "baseline", "counters": {"share": 1}}, None)
    assert caplog.text.count("going on without W&B") == 1


# -- failures --------------------------------------------------------------------------------------


def online(strict):
    return tracking.TrackingSettings(mode="online", strict=strict, start_timeout=1)


def check_strict(tmp_path):
    results = tmp_path / "results.json"
    atomic.write_text(results, "{}")
    with pytest.raises(InfrastructureError, match="opening a run failed") as error:
        open_offline(tmp_path, settings=online(strict=True))
    text = str(error.value)
    assert f"the results are saved in {tmp_path}" in text
    assert "WANDB_API_KEY" in text
    assert "--no-wandb-strict" in text
    assert KEY not in text
    assert "\n" not in text
    assert error.value.exit_code == 3
    assert results.read_text() == "{}"


@pytest.mark.usefixtures("no_server")
def test_no_server(tmp_path, caplog):
    check_strict(tmp_path / "strict")
    caplog.set_level(logging.WARNING, logger="act_harness.tracking.wandb_run")
    with open_offline(tmp_path, settings=online(strict=False)) as tracker:
        tracker.scalars({"x": 1})
        tracker.table("t", ["a"], [[1]])
        assert tracker.run_id is None
    ours = [record for record in caplog.records if record.name == "act_harness.tracking.wandb_run"]
    assert len(ours) == 1
    assert "going on without W&B" in ours[0].message


@pytest.mark.usefixtures("refusing_server")
def test_wrong_key(tmp_path):
    check_strict(tmp_path)


class Broken:
    """A run whose every call fails."""

    id, url, offline = "x", None, False

    def log(self, values, commit=True):
        raise wandb.Error(f"lost the line\nkey {KEY}")

    def finish(self, exit_code=0):
        raise TimeoutError("upload")


def test_a_failure_on_the_way(monkeypatch, caplog):
    monkeypatch.setenv("WANDB_API_KEY", KEY)
    strict = tracking.WandbTracker(Broken(), settings=online(strict=True), where="out")
    with pytest.raises(InfrastructureError, match="logging scalars failed") as error, strict:
        strict.scalars({"x": 1})
    assert "lost the line key ***" in str(error.value)
    lax = tracking.WandbTracker(Broken(), settings=online(strict=False), where="out")
    with lax:
        lax.scalars({"x": 1})
        lax.scalars({"x": 2})
    assert sum("going on without" in record.message for record in caplog.records) == 1
    bug = tracking.WandbTracker(Broken(), settings=online(strict=False))
    monkeypatch.setattr(Broken, "log", lambda self, values: {}["a bug of ours"])
    with pytest.raises(KeyError):
        bug.scalars({"x": 1})
    late = tracking.WandbTracker(Broken(), settings=online(strict=True))
    with pytest.raises(InfrastructureError, match=r"closing the run failed .TimeoutError: upload"):
        late.finish()


def test_the_first_error_is_the_one_that_is_raised(caplog):
    tracker = tracking.WandbTracker(Broken(), settings=online(strict=True))
    with pytest.raises(ZeroDivisionError), tracker:
        raise ZeroDivisionError
    assert "closing the run failed" in caplog.text
