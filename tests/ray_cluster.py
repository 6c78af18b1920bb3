"""A real Ray cluster of several nodes on this machine, started as an operator would, with ports and directories of its own."""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import psutil

RAY = str(Path(sys.executable).parent / "ray")
START_SECONDS = 180.0

ENVIRONMENT = os.environ | {"RAY_worker_niceness": "0", "RAY_AUTH_MODE": "disabled"}
"""For nodes and clients alike; ports are open to this machine alone."""


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


class RayCluster:
    """A head that takes no work and ``workers`` nodes of one core each. Ends only processes that it started.

    environment: variables of the nodes, besides those of this process.
    """

    def __init__(self, workers: int = 2, environment: dict[str, str] | None = None) -> None:
        self._environment = ENVIRONMENT | (environment or {})
        # Ray's socket paths must be short; nodes that share a directory delete each other's uploaded files.
        self._directory = tempfile.mkdtemp(prefix="rc", dir="/tmp")
        self.gcs_port, self.dashboard_port = free_port(), free_port()
        self._nodes: list[subprocess.Popen[bytes]] = []
        head = ["--head", f"--port={self.gcs_port}", f"--dashboard-port={self.dashboard_port}", "--include-dashboard=true", "--num-cpus=0"]
        self._start([*head, f"--temp-dir={self._directory}/head"])
        try:
            self._wait(lambda: _answers(self.dashboard_port))
            for number in range(workers):
                self._start([f"--address=127.0.0.1:{self.gcs_port}", "--num-cpus=1", f"--temp-dir={self._directory}/{number}"])
            self._wait(lambda: self._alive() == workers + 1)
        except RuntimeError:
            self.stop()
            raise

    @property
    def address(self) -> str:
        return f"127.0.0.1:{self.gcs_port}"

    @property
    def dashboard(self) -> str:
        return f"http://127.0.0.1:{self.dashboard_port}"

    def _start(self, arguments: list[str]) -> None:
        agent = (
            f"--dashboard-agent-listen-port={free_port()}"  # Its default is one port for all clusters of a machine, and takes the jobs of whoever was first.
        )
        command = [RAY, "start", "--block", "--disable-usage-stats", "--object-store-memory=200000000", agent, *arguments]
        self._nodes.append(subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, env=self._environment, start_new_session=True))

    def _alive(self) -> int:
        """Nodes that the head knows and hears of."""
        from ray.util.state import list_nodes
        from ray.util.state.exception import RayStateApiException

        try:
            return sum(node.state == "ALIVE" for node in list_nodes(address=self.dashboard, timeout=5))
        except RayStateApiException:
            return 0

    @staticmethod
    def _wait(ready: Callable[[], bool]) -> None:
        deadline = time.monotonic() + START_SECONDS
        while not ready():
            if time.monotonic() > deadline:
                raise RuntimeError(f"the Ray cluster was not up within {START_SECONDS:.0f} s")
            time.sleep(0.2)

    def stop(self) -> None:
        processes = []
        for node in reversed(self._nodes):
            if node.poll() is None:
                processes += [psutil.Process(node.pid), *psutil.Process(node.pid).children(recursive=True)]
        for process in processes:
            try:
                process.kill()
            except psutil.NoSuchProcess:
                continue
        psutil.wait_procs(processes, timeout=10)
        shutil.rmtree(self._directory, ignore_errors=True)


def _answers(port: int) -> bool:
    with socket.socket() as probe:
        probe.settimeout(0.5)
        return probe.connect_ex(("127.0.0.1", port)) == 0
