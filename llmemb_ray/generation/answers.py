"""Answers that were paid for, kept beside the output, so that nothing is asked twice.

Invariant: an answer is kept before it is used, under whom was asked and the prompt; a line that a killed process left half
written is not taken for one. Locally each answer is appended at once; on an object store, which cannot append, all are
written again every few seconds.
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import IO, Any

from llmemb_ray.errors import InputError, NotFound, StorageError
from llmemb_ray.generation.generator import Answer
from llmemb_ray.storage import Access, Storage, absolute, locate, redact
from llmemb_ray.written import json_lines

SAVE_SECONDS = 10.0
"""Between two writes to an object store: what a killed command loses at most."""


def read(output: Storage, path: str) -> dict[tuple[str, str], Answer]:
    """(generator, prompt) -> answer of a file of kept answers, none where there is no file; nothing is mended, for somebody may be writing it.

    Raises InputError for a line that is none.
    """
    _, whole = _lines(output, path)
    return {(record["asked"], record["prompt"]): answer for record, answer in _records(whole, output.display(path))}


def tokens(answers: Iterable[Answer]) -> tuple[int, int]:
    """(prompt tokens, tokens of answers), summed."""
    kept = list(answers)
    return sum(answer.prompt_tokens for answer in kept), sum(answer.completion_tokens for answer in kept)


def _lines(storage: Storage, name: str) -> tuple[bytes, bytes]:
    """(the file, its whole lines)."""
    try:
        data = storage.read(name)
    except NotFound:
        data = b""
    return data, data[: data.rfind(b"\n") + 1]


def _records(whole: bytes, url: str) -> Iterator[tuple[dict[str, Any], Answer]]:
    for number, line in enumerate(whole.split(b"\n")[:-1], 1):
        try:
            record = json.loads(line)
            _, _, answer = record["asked"], record["prompt"], Answer(**record["answer"])
        except (ValueError, KeyError, TypeError) as error:
            raise InputError(f"{redact(url)} line {number} is no answer: {error}; delete the line, and its prompt is asked again") from error
        yield record, answer


class Answers:
    """The answers of one file. Raises InputError for a line that is none, with the file and the line."""

    def __init__(self, url: str, access: Access | None = None) -> None:
        self.url = absolute(url)
        self._storage, self._name = locate(self.url, access or Access())
        self._kept: dict[tuple[str, str], Answer] = {}
        self._records: list[dict[str, Any]] = []
        self._file: IO[bytes] | None = None
        self._saved = time.monotonic()
        data, whole = _lines(self._storage, self._name)
        for record, answer in _records(whole, self.url):
            self._kept[record["asked"], record["prompt"]] = answer
            self._records.append(record)
        if whole != data:
            self._storage.put(self._name, whole)

    def __len__(self) -> int:
        return len(self._kept)

    def get(self, asked: str, prompt: str) -> Answer | None:
        """asked: the name of a generator."""
        return self._kept.get((asked, prompt))

    def add(self, asked: str, prompt: str, answer: Answer) -> None:
        """Raises StorageError."""
        record = {"asked": asked, "prompt": prompt, "answer": asdict(answer)}
        self._kept[asked, prompt] = answer
        self._records.append(record)
        if "://" not in self.url:
            try:
                if self._file is None:
                    Path(self.url).parent.mkdir(parents=True, exist_ok=True)
                    self._file = open(self.url, "ab")  # noqa: SIM115 - open as long as answers come; close() ends it
                self._file.write(json_lines([record]))
                self._file.flush()
            except OSError as error:
                raise StorageError(f"cannot write {self.url}: {error.strerror}") from error
        elif time.monotonic() - self._saved > SAVE_SECONDS:
            self._save()

    def _save(self) -> None:
        self._storage.put(self._name, json_lines(self._records))
        self._saved = time.monotonic()

    def close(self) -> None:
        if self._file is not None:
            self._file.close()
        elif "://" in self.url and self._records:
            self._save()
