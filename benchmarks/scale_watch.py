"""Processor seconds and memory of a job's processes, by what they are, while it runs."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import psutil

ROLES = {"EmbedUnits": "actors", "read_and_tokenize": "readers", "Ledger": "ledger", "raylet": "raylet", "gcs_server": "gcs"}
"""Words in the titles of processes. A reader between two tasks has another title: it stays what it was."""


@dataclass(frozen=True, kw_only=True)
class Look:
    """What was seen at one time. cpu: seconds since each process began, summed by role; mb: private memory of the largest process of each role."""

    time: float
    units: int
    cpu: dict[str, float]
    mb: dict[str, float]


class Watch:
    """Looks at a process and its descendants every ``every`` seconds. units: how many are committed."""

    def __init__(self, pid: int, units: Callable[[], int], every: float = 1.0) -> None:
        self._root, self._units, self._every = psutil.Process(pid), units, every
        self._roles: dict[int, str] = {}
        self._cpu: dict[int, float] = {}
        self._seen: list[tuple[Look, dict[int, float]]] = []
        self._end = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def _run(self) -> None:
        while not self._end.wait(self._every):
            try:
                processes = [self._root, *self._root.children(recursive=True)]
            except psutil.NoSuchProcess:
                return
            mb: dict[str, float] = {}
            for process in processes:
                try:
                    role, memory, times = self._role(process), process.memory_info(), process.cpu_times()
                except (psutil.NoSuchProcess, psutil.ZombieProcess):
                    continue
                self._cpu[process.pid] = times.user + times.system
                mb[role] = max(mb.get(role, 0.0), (memory.rss - memory.shared) / 2**20)
            self._seen.append((Look(time=time.time(), units=self._units(), cpu={}, mb=mb), dict(self._cpu)))  # Those that ended stay in it.

    def _role(self, process: psutil.Process) -> str:
        if process.pid == self._root.pid:
            role = "driver"
        else:
            title = " ".join(process.cmdline()[:2])
            role = next((role for word, role in ROLES.items() if word in title), "other")
        if role != "other" or process.pid not in self._roles:
            self._roles[process.pid] = role
        return self._roles[process.pid]

    def stop(self) -> list[Look]:
        """All looks, processes by what they turned out to be."""
        self._end.set()
        self._thread.join()
        for look, by_process in self._seen:
            for pid, seconds in by_process.items():
                look.cpu[self._roles[pid]] = look.cpu.get(self._roles[pid], 0.0) + seconds
        return [look for look, _ in self._seen]


def spent(first: Look, last: Look) -> dict[str, float]:
    """Processor seconds between two looks, by role."""
    return {role: seconds - first.cpu.get(role, 0.0) for role, seconds in last.cpu.items()}


def peaks(looks: list[Look]) -> dict[str, int]:
    """MB of the largest process of each role, at the most."""
    roles = {role for look in looks for role in look.mb}
    return {role: round(max(look.mb.get(role, 0.0) for look in looks)) for role in sorted(roles)}


def slope(points: list[tuple[float, float]]) -> float:
    """Of the line through some points, by least squares."""
    n = len(points)
    mean_x, mean_y = (sum(values) / n for values in zip(*points, strict=True))
    spread = sum((x - mean_x) ** 2 for x, _ in points)
    return sum((x - mean_x) * (y - mean_y) for x, y in points) / spread if spread else 0.0


def rounded(values: dict[str, Any], digits: int = 4) -> dict[str, Any]:
    return {name: round(value, digits) if isinstance(value, float) else value for name, value in values.items()}
