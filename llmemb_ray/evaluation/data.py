"""Where data sets lie, and their lines.

Invariant: a file that is missing or malformed is named with its line and with where to get it. Nothing is downloaded here.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from llmemb_ray.errors import ConfigError, InputError

VARIABLE = "LLMEMB_DATA"

SENTEVAL = "SentEval's data (https://github.com/facebookresearch/SentEval, data/downstream)"


@dataclass(frozen=True)
class DataPlace:
    """A directory with data sets in it."""

    root: Path

    @classmethod
    def of(cls, data: str | None) -> DataPlace:
        """The directory that is named, else that of LLMEMB_DATA. Raises ConfigError."""
        named = data or os.environ.get(VARIABLE)
        if not named:
            raise ConfigError(f"data: no directory of data sets is named; give --data DIR or set {VARIABLE}")
        root = Path(named).expanduser()
        if not root.is_dir():
            raise ConfigError(f"data: {named} is no directory" + ("" if data else f" ({VARIABLE} names it)"))
        return cls(root)

    def find(self, candidates: Sequence[str], *, what: str, source: str) -> Path:
        """The first of some relative paths that is there ('.' is the root itself).

        what: the data set, as the message names it; source: where it is to be got. Raises InputError.
        """
        for candidate in candidates:
            if (self.root / candidate).exists():
                return self.root / candidate
        looked = ", ".join(str(self.root / candidate) for candidate in candidates)
        raise InputError(f"{what} is not there: looked for {looked}. Get it from {source}, and name its directory with --data or {VARIABLE}")


def read_lines(path: Path, *, encoding: str = "utf-8", source: str = "") -> list[str]:
    """The lines of a text file without their ends; other separators that Unicode knows end no line. Raises InputError."""
    try:
        text = path.read_bytes().decode(encoding)
    except FileNotFoundError as error:
        raise InputError(f"{path} is not there" + (f"; get it from {source}" if source else "")) from error
    except OSError as error:
        raise InputError(f"{path} cannot be read: {error.strerror}") from error
    except UnicodeDecodeError as error:
        line = path.read_bytes()[: error.start].count(b"\n") + 1
        raise InputError(f"{path} line {line} is not {encoding}") from error
    lines = text.split("\n")
    if lines[-1] == "":
        del lines[-1]
    return [line.removesuffix("\r") for line in lines]
