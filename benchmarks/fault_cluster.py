"""A Ray cluster on this machine that can lose its parts: nodes, head, and the network between them.

As root each node runs in a network namespace of its own, with a virtual cable to a bridge that has one address for the head and one for S3: a cut lets
nothing that the node sends reach one of these. Ends only processes that it started.
"""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import psutil

sys.path.insert(0, str(Path(__file__).parents[1]))

from tests.ray_cluster import ENVIRONMENT, RAY, START_SECONDS, free_port

NODES = 2
BRIDGE, SUBNET = "llmembfaults", "10.213.0"
NOWHERE = "02:00:00:00:00:99"
"""A link address that no card has."""


def ip(*arguments: str, check: bool = True) -> None:
    subprocess.run(["ip", *arguments], check=check, capture_output=True)


@dataclass(frozen=True)
class Network:
    """separate: whether nodes have networks of their own."""

    separate: bool

    @classmethod
    @contextmanager
    def open(cls) -> Iterator[Network]:
        if os.geteuid() != 0 or shutil.which("ip") is None:
            yield cls(separate=False)
            return
        cls._remove()  # Of a run that was killed.
        try:
            ip("link", "add", BRIDGE, "type", "bridge")
            for host in (1, 2):
                ip("addr", "add", f"{SUBNET}.{host}/24", "dev", BRIDGE)
            ip("link", "set", BRIDGE, "up")
            for node in range(NODES):
                space = f"{BRIDGE}{node}"
                ip("netns", "add", space)
                ip("link", "add", f"llmembf{node}", "type", "veth", "peer", "name", "eth0", "netns", space)
                ip("link", "set", f"llmembf{node}", "master", BRIDGE, "up")
                ip("-n", space, "addr", "add", f"{SUBNET}.{10 + node}/24", "dev", "eth0")
                for link in ("lo", "eth0"):
                    ip("-n", space, "link", "set", link, "up")
            yield cls(separate=True)
        finally:
            cls._remove()

    @staticmethod
    def _remove() -> None:
        for node in range(NODES):
            ip("netns", "del", f"{BRIDGE}{node}", check=False)
            ip("link", "del", f"llmembf{node}", check=False)
        ip("link", "del", BRIDGE, check=False)

    @property
    def head(self) -> str:
        return f"{SUBNET}.1" if self.separate else "127.0.0.1"

    @property
    def s3(self) -> str:
        return f"{SUBNET}.2" if self.separate else "127.0.0.1"

    def address(self, node: int) -> str:
        return f"{SUBNET}.{10 + node}" if self.separate else "127.0.0.1"

    def inside(self, node: int) -> list[str]:
        """Before a command that is to run on a node."""
        return ["ip", "netns", "exec", f"{BRIDGE}{node}"] if self.separate else []

    @contextmanager
    def cut(self, node: int, address: str) -> Iterator[None]:
        """Within this block nothing that a node sends reaches an address."""
        there = ["-n", f"{BRIDGE}{node}", "neigh"]
        ip(*there, "replace", address, "lladdr", NOWHERE, "nud", "permanent", "dev", "eth0")
        try:
            yield
        finally:
            ip(*there, "del", address, "dev", "eth0")


class Cluster:
    """A head that takes no work and ``NODES`` nodes of one core. environment: of their processes."""

    def __init__(self, network: Network, environment: dict[str, str]) -> None:
        self._network, self._environment = network, environment
        self._options: tuple[str, ...] = ()
        self._store = 200_000_000
        self.nodes: list[subprocess.Popen[bytes]] = []
        self._head: subprocess.Popen[bytes] | None = None
        self.start()

    def start(self, *options: str, store: int = 200_000_000) -> None:
        """options: of the head; store: bytes of each object store."""
        self._directory, self._store, self._count = tempfile.mkdtemp(prefix="fc", dir="/tmp"), store, 0
        self._port, self._dashboard = free_port(), free_port()
        self._head = self._run(
            [], "--head", f"--port={self._port}", f"--dashboard-port={self._dashboard}", "--num-cpus=0", f"--node-ip-address={self._network.head}", *options
        )
        self.nodes = [self._node(number) for number in range(NODES)]
        self.complete()

    @property
    def address(self) -> str:
        return f"{self._network.head}:{self._port}"

    def _run(self, prefix: Sequence[str], *arguments: str) -> subprocess.Popen[bytes]:
        """With a directory of its own: Ray's socket paths must be short, and nodes that share one delete each other's files."""
        self._count += 1
        # The agent's default port is one for all clusters of a machine.
        own = [f"--dashboard-agent-listen-port={free_port()}", f"--temp-dir={self._directory}/{self._count}", f"--object-store-memory={self._store}"]
        command = [*prefix, RAY, "start", "--block", "--disable-usage-stats", *own, *arguments]
        return subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, env=self._environment, start_new_session=True)

    def _node(self, number: int) -> subprocess.Popen[bytes]:
        self._wait(self._answers)
        return self._run(self._network.inside(number), f"--address={self.address}", "--num-cpus=1", f"--node-ip-address={self._network.address(number)}")

    def _answers(self) -> bool:
        """Whether the head does."""
        with socket.socket() as probe:
            probe.settimeout(0.5)
            return probe.connect_ex((self._network.head, self._port)) == 0

    def start_node(self, number: int) -> None:
        self.nodes[number] = self._node(number)

    def complete(self) -> None:
        """Waits until all nodes are there, starting those that ended."""
        for number, node in enumerate(self.nodes):
            if node.poll() is not None:
                self.start_node(number)
        self._wait(lambda: self._alive() == NODES + 1)

    def _alive(self) -> int:
        """Nodes that the head hears of. Asked by a process of its own, whose Ray client ends with it."""
        program = "import sys; from ray._raylet import GcsClient; print(sum(n.state == 0 for n in GcsClient(address=sys.argv[1]).get_all_node_info().values()))"
        shown = subprocess.run([sys.executable, "-P", "-c", program, self.address], env=ENVIRONMENT, capture_output=True, text=True, check=False)
        return int(shown.stdout.strip().splitlines()[-1]) if shown.returncode == 0 else 0

    @staticmethod
    def _wait(ready: Callable[[], bool]) -> None:
        deadline = time.monotonic() + START_SECONDS
        while not ready():
            if time.monotonic() > deadline:
                raise RuntimeError(f"the Ray cluster was not whole within {START_SECONDS:.0f} s")
            time.sleep(0.5)

    def processes(self, title: str) -> list[psutil.Process]:
        """Processes of the nodes whose command line holds a title."""
        found = []
        for node in self.nodes:
            for process in _tree(node):
                with suppress(psutil.NoSuchProcess):
                    if title in " ".join(process.cmdline()):
                        found.append(process)
        return found

    def kill_node(self, number: int) -> None:
        _kill(_tree(self.nodes[number]))
        self.nodes[number].wait()

    def kill_head(self) -> None:
        assert self._head is not None
        _kill(_tree(self._head))
        self._head.wait()

    def stop(self) -> None:
        for process in [*self.nodes, *([self._head] if self._head else [])]:
            _kill(_tree(process))
            process.wait()
        self.nodes, self._head = [], None
        shutil.rmtree(self._directory, ignore_errors=True)


def _tree(process: subprocess.Popen[bytes]) -> list[psutil.Process]:
    try:
        root = psutil.Process(process.pid)
        return [root, *root.children(recursive=True)]
    except psutil.NoSuchProcess:
        return []


def _kill(processes: list[psutil.Process]) -> None:
    for process in processes:
        with suppress(psutil.NoSuchProcess):
            process.kill()
    psutil.wait_procs(processes, timeout=10)


def fill(address: str, seconds: float) -> None:
    """Fills the object stores of all nodes and holds them so."""
    import numpy as np
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    ray.init(address=address, log_to_driver=False, logging_level="ERROR")

    def hold() -> int:
        held = []
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            try:
                held.append(ray.put(np.zeros(4_000_000, np.uint8)))
            except ray.exceptions.RayError:
                time.sleep(0.5)  # It is full, and stays so while this holds what it has.
        return len(held)

    remote = ray.remote(num_cpus=0, max_retries=0)(hold)
    nodes = [node["NodeID"] for node in ray.nodes() if node["Alive"] and node["Resources"].get("CPU")]
    counts = []
    for reference in [remote.options(scheduling_strategy=NodeAffinitySchedulingStrategy(node, soft=False)).remote() for node in nodes]:
        try:
            counts.append(ray.get(reference, timeout=seconds + 60))
        except ray.exceptions.RayError as error:
            counts.append(f"{type(error).__name__}")
    print(f"filled by objects of 4 MB: {counts}", flush=True)


if __name__ == "__main__":
    fill(sys.argv[2], float(sys.argv[3]))
