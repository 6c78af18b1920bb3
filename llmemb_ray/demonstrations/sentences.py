"""Sentences to be summed up: out of a file's lines or column, or of STS-B's training pairs.

Invariant: each distinct sentence once, in the order of its first appearance, on one line; a sample follows from the seed alone, and a
larger one holds the smaller.
"""

from __future__ import annotations

import csv
import posixpath
import random
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import pyarrow as pa

from llmemb_ray import parquet
from llmemb_ray.config.demonstrations import STSB_TRAIN
from llmemb_ray.demonstrations.candidates import json_object, numbered_lines
from llmemb_ray.errors import ConfigError, InputError, NotFound
from llmemb_ray.evaluation.data import SENTEVAL, DataPlace, read_lines
from llmemb_ray.storage import Access, absolute, locate, redact

T = TypeVar("T")

AS_WRITTEN, TOKENISED = STSB_TRAIN

STSB_FILES = {
    AS_WRITTEN: ("sts_raw/STSBenchmark/sts-train.csv", "STSBenchmark/sts-train.csv"),
    TOKENISED: ("senteval/downstream/STS/STSBenchmark/sts-train.csv", "downstream/STS/STSBenchmark/sts-train.csv"),
}
"""STS-B's training pairs as they were written, which paper 1's demonstrations are taken from, and lower-cased and tokenised."""

STSB_SOURCES = {AS_WRITTEN: "the STS benchmark (https://ixa2.si.ehu.eus/stswiki, Stsbenchmark.tar.gz)", TOKENISED: SENTEVAL}

STSB_COLUMNS = (5, 6)
"""Of sts-train.csv, which is tab-separated and quotes nothing: genre, file, year, number, score, then the pair."""

USUAL_COLUMNS = ("sentence", "text")

KINDS = {".txt": "text", ".jsonl": "JSON lines", ".ndjson": "JSON lines", ".csv": "CSV", ".tsv": "TSV", ".parquet": "Parquet"}


@dataclass(frozen=True)
class Sentences:
    """sentences: distinct ones; source: as records name it; empty: rows and lines without one."""

    sentences: list[str]
    source: str
    empty: int


def sample(items: Sequence[T], count: int, seed: int) -> list[T]:
    """``count`` of the items, or all, in their order."""
    order = list(range(len(items)))
    random.Random(seed).shuffle(order)
    return [items[place] for place in sorted(order[:count])]


def read_sentences(name: str, *, data: str | None = None, column: str | None = None, access: Access | None = None) -> Sentences:
    """The sentences of a file, or of stsb-train.

    data: directory of the data sets; column: of a file with columns. Raises ConfigError, InputError.
    """
    texts: Iterable[Any]
    if name in STSB_FILES:
        texts, source = _stsb(name, data), name
    else:
        kind = KINDS.get(posixpath.splitext(name)[1].lower())
        if kind is None:
            known = f"{', '.join(STSB_FILES)}, or a file whose name ends in {', '.join(KINDS)}"
            raise ConfigError(f"sentences: {redact(name)} is of no kind that is read here: {known}")
        texts, source = _of_file(name, kind, column, access), posixpath.basename(name)
    found = [" ".join(text.split()) if isinstance(text, str) else "" for text in texts]
    if not any(found):
        raise InputError(f"sentences: {redact(name)} holds none")
    return Sentences(list(dict.fromkeys(text for text in found if text)), source, found.count(""))


def _stsb(name: str, data: str | None) -> list[str]:
    path = DataPlace.of(data).find(STSB_FILES[name], what="STS-B's training set", source=STSB_SOURCES[name])
    texts = []
    for number, line in enumerate(read_lines(path, source=STSB_SOURCES[name]), 1):
        fields = line.split("\t")
        if len(fields) <= STSB_COLUMNS[-1]:
            raise InputError(f"{path} line {number} has {len(fields)} columns, not seven or more separated by tabs")
        texts += [fields[place] for place in STSB_COLUMNS]
    return texts


def _of_file(url: str, kind: str, column: str | None, access: Access | None) -> list[Any]:
    shown = redact(url)
    if kind == "text":
        if column:
            raise ConfigError(f"sentence_column: {shown} is plain text and has no columns; leave it out")
        return [line for _, line in numbered_lines(url, access)]
    if kind == "Parquet":
        return _of_parquet(url, column, access)
    lines = numbered_lines(url, access)
    if kind == "JSON lines":
        rows = [(number, json_object(line, f"{shown} line {number}")) for number, line in lines]
        chosen = _column(list(dict.fromkeys(name for _, row in rows for name in row)), column, shown)
        texts = [row.get(chosen) for _, row in rows]
        numbers = [number for number, _ in rows]
    else:
        dialect: dict[str, Any] = {"delimiter": "\t", "quoting": csv.QUOTE_NONE} if kind == "TSV" else {"delimiter": ",", "strict": True}
        reader = csv.reader((line + "\n" for _, line in lines), **dialect)
        texts, numbers = [], []
        try:
            header = next(reader, [])
            place = header.index(_column(header, column, shown))
            for row in reader:
                number = lines[reader.line_num - 1][0]
                if len(row) != len(header):
                    raise InputError(f"{shown} line {number} has {len(row)} columns, the header {len(header)}")
                texts.append(row[place])
                numbers.append(number)
        except csv.Error as error:
            raise InputError(f"{shown} line {lines[min(reader.line_num, len(lines)) - 1][0]} is not {kind}: {error}") from error
    for number, text in zip(numbers, texts, strict=True):
        if text is not None and not isinstance(text, str):
            raise InputError(f"{shown} line {number}: {str(text)[:60]!r} is no text; name another sentence_column")
    return texts


def _of_parquet(url: str, column: str | None, access: Access | None) -> list[Any]:
    storage, name = locate(absolute(url), access or Access())
    try:
        with storage.open(name) as reader:
            file = parquet.opened(reader)
            chosen = _column(file.schema_arrow.names, column, redact(url))
            values = parquet.plain(file.read([chosen])).column(chosen)
    except NotFound as error:
        raise InputError(f"{error}; check the path") from error
    except (pa.ArrowException, OSError) as error:
        raise InputError(f"sentences: {redact(url)} cannot be read as Parquet: {error}") from error
    kind = values.type.value_type if pa.types.is_dictionary(values.type) else values.type
    if not (pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_string_view(kind)):
        raise InputError(f"sentences: column {chosen} of {redact(url)} holds {values.type}, no text; name another sentence_column")
    return list(values.to_pylist())


def _column(names: Sequence[str], named: str | None, shown: str) -> str:
    if named is not None and named not in names:
        raise ConfigError(f"sentence_column: {shown} has no column {named!r}; its columns are {', '.join(names)}")
    found = named or next((name for name in USUAL_COLUMNS if name in names), None)
    if found is None:
        raise ConfigError(f"sentence_column: {shown} has no column {' or '.join(USUAL_COLUMNS)}; name one of {', '.join(names)}")
    return found
