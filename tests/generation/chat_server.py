"""A server that speaks the chat completions protocol over HTTP, with answers and faults that a test chooses."""

from __future__ import annotations

import contextlib
import json
import socket
import threading
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, Self


@dataclass(frozen=True)
class Broken:
    """A connection that is lost after half of the answer's body."""

    text: str


Reply = str | tuple[int, dict[str, Any] | bytes] | Broken
"""The text of an answer, or an HTTP status with a body; a page where that begins with <, else JSON."""


def completion(text: str | None, *, finish: str = "stop", tokens: tuple[int, int] = (11, 2)) -> dict[str, Any]:
    return {
        "id": "chatcmpl-1",
        "object": "chat.completion",
        "created": 1,
        "model": "tiny",
        "choices": [{"index": 0, "message": {"role": "assistant", "content": text}, "finish_reason": finish}],
        "usage": {"prompt_tokens": tokens[0], "completion_tokens": tokens[1], "total_tokens": sum(tokens)},
    }


def fault(message: str, *, code: str | None = None, param: str | None = None) -> dict[str, Any]:
    return {"error": {"message": message, "type": "invalid_request_error", "param": param, "code": code}}


class ChatServer:
    """reply: called with the prompt and how often it came before; seconds: that each answer takes; port: 0 for any"""

    def __init__(self, reply: Callable[[str, int], Reply], seconds: float = 0.0, port: int = 0) -> None:
        self.asked: Counter[str] = Counter()
        self.requests: list[tuple[dict[str, str], dict[str, Any]]] = []
        self.busiest = 0
        self._busy, self._lock, self._reply = 0, threading.Lock(), reply
        self._connections: set[socket.socket] = set()
        server = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"
            wbufsize = -1  # Head and body in one packet: a body that comes after waits for the client's delayed acknowledgement, 40 ms.

            def setup(self) -> None:
                super().setup()
                server._connections.add(self.connection)

            def finish(self) -> None:
                with contextlib.suppress(OSError):  # The client is gone, as after a time-out, or the server is killed.
                    super().finish()
                server._connections.discard(self.connection)

            def do_POST(self) -> None:
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                prompt = body["messages"][-1]["content"]
                with server._lock:
                    before = server.asked[prompt]
                    server.asked[prompt] += 1
                    server.requests.append(({name.lower(): value for name, value in self.headers.items()}, body | {"path": self.path}))
                    server._busy += 1
                    server.busiest = max(server.busiest, server._busy)
                time.sleep(seconds)
                with server._lock:
                    server._busy -= 1
                replied = server.answer(body, before)
                broken = isinstance(replied, Broken)
                if isinstance(replied, Broken):
                    replied = replied.text
                status, content = (200, completion(replied)) if isinstance(replied, str) else replied
                data = content if isinstance(content, bytes) else json.dumps(content).encode()
                self.send_response(status)
                self.send_header("Content-Type", "text/html" if data.startswith(b"<") else "application/json")
                self.send_header("Content-Length", str(len(data)))
                self.send_header("Retry-After-Ms", "1")
                try:
                    self.end_headers()
                    self.wfile.write(data[: len(data) // 2] if broken else data)
                    self.wfile.flush()
                    self.close_connection = broken
                except OSError:
                    self.close_connection = True

            def log_message(self, format: str, *args: Any) -> None:
                """Says nothing."""

        self._server = ThreadingHTTPServer(("127.0.0.1", port), Handler)
        self.url = f"http://127.0.0.1:{self._server.server_address[1]}/v1"
        threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()

    def answer(self, body: dict[str, Any], before: int) -> Reply:
        """body: of the request; before: how often its prompt came before. Called by several threads at once."""
        return self._reply(body["messages"][-1]["content"], before)

    def kill(self) -> None:
        """Takes no more requests and drops those under way."""
        self.__exit__()
        for connection in list(self._connections):
            with contextlib.suppress(OSError):
                connection.shutdown(socket.SHUT_RDWR)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._server.shutdown()
        self._server.server_close()
