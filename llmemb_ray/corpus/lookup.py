"""Texts read back from the corpus by where they stand: file of the plan and row of the file.

Invariant: a text comes from the very file that was embedded, or not at all: a file that changed or is gone
gives the reason in its place. Reading is by row group, only of the text's columns.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field

import numpy as np
import pyarrow as pa

from llmemb_ray.corpus.columns import Selection
from llmemb_ray.corpus.reading import GLANCE_BUFFER_BYTES, batches, check_unchanged
from llmemb_ray.corpus.units import PlannedFile
from llmemb_ray.errors import LlmembError
from llmemb_ray.storage import LIST_THREADS, Access, locate, redact

RowKey = tuple[int, int]
"""(index of the file in the plan, row of the file)"""


@dataclass
class Texts:
    """texts: by row key; missing: why a row has no text, by row key."""

    texts: dict[RowKey, str] = field(default_factory=dict)
    missing: dict[RowKey, str] = field(default_factory=dict)


def texts_at(files: Sequence[PlannedFile], selection: Selection, access: Access, wanted: Iterable[RowKey]) -> Texts:
    """The texts of the ``wanted`` rows. Raises nothing for files that are gone, changed or broken: their rows are ``missing``."""
    by_file: dict[int, set[int]] = defaultdict(set)
    for file, row in wanted:
        by_file[file].add(row)
    found = Texts()
    if not by_file:
        return found
    bare = Selection(text=selection.text, max_bytes=selection.max_bytes)

    def one(index: int) -> Texts:
        return _in_file(files[index], bare, access, sorted(by_file[index]))

    with ThreadPoolExecutor(max_workers=min(LIST_THREADS, len(by_file))) as pool:
        for part in pool.map(one, sorted(by_file)):
            found.texts |= part.texts
            found.missing |= part.missing
    return found


def beginning(text: str, characters: int) -> str:
    """The first characters of a text on one line, white space run together; no more than four times as many are looked at."""
    line = " ".join(text[: 4 * characters].split())
    return line if len(line) <= characters and len(text) <= 4 * characters else line[: characters - 1].rstrip() + "…"


def _in_file(file: PlannedFile, selection: Selection, access: Access, rows: list[int]) -> Texts:
    found = Texts()
    try:
        check_unchanged(file, access)
        storage, name = locate(file.url, access)
        with storage.open(name, file.size) as reader:
            edges = np.cumsum([0, *file.group_rows])
            there = [row for row in rows if row < edges[-1]]
            groups = np.searchsorted(edges, there, side="right") - 1
            for group in np.unique(groups).tolist():
                inside = [row for row, where in zip(there, groups.tolist(), strict=True) if where == group]
                _in_group(batches(reader, file, [group], selection, buffer_bytes=GLANCE_BUFFER_BYTES), int(edges[group]), inside, file.index, selection, found)
    except LlmembError as error:
        reason = str(error)
    except (pa.ArrowException, OSError) as error:
        reason = f"{redact(file.url)} cannot be read: {error}"
    else:
        reason = f"{redact(file.url)} has no such row"
    for row in rows:
        key = (file.index, row)
        if key not in found.texts and key not in found.missing:
            found.missing[key] = reason
    return found


def _in_group(tables: Iterator[pa.Table], first: int, rows: list[int], file: int, selection: Selection, found: Texts) -> None:
    """Texts of some rows of a row group that begins with row ``first``, given as tables; reads no further than the last of them."""
    position, left = first, rows
    for table in tables:
        here = [row for row in left if row < position + table.num_rows]
        if here:
            texts, problems = selection.texts(table.take(pa.array([row - position for row in here])))
            for place, (row, text) in enumerate(zip(here, texts, strict=True)):
                if text is None:
                    found.missing[file, row] = problems[place][1]
                else:
                    found.texts[file, row] = text
            left = left[len(here) :]
        if not left:
            return
        position += table.num_rows
