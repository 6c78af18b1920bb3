"""What a job takes of a cluster: how many actors, and the GPUs, cores and threads of each."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import ray

from llmemb_ray.config import ClusterSettings, parse_actors
from llmemb_ray.connection import connected
from llmemb_ray.errors import ConfigError

CPU_THREADS = 8
"""Cores of an actor on a CPU node at most: beyond it one model's matrix products scale badly, another actor does not."""

CPU_SHARE = 0.75
"""Share of its cores that a CPU actor reserves; the rest is for reading and tokenising."""

GPU_ACTOR_SHARE = 0.5
"""Share of a GPU node's cores that its actors reserve together at most."""


@dataclass(frozen=True, kw_only=True)
class Shape:
    """What the job takes of the cluster."""

    least: int
    most: int
    gpus: float
    cpus: float
    threads: int | None
    """Threads of a CPU actor; None on a GPU."""

    @property
    def on_gpu(self) -> bool:
        return self.gpus > 0


@contextmanager
def cluster(settings: ClusterSettings) -> Iterator[Shape]:
    """Connects to the cluster that the settings name, or starts one here, and gives what the job takes of it.

    A Ray that was up before stays up. Raises ConfigError if none answers or nothing fits.
    """
    with connected(settings.ray_address):
        yield shape(settings)


def shape(settings: ClusterSettings) -> Shape:
    """Actors and their resources, from the settings and what the cluster has now. Raises ConfigError."""
    nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    cluster_gpus = sum(node.get("GPU", 0.0) for node in nodes)
    wanted = parse_actors(settings.actors)
    gpus = settings.gpus_per_actor if settings.gpus_per_actor is not None else (float(settings.tensor_parallel) if cluster_gpus else 0.0)
    if gpus:
        return _gpu_shape(nodes, gpus, wanted, settings.cpus_per_actor)
    largest = max((node.get("CPU", 0.0) for node in nodes), default=0.0)
    threads = max(1, round(settings.cpus_per_actor or min(CPU_THREADS, largest)))
    room = sum(int(node.get("CPU", 0.0) // threads) for node in nodes)
    if not room and not (wanted and settings.cpus_per_actor):
        raise ConfigError(
            f"cpus_per_actor: {threads} cores fit on no node of this cluster, the largest has {largest:g}; add CPU nodes, "
            "or say both actors and cpus_per_actor to wait for nodes to come"
        )
    least, most = wanted or (1, room)
    if least == most and room:
        least = most = min(most, room)  # One more would take the cores that reading needs, and wait for ever.
    return Shape(least=least, most=most, gpus=0, cpus=threads * CPU_SHARE, threads=threads)


def _gpu_shape(nodes: list[dict[str, float]], gpus: float, wanted: tuple[int, int] | None, wanted_cpus: float | None) -> Shape:
    places = [int(node.get("GPU", 0.0) / gpus + 1e-9) for node in nodes]
    room = sum(places)
    if not room and wanted is None:
        raise ConfigError(f"gpus_per_actor: {gpus:g} GPUs are free on no node of this cluster; add GPU nodes, or say how many actors to wait for")
    least, most = wanted or (1, room)
    # Ray would reserve a whole core for each actor and could leave none to read and tokenise with.
    cores = [GPU_ACTOR_SHARE * node.get("CPU", 0.0) / place for node, place in zip(nodes, places, strict=True) if place]
    cpus = wanted_cpus if wanted_cpus is not None else round(min([1.0, *cores]), 3)
    return Shape(least=least, most=most, gpus=gpus, cpus=cpus, threads=None)


def use_threads(threads: int | None) -> None:
    """Threads of the model of an actor, told in its process; None leaves them."""
    if threads:
        os.environ["OMP_NUM_THREADS"] = str(threads)  # For engines with an OpenMP of their own; Ray sets it to the cores reserved.
        import torch

        torch.set_num_threads(threads)
