"""Runs of W&B in offline mode, read back from their run files; a server that refuses; no server."""

from __future__ import annotations

import http.server
import json
import logging
import socket
import struct
import sys
import threading
import time

import pytest

from act_harness import atomic, tracking
from act_harness.errors import InfrastructureError, InputError, ResultError

wandb = pytest.importorskip("wandb")

OFFLINE = tracking.TrackingSettings(project="p", group="g", tags=("t",), mode="offline")
KEY = "0123456789" * 4


@pytest.fixture(autouse=True)
def quiet_wandb(tmp_path, monkeypatch):
    """No key, no configuration and no home but the test's own."""
    for name in ("WANDB_API_KEY", "WANDB_MODE", "WANDB_BASE_URL", "WANDB_DIR"):
        monkeypatch.delenv(name, raising=False)
    for name in ("HOME", "WANDB_CONFIG_DIR", "WANDB_CACHE_DIR", "WANDB_DATA_DIR"):
        monkeypatch.setenv(name, str(tmp_path / "home"))
    monkeypatch.setenv("WANDB_ERROR_REPORTING", "false")


@pytest.fixture(scope="module", autouse=True)
def stop_wandb():
    yield
    wandb.teardown()


def records(path):
    """All records of a run file: LevelDB's log format after a header of seven bytes."""
    data, position, whole = path.read_bytes(), 7, b""
    assert data[:4] == b":W&B"
    while position + 7 <= len(data):
        left = 32768 - position % 32768
        if left < 7:
            position += left
            continue
        _, length, kind = struct.unpack("<IHB", data[position : position + 7])
        whole += data[position + 7 : position + 7 + length]
        position += 7 + length
        if kind in (1, 4):  # a full record, or the last part of one
            record = wandb.proto.wandb_internal_pb2.Record()
            record.ParseFromString(whole)
            whole = b""
            yield record


def items(updates, into=None):
    """Updates of config, history or summary as nested dictionaries."""
    found = {} if into is None else into
    for update in updates:
        *outer, last = list(update.nested_key) or [update.key]
        place = found
        for name in outer:
            place = place.setdefault(name, {})
        place[last] = json.loads(update.value_json)
    return found


def wait_for_the_end(path):
    """Closing a run returns before its file is flushed; a command's own end waits for that."""
    for _ in range(300):
        if any(record.HasField("exit") for record in records(path)):
            return
        time.sleep(0.05)
    raise AssertionError(f"{path} has no end")


class Read:
    """What a run file holds, once W&B's background process has written all of it."""

    def __init__(self, folder):
        (self.path,) = folder.glob("wandb/offline-run-*/*.wandb")
        wait_for_the_end(self.path)
        self.config, self.summary, self.history = {}, {}, []
        self.artifacts, self.run, self.exit_code = [], None, None
        for record in records(self.path):
            kind = record.WhichOneof("record_type")
            if kind == "run":
                self.run = record.run
                items(record.run.config.update, self.config)
            elif kind == "history":
                self.history.append(items(record.history.item))
            elif kind == "summary":
                items(record.summary.update, self.summary)
            elif kind == "artifact":
                self.artifacts.append(record.artifact)
            elif kind == "exit":
                self.exit_code = record.exit.exit_code

    def logged(self, key):
        return [step[key] for step in self.history if key in step]

    def file(self, value):
        return self.path.parent / "files" / value["path"]


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

    found = Read(tmp_path)
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
    assert Read(tmp_path).exit_code == 1


def test_a_broken_list_of_run_ids_is_named(tmp_path):
    (tmp_path / tracking.RUN_IDS).write_text("{")
    with pytest.raises(ResultError, match=r"wandb_runs\.json: not a list of W&B runs"):
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
        assert (tracker.run_id, tracker.url) == (None, None)
    assert list(tmp_path.iterdir()) == []


def test_without_wandb_the_pip_line_is_named(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(InputError, match=r"needs wandb.*pip install 'act-harness\[wandb\]'"):
        open_offline(tmp_path)
    assert isinstance(tracking.active_run(), tracking.NullTracker)


def test_a_run_that_lm_eval_opened_is_used_and_left_open(tmp_path):
    assert isinstance(tracking.active_run(), tracking.NullTracker)
    run = wandb.init(project="q", dir=tmp_path, mode="offline", settings={"silent": True})
    try:
        with tracking.active_run() as tracker:
            tracker.scalars({"counters/share": 0.25})
        run.log({"after": 1})
    finally:
        run.finish()
    found = Read(tmp_path)
    assert found.logged("counters/share") == [0.25]
    assert found.logged("after") == [1]


# -- failures --------------------------------------------------------------------------------------


def online(strict):
    return tracking.TrackingSettings(mode="online", strict=strict, start_timeout=1)


@pytest.fixture
def no_server(monkeypatch):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    monkeypatch.setenv("WANDB_BASE_URL", f"http://127.0.0.1:{port}")
    monkeypatch.setenv("WANDB_API_KEY", KEY)


@pytest.fixture
def refusing_server(monkeypatch):
    class Refuse(http.server.BaseHTTPRequestHandler):
        def do_POST(self):
            self.rfile.read(int(self.headers.get("content-length", 0)))
            self.send_response(401)
            self.send_header("content-length", "2")
            self.end_headers()
            self.wfile.write(b"{}")

        def do_GET(self):
            self.do_POST()

        def log_message(self, *arguments):
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Refuse)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    monkeypatch.setenv("WANDB_BASE_URL", f"http://127.0.0.1:{server.server_port}")
    monkeypatch.setenv("WANDB_API_KEY", KEY)
    yield
    server.shutdown()
    server.server_close()


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
    caplog.set_level(logging.WARNING, logger="act_harness.tracking")
    with open_offline(tmp_path, settings=online(strict=False)) as tracker:
        tracker.scalars({"x": 1})
        tracker.table("t", ["a"], [[1]])
        assert tracker.run_id is None
    ours = [record for record in caplog.records if record.name == "act_harness.tracking"]
    assert len(ours) == 1
    assert "going on without W&B" in ours[0].message


@pytest.mark.usefixtures("refusing_server")
def test_wrong_key(tmp_path):
    check_strict(tmp_path)


class Broken:
    """A run whose every call fails."""

    id, url, offline = "x", None, False

    def log(self, values):
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
