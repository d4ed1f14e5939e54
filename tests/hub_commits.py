"""A stand-in for the hub on 127.0.0.1: takes commits to model repositories from its client."""

from __future__ import annotations

import base64
import json
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any


class Hub:
    """What the client was told and what it sent."""

    def __init__(self, repositories: set[str], refuse: int | None) -> None:
        self.repositories, self.refuse = repositories, refuse
        self.files: dict[str, bytes] = {}
        self.commits: list[dict[str, Any]] = []
        self.url = ""

    def answer(self, path: str, body: bytes) -> tuple[int, dict[str, Any], str | None]:
        """Return status, body and the hub's error code."""
        found = re.fullmatch(r"/api/models/([^/]+/[^/]+)/(preupload|commit)/main(\?.*)?", path)
        if found is None or found[1] not in self.repositories:
            return 404, {"error": "Repository not found"}, "RepoNotFound"
        if found[2] == "preupload":
            files = [
                {"path": one["path"], "uploadMode": "regular", "shouldIgnore": False}
                for one in json.loads(body)["files"]
            ]
            return 200, {"files": files}, None
        if self.refuse is not None:
            return self.refuse, {"error": "You may not write here"}, None
        lines = [json.loads(line) for line in body.splitlines()]
        for line in lines:
            if line["key"] == "file":
                self.files[line["value"]["path"]] = base64.b64decode(line["value"]["content"])
        self.commits.append(lines[0]["value"] | {"query": found[3] or ""})
        address = f"{self.url}/{found[1]}"
        done = {"commitUrl": f"{address}/commit/abc", "commitOid": "abc"}
        if "create_pr=1" in (found[3] or ""):
            done["pullRequestUrl"] = f"{address}/discussions/1"
        return 200, done, None


@contextmanager
def serve_hub(*repositories: str, refuse: int | None = None) -> Iterator[Hub]:
    """Serve a hub that has these repositories and, if asked, refuses commits with a status."""
    hub = Hub(set(repositories), refuse)

    class Handler(BaseHTTPRequestHandler):
        def log_message(self, *_: object) -> None:
            pass

        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers.get("content-length", 0)))
            status, answer, code = hub.answer(self.path, body)
            data = json.dumps(answer).encode()
            self.send_response(status)
            self.send_header("content-type", "application/json")
            self.send_header("content-length", str(len(data)))
            if code is not None:
                self.send_header("x-error-code", code)
            self.end_headers()
            self.wfile.write(data)

        def do_GET(self) -> None:
            self.do_POST()

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    hub.url = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
