"""A model hub for tests, on 127.0.0.1: what huggingface_hub's own client asks of one.

Repositories are lists of commits in memory. Every file goes through the commit itself (no LFS), as
the hub has small text files. What it is to do wrong next is put into ``failing``.
"""

from __future__ import annotations

import base64
import hashlib
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import unquote, urlsplit

TOKEN = "hf_writes"  # noqa: S105 - of the server below
LICENSES = ("apache-2.0", "mit", "cc-by-4.0")


@dataclass
class Repository:
    private: bool = False
    commits: dict[str, dict[str, bytes]] = field(default_factory=dict)
    branches: dict[str, str] = field(default_factory=dict)
    messages: list[str] = field(default_factory=list)

    def commit(self, branch: str, files: dict[str, bytes], message: str) -> str:
        before = self.commits.get(self.branches.get(branch, ""), {})
        text = f"{len(self.commits)} {branch} {message}"
        oid = hashlib.sha1(text.encode(), usedforsecurity=False).hexdigest()
        self.commits[oid] = {**before, **files}
        self.branches[branch] = oid
        self.messages.append(message)
        return oid

    def find(self, revision: str) -> str | None:
        return revision if revision in self.commits else self.branches.get(revision)


class HubServer:
    def __init__(self) -> None:
        self.repositories: dict[str, Repository] = {}
        self.asked: list[str] = []
        self.bodies: list[Any] = []
        self.failing: dict[str, tuple[int, str]] = {}
        """Part of a request's line to the status and text that it gets."""
        self.sizes: dict[str, int] = {}
        """File to a size that is told instead of its own."""
        self.before_commit: Any = None
        """Called once a commit is received and not yet looked at."""
        self.server = ThreadingHTTPServer(("127.0.0.1", 0), self._handler())
        self.server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self.server.server_address[1]}"

    def add(self, name: str, files: dict[str, bytes], *, private: bool = False) -> str:
        repository = self.repositories.setdefault(name, Repository(private))
        return repository.commit("main", files, "by hand")

    def files(self, name: str, branch: str = "main") -> dict[str, bytes]:
        repository = self.repositories[name]
        return repository.commits[repository.branches[branch]]

    def answer(
        self, method: str, path: str, body: bytes, token: str | None, *, as_request: bool = False
    ) -> tuple[int, Any, dict[str, str]]:
        """Return status, content (bytes as they are, else JSON) and headers.

        Args:
            as_request: a commit opens a pull request, where it lies apart from the branch.
        """
        parts = [unquote(part) for part in path.strip("/").split("/")]
        if parts[0] != "api":
            return self._file(parts, token)
        sent: Any = None
        if body:
            lines = [json.loads(line) for line in body.splitlines()]
            sent = lines if parts[-2:-1] == ["commit"] else lines[0]
            self.bodies.append(sent)
        if parts[1:] == ["validate-yaml"]:
            return _validated(sent["content"])
        if method == "POST" and token != f"Bearer {TOKEN}":
            return _error(401, "", "Invalid username or password.")
        if parts[1:] == ["repos", "create"]:
            name = f"{sent['organization']}/{sent['name']}"
            if name in self.repositories:
                return _error(409, "", "You already created this model repo")
            self.add(name, {".gitattributes": b""}, private=sent.get("visibility") == "private")
            return 200, {"url": f"{self.url}/{name}"}, {}
        name, rest = "/".join(parts[2:4]), parts[4:]
        repository = self.repositories.get(name)
        if repository is None or (repository.private and token != f"Bearer {TOKEN}"):
            return _error(401, "RepoNotFound", "Repository not found")
        return self._repository(name, repository, rest, sent, as_request=as_request)

    def _repository(
        self, name: str, repository: Repository, rest: list[str], sent: Any, *, as_request: bool
    ) -> tuple[int, Any, dict[str, str]]:
        verb, revision = rest[0] if rest else "revision", rest[1] if len(rest) > 1 else "main"
        oid = repository.find(revision)
        if verb == "branch":
            repository.branches[revision] = repository.branches["main"]
            return 200, {}, {}
        if oid is None:
            return _error(404, "RevisionNotFound", f"Invalid rev id: {revision}")
        files = repository.commits[oid]
        if verb == "revision":
            siblings = [{"rfilename": file} for file in files]
            told = {"id": name, "sha": oid, "private": repository.private, "siblings": siblings}
            return 200, told, {}
        if verb == "tree":
            return 200, [{"type": "file", "path": f, "size": 1, "oid": "0"} for f in files], {}
        if verb == "preupload":
            modes = [
                {"path": one["path"], "uploadMode": "regular", "shouldIgnore": False}
                for one in sent["files"]
            ]
            return 200, {"files": modes}, {}
        assert verb == "commit", rest
        if self.before_commit is not None:
            self.before_commit()
        header = sent[0]["value"]
        if (
            header.get("parentCommit", repository.branches[revision])
            != repository.branches[revision]
        ):
            return _error(412, "", "A commit has happened since. Please refresh and try again.")
        new = {one["value"]["path"]: base64.b64decode(one["value"]["content"]) for one in sent[1:]}
        oid = repository.commit("refs/pr/1" if as_request else revision, new, header["summary"])
        told = {"commitUrl": f"{self.url}/{name}/commit/{oid}", "commitOid": oid}
        if as_request:
            told["pullRequestUrl"] = f"{self.url}/{name}/discussions/1"
        return 200, told, {}

    def _file(self, parts: list[str], token: str | None) -> tuple[int, Any, dict[str, str]]:
        name, revision, file = "/".join(parts[:2]), parts[3], "/".join(parts[4:])
        repository = self.repositories.get(name)
        if repository is None or (repository.private and token != f"Bearer {TOKEN}"):
            return _error(401, "RepoNotFound", "Repository not found")
        oid = repository.find(revision)
        if oid is None:
            return _error(404, "RevisionNotFound", f"Invalid rev id: {revision}")
        content = repository.commits[oid].get(file)
        if content is None:
            return _error(404, "EntryNotFound", "Entry not found")
        etag = hashlib.sha1(content, usedforsecurity=False).hexdigest()
        headers = {"X-Repo-Commit": oid, "ETag": f'"{etag}"'}
        if file in self.sizes:
            headers["X-Linked-Size"] = str(self.sizes[file])
        return 200, content, headers

    def _handler(self) -> type[BaseHTTPRequestHandler]:
        outer = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def log_message(self, *_: object) -> None:
                pass

            def _do(self) -> None:
                body = self._body()
                path, query = urlsplit(self.path)[2:4]
                line = f"{self.command} {path}"
                outer.asked.append(line)
                failing = [told for part, told in outer.failing.items() if part in line]
                token, asked = self.headers.get("Authorization"), "create_pr=1" in query
                status, content, headers = (
                    _error(failing[0][0], "", failing[0][1])
                    if failing
                    else outer.answer(self.command, path, body, token, as_request=asked)
                )
                data = content if isinstance(content, bytes) else json.dumps(content).encode()
                self.send_response(status)
                for key, value in headers.items():
                    self.send_header(key, value)
                self.send_header("Content-Length", str(len(data)))
                self.end_headers()
                if self.command != "HEAD":
                    self.wfile.write(data)

            do_GET = do_HEAD = do_POST = _do  # noqa: N815 - as the base class calls them

            def _body(self) -> bytes:
                if self.headers.get("Transfer-Encoding") != "chunked":
                    return self.rfile.read(int(self.headers.get("Content-Length") or 0))
                pieces = []
                while size := int(self.rfile.readline(), 16):
                    pieces.append(self.rfile.read(size))
                    self.rfile.readline()
                self.rfile.readline()
                return b"".join(pieces)

        return Handler


def _validated(text: str) -> tuple[int, Any, dict[str, str]]:
    import yaml

    given = yaml.safe_load(text.split("---")[1])
    if given["license"] not in LICENSES:
        return 400, {"errors": [{"message": '"license" must be one of [...]'}], "warnings": []}, {}
    return 200, {"errors": [], "warnings": []}, {}


def _error(status: int, code: str, text: str) -> tuple[int, Any, dict[str, str]]:
    headers = {"X-Error-Message": text, **({"X-Error-Code": code} if code else {})}
    return status, {"error": text}, headers


@contextmanager
def running_hub() -> Iterator[HubServer]:
    hub = HubServer()
    thread = threading.Thread(target=hub.server.serve_forever, daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        hub.server.shutdown()
        hub.server.server_close()
        thread.join()
