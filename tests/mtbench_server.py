"""An OpenAI-compatible chat server for tests, on 127.0.0.1, that can misbehave on purpose.

What it does next is decided by ``behave(prompt, times)``: the text of the user's message and how
often it has come before. It answers at most ``limit`` requests, so that a client that never stops
fails its test instead of hanging it.
"""

from __future__ import annotations

import json
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any


@dataclass(frozen=True)
class Say:
    """One reply; the default is a good one."""

    text: str = "Fine. Grade: [[7]]"
    status: int = 200
    body: str | None = None
    """Sent as it is, instead of a chat completion."""
    headers: dict[str, str] = field(default_factory=dict)
    finish: str = "stop"
    delay: float = 0.0
    half: bool = False
    """Announce the whole body and close the connection after half of it."""


class JudgeServer:
    def __init__(self, behave: Callable[[str, int], Say], limit: int) -> None:
        self.behave, self.limit = behave, limit
        self.prompts: Counter[str] = Counter()
        self.keys: set[str] = set()
        self.requests: list[dict[str, Any]] = []
        self.lock = threading.Lock()
        self.server = ThreadingHTTPServer(("127.0.0.1", 0), self._handler())
        self.server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self.server.server_address[1]}/v1"

    @property
    def calls(self) -> int:
        return len(self.requests)

    def _handler(self) -> type[BaseHTTPRequestHandler]:
        outer = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def log_message(self, *_: object) -> None:
                pass

            def do_POST(self) -> None:
                length = int(self.headers["content-length"])
                request = json.loads(self.rfile.read(length))
                prompt = request["messages"][-1]["content"]
                with outer.lock:
                    outer.requests.append(request)
                    outer.keys.add(self.headers.get("authorization", ""))
                    times = outer.prompts[prompt]
                    outer.prompts[prompt] += 1
                    full = len(outer.requests) > outer.limit
                say = Say(status=401, body='{"error": "limit"}') if full else None
                self._send(say or outer.behave(prompt, times))

            def _send(self, say: Say) -> None:
                time.sleep(say.delay)
                body = say.body
                if body is None:
                    message = {"role": "assistant", "content": say.text}
                    choice = {"index": 0, "message": message, "finish_reason": say.finish}
                    usage = {"prompt_tokens": 11, "completion_tokens": 5, "total_tokens": 16}
                    fixed = {"id": "x", "object": "chat.completion", "created": 0, "model": "m"}
                    body = json.dumps({**fixed, "choices": [choice], "usage": usage})
                data = body.encode()
                try:
                    self.send_response(say.status)
                    self.send_header("content-type", "application/json")
                    self.send_header("content-length", str(len(data)))
                    for name, value in say.headers.items():
                        self.send_header(name, value)
                    self.end_headers()
                    self.wfile.write(data[: len(data) // 2] if say.half else data)
                except OSError:  # the client has gone: a test of time-outs
                    pass
                self.close_connection = self.close_connection or say.half

        return Handler


@contextmanager
def serving(
    behave: Callable[[str, int], Say] = lambda prompt, times: Say(), *, limit: int = 500
) -> Iterator[JudgeServer]:
    server = JudgeServer(behave, limit)
    thread = threading.Thread(target=server.server.serve_forever, args=(0.02,), daemon=True)
    thread.start()
    try:
        yield server
    finally:
        server.server.shutdown()
        server.server.server_close()
        thread.join()
