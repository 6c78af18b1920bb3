"""Says which values of the files here are still to be filled in: ``python cluster/check.py [FILE or DIRECTORY ...]``, by default this directory.

Invariant: every value that a user must give is a word that begins with CHANGE-ME, and nothing else is. Needs Python alone.
Exit code 0: nothing is left; 1: something is, each with its file and line; 2: there is nothing to look at.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator
from pathlib import Path

MARK = re.compile(r"CHANGE-ME(?:-[a-z0-9]+)*")
ENDINGS = (".yaml", ".yml", ".json")
"""Files that other programs read; pages and programs speak of marks and have none."""


def left(path: Path) -> Iterator[tuple[int, str]]:
    """(line, mark) of each value of a file that is to be filled in."""
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
        for found in MARK.finditer(line):
            yield number, found.group()


def files(places: list[Path]) -> list[Path]:
    """The files named, and those of the directories named that other programs read. Raises OSError for a place that is not there."""
    found: list[Path] = []
    for place in places:
        if not place.exists():
            raise FileNotFoundError(f"{place}: no such file or directory")
        below = [path for path in sorted(place.rglob("*")) if path.suffix in ENDINGS and path.is_file()] if place.is_dir() else [place]
        if not below:
            raise FileNotFoundError(f"{place}: holds no {', '.join(ENDINGS)} file")
        found += below
    return found


def main(arguments: list[str]) -> int:
    try:
        named = [Path(argument) for argument in arguments] or [Path(__file__).parent]
        marks = [(path, number, mark) for path in files(named) for number, mark in left(path)]
    except (OSError, UnicodeDecodeError) as error:
        sys.stderr.write(f"check.py: {error}\n")
        return 2
    for path, number, mark in marks:
        sys.stdout.write(f"{path}:{number}: {mark}\n")
    kinds = sorted({mark for _, _, mark in marks})
    sys.stdout.write(f"{len(marks)} places to fill in: {', '.join(kinds)}\n" if marks else "nothing is left to fill in\n")
    return 1 if marks else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
