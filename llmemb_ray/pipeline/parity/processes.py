"""The passes of one load in a process of its own on this machine, which ends with them.

Invariant: memory, threads and environment variables of an engine end with its process, before the next one is loaded; an
error there is raised here as what it was.
"""

from __future__ import annotations

import os
import pickle
import signal
import subprocess
import sys
import tempfile
from pathlib import Path

from llmemb_ray import errors
from llmemb_ray.errors import EngineDied, LlmembError
from llmemb_ray.pipeline.parity.passes import Passes, Work, make

Outcome = Passes | tuple[str, str]
"""What a process gives back: the passes, or class and words of the error."""

SCRIPT = "import sys; from llmemb_ray.pipeline.parity.processes import serve; serve(*sys.argv[1:])"
"""Not multiprocessing's spawn, which would run the caller's own script once more."""

LAST_WORDS = 3
"""Lines shown of what a process said before it died."""


def in_own_process(work: Work) -> Passes:
    """Makes the passes. Raises the LlmembError that was raised there, EngineDied where the process ended without a word."""
    with tempfile.TemporaryDirectory(prefix="llmemb-parity-") as directory:
        todo, done, said = (Path(directory) / name for name in ("work", "outcome", "said"))
        todo.write_bytes(pickle.dumps(work))
        environment = os.environ | {"PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
        with open(said, "wb") as log:
            command = [sys.executable, "-P", "-c", SCRIPT, str(todo), str(done)]  # -P: nothing of the working directory is imported.
            code = subprocess.run(command, env=environment, stdout=log, stderr=log, check=False).returncode
        if not done.exists():
            raise EngineDied(f"{work.load.title}: the process that held it {_ended(code)}{_last_words(said)}")
        return unwrapped(pickle.loads(done.read_bytes()))  # noqa: S301 - written by our own process into our own directory


def serve(todo: str, done: str) -> None:
    """The other process's side. todo, done: files."""
    outcome = attempted(pickle.loads(Path(todo).read_bytes()))  # noqa: S301
    partial = Path(f"{done}.partial")
    partial.write_bytes(pickle.dumps(outcome))
    partial.rename(done)  # What happens to the engine while Python takes it down is of no account any more.


def attempted(work: Work) -> Outcome:
    """``make``, its error as plain data: what crosses between processes needs no engine's classes."""
    try:
        return make(work)
    except LlmembError as error:
        return type(error).__name__, str(error)


def unwrapped(outcome: Outcome) -> Passes:
    """The passes of an outcome. Raises its error."""
    if isinstance(outcome, Passes):
        return outcome
    name, words = outcome
    raise getattr(errors, name)(words)


def _ended(code: int) -> str:
    if code >= 0:
        return f"ended with exit code {code}"
    killed = " (out of memory, where nobody killed it)" if -code == signal.SIGKILL else ""
    return f"was ended by {signal.Signals(-code).name}{killed}"


def _last_words(said: Path) -> str:
    lines = [line.strip() for line in said.read_text(encoding="utf-8", errors="replace").splitlines() if line.strip()]
    return ": " + " / ".join(lines[-LAST_WORDS:]) if lines else ""
