"""The same job without Ray: one process, the same preparation and the same attempts, unit after unit."""

from __future__ import annotations

from collections.abc import Iterator

from llmemb_ray.embedders.embedder import Embedder
from llmemb_ray.errors import EngineDied, LlmembError, RunFailed
from llmemb_ray.pipeline import attempt, calibrate
from llmemb_ray.pipeline.making import Workshop
from llmemb_ray.pipeline.prepare import Job, ReadTask, prepare
from llmemb_ray.shards.commits import Commit


class Execution:
    def __init__(self, job: Job) -> None:
        self._job = job
        self._embedder = Embedder(job.spec)
        self._counts = [0, 0]
        self._stopping = self._at_work = False
        self._workshop = Workshop(precision=calibrate.settled(job, self._embedder, calibrate.Alone()))

    def run(self, tasks: list[ReadTask]) -> Iterator[tuple[str, Commit | None, str | None]]:
        """(unit, commit or None, error or None) of each unit, as it is done; those left when it is told to stop are not begun."""
        for task in tasks:
            for prepared in prepare(self._job, task):
                if self._stopping:
                    return
                if prepared.error is not None:
                    yield prepared.unit.name, None, prepared.error
                    continue
                self._at_work = True
                try:
                    commit = attempt.run(self._job, prepared, self._embedder, self._workshop, on_pack=self._on_pack)
                except EngineDied as error:
                    raise RunFailed(
                        f"unit {prepared.unit.name}: {error}. What was committed stands, the same command continues; with actors on Ray (leave actors=0 out) "
                        "the engine is started again, and a row that kills it is found and rejected"
                    ) from error
                except LlmembError as error:
                    yield prepared.unit.name, None, str(error)
                    continue
                finally:
                    self._at_work = False
                yield prepared.unit.name, commit, None

    def _on_pack(self, rows: int, tokens: int) -> None:
        self._counts[0] += rows
        self._counts[1] += tokens

    def stop(self) -> None:
        """Begins no more units."""
        self._stopping = True

    def at_work(self) -> bool:
        return self._at_work

    def live(self) -> tuple[int, int, int]:
        return self._counts[0], self._counts[1], 1
