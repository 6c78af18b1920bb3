"""OUT as a synthesis finds it and leaves it: what must not stand there, and the removal of all that it wrote.

Invariant: a file that no synthesis wrote is never removed.
"""

from __future__ import annotations

from llmemb_ray.errors import OutputError
from llmemb_ray.shards.plan import RECORD as EMBEDDING_PLAN
from llmemb_ray.shards.receipt import PATH as RECEIPT
from llmemb_ray.shards.records import COMPACTED, DIRECTORY
from llmemb_ray.storage import Storage
from llmemb_ray.synthesis import brainstorming, execution
from llmemb_ray.synthesis.record import PATH
from llmemb_ray.synthesis.units import DATA, REJECTS, WRITTEN


def require_free(output: Storage) -> None:
    """Raises OutputError where something else stands."""
    if output.exists(EMBEDDING_PLAN):
        raise OutputError(f"out: {output.url} holds an embedding run; name another directory")
    if output.exists(PATH) or output.exists(brainstorming.ACCOUNTS):
        return
    strangers = [entry.path for directory in (DATA, REJECTS) for entry in output.list(directory)]
    if strangers:
        raise OutputError(f"out: {output.display(strangers[0])} is from no synthesis that stands there; name another directory, or move it away")


def remove(output: Storage) -> None:
    """Removes what a synthesis left, but for the lease. The record goes last: stopped in between, what is left is not taken for another run's."""
    if not any(output.exists(path) for path in (PATH, brainstorming.ACCOUNTS, brainstorming.ANSWERS)):
        return
    output.delete([RECEIPT])
    output.delete([COMPACTED, brainstorming.ANSWERS])
    for directory in (DIRECTORY, execution.ANSWERS):
        output.delete_tree(directory)
    written = [entry.path for directory in (DATA, REJECTS) for entry in output.list(directory) if WRITTEN.fullmatch(entry.path)]
    output.delete(written)
    if output.exists(brainstorming.ACCOUNTS):  # Else the tasks there are somebody's own.
        output.delete([brainstorming.PATH])
    output.delete([brainstorming.ACCOUNTS])
    output.delete([PATH])
