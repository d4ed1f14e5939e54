"""Reading W&B's run files back, and servers that are not there or refuse the key."""

from __future__ import annotations

import http.server
import json
import socket
import struct
import threading
import time
from pathlib import Path

import pytest

wandb = pytest.importorskip("wandb")

KEY = "0123456789" * 4


@pytest.fixture
def quiet_wandb(tmp_path_factory, monkeypatch):
    """No key, no configuration and no home but the test's own."""
    home = tmp_path_factory.mktemp("home")
    for name in ("WANDB_API_KEY", "WANDB_MODE", "WANDB_BASE_URL", "WANDB_DIR"):
        monkeypatch.delenv(name, raising=False)
    for name in ("HOME", "WANDB_CONFIG_DIR", "WANDB_CACHE_DIR", "WANDB_DATA_DIR"):
        monkeypatch.setenv(name, str(home))
    monkeypatch.setenv("WANDB_ERROR_REPORTING", "false")


def records(path):
    """Records of a run file so far: LevelDB's log format after a header of seven bytes."""
    data, position, whole = path.read_bytes(), 7, b""
    assert b":W&B".startswith(data[:4])  # a part of it while it is being written
    while position + 7 <= len(data):
        left = 32768 - position % 32768
        if left < 7:
            position += left
            continue
        _, length, kind = struct.unpack("<IHB", data[position : position + 7])
        if position + 7 + length > len(data):
            return  # being written
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
    until = time.monotonic() + 120
    while not any(record.HasField("exit") for record in records(path)):
        assert time.monotonic() < until, f"{path} has no end"
        time.sleep(0.05)


class Read:
    """What a run file holds, once W&B's background process has written all of it."""

    def __init__(self, path):
        self.path = Path(path)
        wait_for_the_end(self.path)
        self.config, self.summary, self.history = {}, {}, []
        self.artifacts, self.run, self.exit_code = [], None, None
        for record in records(self.path):
            kind = record.WhichOneof("record_type")
            if kind == "run":
                self.run = record.run
                items(record.run.config.update, self.config)
            elif kind == "config":
                items(record.config.update, self.config)
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

    def table(self, key):
        """The last table of that name, a dictionary a row."""
        stored = json.loads(self.file(self.logged(key)[-1]).read_text())
        return [dict(zip(stored["columns"], row, strict=True)) for row in stored["data"]]

    def scalars(self):
        """The last value of every number, and what went to the summary alone."""
        found = dict(self.summary)
        for step in self.history:
            found |= {k: v for k, v in step.items() if not isinstance(v, dict)}
        return found

    def head_sets(self):
        """Name and content hash of each head set, and whether the run used it."""
        return {
            one.name: ([(f.path, f.digest) for f in one.manifest.contents], one.use_after_commit)
            for one in self.artifacts
            if one.type == "head-set"
        }


def run_files(folder):
    """All run files below a folder's own ``wandb``, by when their runs began."""

    def began(path):  # the files are written in the background, in any order
        wait_for_the_end(path)
        (run, *_) = (record.run for record in records(path) if record.HasField("run"))
        return run.start_time.ToNanoseconds()

    return sorted(Path(folder).glob("wandb/offline-run-*/*.wandb"), key=began)


def only_run(folder):
    (path,) = run_files(folder)
    return Read(path)


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
