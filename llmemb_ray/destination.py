"""A local directory that an export writes.

Invariant: it appears whole, by a rename, or not at all; replaced is only what an export left, told by its mark.
"""

from __future__ import annotations

import os
import shutil
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from llmemb_ray.errors import ConfigError, OutputError
from llmemb_ray.storage import absolute, redact


def free(dest: str, *, mark: str, overwrite: bool) -> Path:
    """The directory to write. mark: a file that stands in each export of the kind.

    Raises ConfigError unless it is local, OutputError if something stands there that is not to be replaced.
    """
    if "://" in dest and not dest.startswith("file://"):
        raise ConfigError(f"dest: {redact(dest)} is not local; export into a local directory and copy that where it is to go")
    final = Path(absolute(dest.removeprefix("file://")))
    if not final.exists() or (final.is_dir() and not any(final.iterdir())):
        return final
    if not (final / mark).is_file():
        raise OutputError(f"dest: {final} holds something that no export wrote; name another directory, or empty it first")
    if not overwrite:
        raise OutputError(f"dest: {final} holds an export already; name another directory, or replace it with overwrite")
    return final


@contextmanager
def written(final: Path) -> Iterator[Path]:
    """A directory beside ``final`` that takes its place when the block ends well. Raises OutputError where it cannot be written."""
    temporary = final.with_name(f"{final.name}.tmp-{uuid.uuid4().hex[:12]}")
    try:
        temporary.mkdir(parents=True)
        yield temporary
        _put_in_place(temporary, final)
    except OSError as error:
        raise OutputError(f"dest: {final} cannot be written: {error.strerror or error}") from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _put_in_place(temporary: Path, final: Path) -> None:
    if not final.exists():
        os.rename(temporary, final)
        return
    old = final.with_name(f"{temporary.name}.old")
    os.rename(final, old)
    os.rename(temporary, final)
    shutil.rmtree(old)
