"""A proxy before the S3 server that makes it behave as object stores do on a bad day: 503s, resets, slow answers."""

from __future__ import annotations

import http.client
import random
import threading
import time
from collections import Counter
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

SLOW_DOWN = b'<?xml version="1.0"?><Error><Code>SlowDown</Code><Message>Please reduce your request rate.</Message></Error>'


class BadDay:
    """Forwards to ``port`` of ``host``, where it listens too; of the requests, seeded, shares are refused with 503, cut off, and answered late."""

    def __init__(self, port: int, *, refused: float, cut: float, slow: float, slow_seconds: float, seed: int = 0, host: str = "127.0.0.1") -> None:
        chance, lock = random.Random(seed), threading.Lock()
        self.counts: Counter[str] = Counter()
        counts = self.counts

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def forward(self) -> None:
                body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
                with lock:
                    draw = chance.random()
                if draw < refused:
                    counts["refused"] += 1
                    self.answer(503, {"Content-Type": "application/xml"}, SLOW_DOWN)
                    return
                if draw < refused + cut:
                    counts["cut"] += 1
                    self.close_connection = True
                    self.connection.close()
                    return
                if draw < refused + cut + slow:
                    counts["slow"] += 1
                    time.sleep(slow_seconds)
                counts["forwarded"] += 1
                upstream = http.client.HTTPConnection(host, port, timeout=30)
                upstream.request(self.command, self.path, body=body, headers=dict(self.headers))
                response = upstream.getresponse()
                self.answer(response.status, dict(response.getheaders()), response.read())
                upstream.close()

            def answer(self, status: int, headers: dict[str, str], body: bytes) -> None:
                self.send_response_only(status)
                for name, value in headers.items():
                    if name.lower() not in ("transfer-encoding", "connection") and not (name.lower() == "content-length" and self.command != "HEAD"):
                        self.send_header(name, value)
                if self.command != "HEAD":
                    self.send_header("Content-Length", str(len(body)))
                self.end_headers()
                if self.command != "HEAD":
                    self.wfile.write(body)

            do_GET = do_PUT = do_HEAD = do_DELETE = do_POST = forward

            def log_message(self, format: str, *args: object) -> None:
                return

        self._server = ThreadingHTTPServer((host, 0), Handler)
        self._server.daemon_threads = True
        self.endpoint_url = f"http://{host}:{self._server.server_address[1]}"
        threading.Thread(target=self._server.serve_forever, daemon=True).start()

    def stop(self) -> None:
        self._server.shutdown()
        self._server.server_close()
