"""A server that speaks the chat completions protocol over HTTP, with answers and faults that a test chooses."""

from __future__ import annotations

import json
import threading
import time
from collections import Counter
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

Reply = str | tuple[int, dict[str, Any] | bytes]
"""The text of an answer, or an HTTP status with a body."""


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
    """reply: called with the prompt and how often it came before; seconds: that each answer takes"""

    def __init__(self, reply: Callable[[str, int], Reply], seconds: float = 0.0) -> None:
        self.asked: Counter[str] = Counter()
        self.requests: list[tuple[dict[str, str], dict[str, Any]]] = []
        self.busiest = 0
        self._busy, self._lock = 0, threading.Lock()
        server = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

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
                replied = reply(prompt, before)
                status, content = (200, completion(replied)) if isinstance(replied, str) else replied
                data = content if isinstance(content, bytes) else json.dumps(content).encode()
                self.send_response(status)
                self.send_header("Content-Type", "text/html" if isinstance(content, bytes) else "application/json")
                self.send_header("Content-Length", str(len(data)))
                self.send_header("Retry-After-Ms", "1")
                self.end_headers()
                self.wfile.write(data)

            def log_message(self, format: str, *args: Any) -> None:
                """Says nothing."""

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self._server.server_address[1]}/v1"
        threading.Thread(target=self._server.serve_forever, daemon=True).start()

    def __enter__(self) -> ChatServer:
        return self

    def __exit__(self, *_: object) -> None:
        self._server.shutdown()
        self._server.server_close()
