"""Candidates of demonstrations: a sentence, the one word it means, and where the pair comes from.

Invariant: a file is read whole or refused with the line at fault; no two candidates of a list have sentence and word in common.
Files are JSON lines ``{"sentence", "word", "source"}``, or paper 1's ``icl_examples.txt``: whole prompts, one a line, blanks
written as underscores.
"""

from __future__ import annotations

import json
import posixpath
import re
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from typing import Any

from llmemb_ray.errors import InputError, NotFound
from llmemb_ray.representation.templates import Demonstration
from llmemb_ray.storage import Access, absolute, locate, redact
from llmemb_ray.written import json_lines

_PROMPT = re.compile(r'This sentence : "(?P<sentence>.*)" means in one word:"(?P<word>[^"]*)"\.This sentence : "\*sent 0\*" means in one word:"')


@dataclass(frozen=True, kw_only=True)
class Candidate:
    """sentence and word of a demonstration; source: the file or data set it was made from."""

    sentence: str
    word: str
    source: str = ""

    @property
    def demonstration(self) -> Demonstration:
        return Demonstration(self.sentence, self.word)


def unique(candidates: Iterable[Candidate]) -> list[Candidate]:
    """The first of those that have sentence and word in common, in their order."""
    kept: dict[tuple[str, str], Candidate] = {}
    for candidate in candidates:
        kept.setdefault((candidate.sentence, candidate.word), candidate)
    return list(kept.values())


def read_candidates(url: str, access: Access | None = None) -> list[Candidate]:
    """The candidates of a file, each once. Raises InputError with file and line."""
    candidates = []
    for number, line in numbered_lines(url, access):
        where = f"{redact(url)} line {number}"
        candidates.append(_from_json(line, where) if line.lstrip().startswith("{") else _from_prompt(line, where, posixpath.basename(url)))
    if not candidates:
        raise InputError(f"{redact(url)} holds no candidate; llmemb demos build makes them")
    return unique(candidates)


def _from_json(line: str, where: str) -> Candidate:
    record = json_object(line, where)
    values = {name: record.get(name, "") for name in ("sentence", "word", "source")}
    for name, value in values.items():
        if not isinstance(value, str) or (name != "source" and not value.strip()):
            raise InputError(f'{where}: {name} is no text; a candidate is {{"sentence": …, "word": …, "source": …}}')
    return Candidate(**values)


def _from_prompt(line: str, where: str, source: str) -> Candidate:
    prompt = line.strip().replace("_", " ")
    match = _PROMPT.fullmatch(prompt)
    if match is None or not match["sentence"].strip() or not match["word"].strip():
        raise InputError(f"{where} is neither JSON nor a prompt of paper 1's icl_examples.txt")
    if 'means in one word:"' in match["sentence"]:
        raise InputError(f"{where} holds several demonstrations; a candidate is one")
    return Candidate(sentence=match["sentence"], word=match["word"], source=source)


def write_candidates(url: str, candidates: Iterable[Candidate], access: Access | None = None) -> None:
    """Writes the file whole, in place of one that is there. Raises StorageError."""
    storage, name = locate(absolute(url), access or Access())
    storage.put(name, json_lines(map(asdict, candidates)))


def json_object(line: str, where: str) -> dict[str, Any]:
    """Raises InputError."""
    try:
        record = json.loads(line)
    except ValueError as error:
        raise InputError(f"{where} is not JSON: {error}") from error
    if not isinstance(record, dict):
        raise InputError(f"{where} is no JSON object")
    return record


def numbered_lines(url: str, access: Access | None = None) -> list[tuple[int, str]]:
    """(line number from 1, line) of a UTF-8 text file, blank lines left out. Raises InputError."""
    storage, name = locate(absolute(url), access or Access())
    try:
        data = storage.read(name)
    except NotFound as error:
        raise InputError(f"{error}; check the path") from error
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise InputError(f"{redact(url)} line {data[: error.start].count(10) + 1} is not UTF-8") from error
    return [(number, line.removesuffix("\r")) for number, line in enumerate(text.split("\n"), 1) if line.strip()]
