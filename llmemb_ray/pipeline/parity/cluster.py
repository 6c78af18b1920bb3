"""The passes of one load as a Ray task, with the resources and threads of one of the job's actors.

Invariant: a task's process ends with it (``max_calls=1``), and one task runs at a time, so that each engine finds the GPU empty.
"""

from __future__ import annotations

import os
from dataclasses import dataclass

import ray

from llmemb_ray.errors import EngineDied
from llmemb_ray.pipeline.parity.passes import Passes, Work
from llmemb_ray.pipeline.parity.processes import Outcome, attempted, unwrapped
from llmemb_ray.pipeline.shape import Shape

RETRIES = 2
"""Times a task is tried again whose node went away."""


@dataclass(frozen=True)
class Tasks:
    """Makes passes on the cluster that this process is connected to."""

    shape: Shape

    def __call__(self, work: Work) -> Passes:
        """Raises the LlmembError that was raised there, EngineDied where the process ended."""
        resources = {"num_gpus": self.shape.gpus} if self.shape.on_gpu else {}
        task = ray.remote(max_calls=1, max_retries=RETRIES, num_cpus=self.shape.cpus, **resources)(_attempted)
        try:
            return unwrapped(ray.get(task.remote(work, self.shape.threads)))
        except ray.exceptions.RayError as error:
            raise EngineDied(f"{work.load.title}: its Ray task ended: {str(error).strip().splitlines()[0]}") from error


def _attempted(work: Work, threads: int | None) -> Outcome:
    if threads:
        os.environ["OMP_NUM_THREADS"] = str(threads)  # As the actors of the job do.
        import torch

        torch.set_num_threads(threads)
    return attempted(work)
