"""Retrieval collections as their authors publish them: documents, queries, judgements; and the documents as Parquet files.

Invariant: documents are read one at a time and written a part at a time, so that a corpus may be larger than memory; only judged
queries and judgements are held. A line that cannot be used is named with its file. Knows nothing of models and metrics.

Layouts: BEIR's (``corpus.jsonl``, ``queries.jsonl``, ``qrels/SPLIT.tsv``), Cranfield's SMART files, NFCorpus' TSV and TREC files.
"""

from __future__ import annotations

import hashlib
import io
import json
import posixpath
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from llmemb_ray import parquet
from llmemb_ray.errors import InputError
from llmemb_ray.evaluation.data import read_lines
from llmemb_ray.shards.partitions import Partitions, id_digests, sortable
from llmemb_ray.storage import Access, Storage, absolute

BEIR = "BEIR (https://github.com/beir-cellar/beir)"

GROUPS = ("cqadupstack",)
"""Directories whose collections are one in BEIR: each is named with its group, as in cqadupstack/android."""

TEXT_COLUMN = "{title} {text}"
"""What of a document is embedded: paper 2's ``'{title} {text}'.strip()``."""

PART_DOCUMENTS, PART_BYTES = 50_000, 64 * 2**20
"""A Parquet file ends where either is reached; two or three times the bytes are in memory while it is written."""

GROUP_DOCUMENTS = 10_000
"""Of a row group, which the embedding job reads whole."""

FORMAT = 1
"""Of the Parquet files; another number makes them anew."""

RECORD = "documents.json"

CRANFIELD_GAINS = {1: 4, 2: 3, 3: 2, 4: 1, -1: 4}
"""Gain by code of judgement. Cleverdon's codes fall from 1, a complete answer, to 4, of minimum interest (cranqrel.readme). Each query has one -1,
of which the readme is silent: its source document, as it seems, for by tf-idf it stands third in the median, ahead of those coded 1."""

Judgements = dict[str, dict[str, int]]
"""Gain by query and document. A gain of 0 or less is not relevant, as for trec_eval."""


class Document(NamedTuple):
    line: int
    """In its file, from 1."""
    id: str
    title: str
    text: str


@dataclass(frozen=True, kw_only=True)
class Collection:
    """Queries of one split with their judgements, and where the documents are."""

    name: str
    split: str
    corpus: Path
    """The file of documents."""
    documents: Callable[[Path], Iterator[Document]]
    """Reads it. Raises InputError at the line that is malformed."""
    queries: dict[str, str]
    """Text by id, those with judgements alone, in the order of their file."""
    judgements: Judgements
    ignore_identical_ids: bool
    """Whether a document with the query's own id is no result, as in BEIR; no where queries and documents are numbered apart."""
    note: str = ""
    """Why figures may differ from others' on a collection of this name."""


@dataclass(frozen=True, kw_only=True)
class Layout:
    """One way of laying out a collection."""

    files: str
    """For messages."""
    splits: Callable[[Path], list[str]]
    """Splits that a directory has judgements of; none where it is not of this layout."""
    read: Callable[[Path, str, str], Collection]
    """(directory, name, split). Raises InputError."""


@dataclass(frozen=True, kw_only=True)
class Documents:
    """Documents of a collection as Parquet files, columns id, title, text (strings). Their directory is named by the content of the source."""

    directory: str
    files: list[str]
    """Full URLs."""
    count: int
    storage: Storage

    def known(self, wanted: set[str]) -> set[str]:
        """Those of some ids that are there; the column of ids is streamed."""
        values = pa.array(sorted(wanted), pa.string())
        found: set[str] = set()
        for url in self.files:
            with self.storage.open(posixpath.basename(url)) as file:
                for batch in parquet.opened(file).iter_batches(columns=["id"]):
                    ids = parquet.plain(pa.Table.from_batches([batch]))["id"]
                    found.update(ids.filter(pc.is_in(ids, value_set=values)).to_pylist())
        return found


# -- finding ---------------------------------------------------------------------------------------


def find(root: Path) -> dict[str, Path]:
    """Directories of collections by ``name_of``: ``root`` itself, those in it, and those one level below; of equal names by their path."""
    places = [root, *sorted(path for path in root.glob("*") if path.is_dir()), *sorted(path for path in root.glob("*/*") if path.is_dir())]
    found = [place for place in places if splits(place)]
    names = [name_of(place) for place in found]
    return {name if names.count(name) == 1 else place.relative_to(root).as_posix(): place for name, place in zip(names, found, strict=True)}


def name_of(directory: Path) -> str:
    """That of the directory, after its group's if it is in one."""
    place = directory.resolve()
    group = place.parent.name.casefold()
    return f"{group}/{place.name}" if group in GROUPS else place.name


def is_path(name: str) -> bool:
    """Whether what a user named is a directory of its own, and not one of the data directory; a member of a group may be either."""
    return "/" in name or name.startswith((".", "~"))


def splits(directory: Path) -> list[str]:
    """Splits that a directory has judgements of; none where it is no collection."""
    return next((found for layout in LAYOUTS if (found := layout.splits(directory))), [])


def read(directory: Path, name: str, split: str) -> Collection:
    """A collection, but for its documents. Raises InputError."""
    for layout in LAYOUTS:
        if found := layout.splits(directory):
            if split not in found:
                raise InputError(f"{directory} has no judgements of the split {split!r}; set --split to one of those it has: {', '.join(found)}")
            return layout.read(directory, name, split)
    raise InputError(f"{directory} is no collection for retrieval: looked for {'; or '.join(layout.files for layout in LAYOUTS)}")


# -- BEIR ------------------------------------------------------------------------------------------


def _beir_splits(directory: Path) -> list[str]:
    if not ((directory / "corpus.jsonl").is_file() and (directory / "queries.jsonl").is_file()):
        return []
    return sorted(path.stem for path in (directory / "qrels").glob("*.tsv"))


def _read_beir(directory: Path, name: str, split: str) -> Collection:
    qrels = directory / "qrels" / f"{split}.tsv"
    judgements, lines = _judgements(qrels, fields=3, separator="\t")
    queries: dict[str, str] = {}
    seen: dict[str, int] = {}
    for line, record in _json_lines(directory / "queries.jsonl"):
        where = f"{directory / 'queries.jsonl'} line {line}"
        query = _identifier(record, where)
        if query in seen:
            raise InputError(f"{where}: the query {query!r} stands at line {seen[query]} already")
        seen[query] = line
        if query in judgements:
            queries[query] = _query(_string(record, "text", where), where)
    _refuse_unknown(queries, lines, qrels, directory / "queries.jsonl")
    return Collection(
        name=name,
        split=split,
        corpus=directory / "corpus.jsonl",
        documents=beir_documents,
        queries=queries,
        judgements=judgements,
        ignore_identical_ids=True,
    )


def beir_documents(path: Path) -> Iterator[Document]:
    """The documents of a ``corpus.jsonl``. Raises InputError at the first line that is malformed."""
    for line, record in _json_lines(path):
        where = f"{path} line {line}"
        yield Document(line, _identifier(record, where), _string(record, "title", where), _string(record, "text", where))


def _json_lines(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """(number, object) of each line that is not blank."""
    for number, line in _lines(path):
        if not line.strip():
            continue
        try:
            record = json.loads(line)
        except ValueError as error:  # Of the encoding too.
            raise InputError(f"{path} line {number} is not JSON: {error}") from error
        if not isinstance(record, dict):
            raise InputError(f"{path} line {number} is no JSON object")
        yield number, record


def _lines(path: Path) -> Iterator[tuple[int, bytes]]:
    try:
        with open(path, "rb") as file:
            yield from enumerate(file, start=1)
    except OSError as error:
        raise InputError(f"{path} cannot be read: {error.strerror}") from error


def _identifier(record: dict[str, Any], where: str) -> str:
    value = record.get("_id")
    if isinstance(value, int) and not isinstance(value, bool):
        return str(value)
    if not isinstance(value, str) or not value:
        raise InputError(f"{where}: _id is {value!r}; it must be a string that is not empty")
    return _encodable(value, "_id", where)


def _string(record: dict[str, Any], name: str, where: str) -> str:
    """A text that may be missing or null."""
    value = record.get(name)
    if value is None:
        return ""
    if not isinstance(value, str):
        raise InputError(f"{where}: {name} is no text but {type(value).__name__}")
    return _encodable(value, name, where)


def _encodable(value: str, name: str, where: str) -> str:
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise InputError(f"{where}: {name} has half a surrogate pair at character {error.start}, which is no text") from error
    return value


def _query(text: str, where: str) -> str:
    if not text.strip():
        raise InputError(f"{where}: a judged query without text")
    return text


def _judgements(path: Path, *, fields: int, separator: str | None) -> tuple[Judgements, dict[str, int]]:
    """Judgements of a file, and the line that names each query first. The first field is the query, the last two the document and the gain.

    A first line whose gain is no number is a header.
    """
    judgements: Judgements = {}
    first: dict[str, int] = {}
    for number, line in enumerate(read_lines(path, source=BEIR), start=1):
        values = [value.strip() for value in line.split(separator)]
        if not any(values):
            continue
        if len(values) != fields:
            raise InputError(f"{path} line {number} has {len(values)} fields and not {fields}")
        query, document, gain = values[0], values[-2], values[-1]
        try:
            whole = int(gain)
        except ValueError as error:
            if number == 1:
                continue
            raise InputError(f"{path} line {number}: the gain {gain!r} is no whole number") from error
        _judge(judgements, query, document, whole, f"{path} line {number}")
        first.setdefault(query, number)
    if not judgements:
        raise InputError(f"{path} has no judgements")
    return judgements, first


def _judge(judgements: Judgements, query: str, document: str, gain: int, where: str) -> None:
    if judgements.setdefault(query, {}).setdefault(document, gain) != gain:
        raise InputError(f"{where}: query {query!r} and document {document!r} are judged twice, {judgements[query][document]} and {gain}")


def _refuse_unknown(queries: dict[str, str], lines: dict[str, int], qrels: Path, file: Path) -> None:
    for query, line in lines.items():
        if query not in queries:
            raise InputError(f"{qrels} line {line} judges the query {query!r}, which {file} has not")


# -- Cranfield -------------------------------------------------------------------------------------

_CRANFIELD = ("cran.all.1400", "cran.qry", "cranqrel")
_FIELDS = (".T", ".A", ".B", ".W")


def _cranfield_splits(directory: Path) -> list[str]:
    return ["test"] if all((directory / file).is_file() for file in _CRANFIELD) else []


def _read_cranfield(directory: Path, name: str, split: str) -> Collection:
    corpus, questions, qrels = (directory / file for file in _CRANFIELD)
    # Judgements number the queries from 1 in the order of the file, not by their .I.
    queries = {str(number): _query(text, f"{questions} line {line}") for number, (line, _, text) in enumerate(_smart(questions), start=1)}
    judgements: Judgements = {}
    for number, line in enumerate(read_lines(qrels), start=1):
        where = f"{qrels} line {number}"
        values = line.split()
        if len(values) != 3:
            raise InputError(f"{where} has {len(values)} fields and not 3")
        if values[0] not in queries:
            raise InputError(f"{where} judges query {values[0]!r}; {questions} has {len(queries)}, numbered from 1")
        gain = CRANFIELD_GAINS.get(int(values[2])) if values[2].removeprefix("-").isdigit() else None
        if gain is None:
            raise InputError(f"{where}: the code {values[2]!r} is none of {', '.join(map(str, CRANFIELD_GAINS))}")
        _judge(judgements, values[0], values[1], gain, where)
    return Collection(
        name=name,
        split=split,
        corpus=corpus,
        documents=cranfield_documents,
        queries={query: text for query, text in queries.items() if query in judgements},
        judgements=judgements,
        ignore_identical_ids=False,
        note="gain 4 for the codes 1 and -1, then 3, 2, 1 for 2, 3, 4: figures made with the codes themselves as gains differ",
    )


def cranfield_documents(path: Path) -> Iterator[Document]:
    """The documents of ``cran.all.1400``. Their .W begins with the title, which is therefore not repeated; white space is one space."""
    for line, id_, text in _smart(path):
        yield Document(line, id_, "", text)


def _smart(path: Path) -> Iterator[tuple[int, str, str]]:
    """(line, number after .I, text of .W) of each record of a SMART file."""
    start, id_, field = 0, "", ""
    words: list[str] = []
    for number, line in enumerate(read_lines(path, encoding="latin-1"), start=1):
        if line.startswith(".I"):
            if start:
                yield start, id_, " ".join(words)
            start, id_, field, words = number, line[2:].strip(), "", []
            if not id_.isdigit():
                raise InputError(f"{path} line {number}: .I is followed by {id_!r}, not by a number")
        elif line.rstrip() in _FIELDS:
            field = line.rstrip()
        elif not (start and field) and line.strip():
            raise InputError(f"{path} line {number} is text before the first .I, or before a field ({', '.join(_FIELDS)})")
        elif field == ".W":
            words += line.split()
    if start:
        yield start, id_, " ".join(words)


# -- NFCorpus --------------------------------------------------------------------------------------


def _nfcorpus_files(directory: Path, split: str) -> tuple[Path, Path, Path]:
    return directory / f"{split}.docs", directory / f"{split}.titles.queries", directory / f"{split}.2-1-0.qrel"


def _nfcorpus_splits(directory: Path) -> list[str]:
    return [split for split in ("dev", "test", "train") if all(file.is_file() for file in _nfcorpus_files(directory, split))]


def _read_nfcorpus(directory: Path, name: str, split: str) -> Collection:
    corpus, titles, qrels = _nfcorpus_files(directory, split)
    judgements, lines = _judgements(qrels, fields=4, separator=None)
    queries: dict[str, str] = {}
    for line, query, text in _tabbed(titles):
        if query in queries:
            raise InputError(f"{titles} line {line}: the query {query!r} stands there already")
        if query in judgements:
            queries[query] = _query(text, f"{titles} line {line}")
    _refuse_unknown(queries, lines, qrels, titles)
    return Collection(
        name=name,
        split=split,
        corpus=corpus,
        documents=nfcorpus_documents,
        queries=queries,
        judgements=judgements,
        ignore_identical_ids=True,
        note="documents lower-cased, without stop words and of this split alone: figures do not equal those of BEIR's NFCorpus",
    )


def nfcorpus_documents(path: Path) -> Iterator[Document]:
    """The documents of ``SPLIT.docs``, each a line with id, tab, text."""
    for line, id_, text in _tabbed(path):
        yield Document(line, id_, "", text)


def _tabbed(path: Path) -> Iterator[tuple[int, str, str]]:
    for number, data in _lines(path):
        try:
            line = data.decode().rstrip("\r\n")
        except UnicodeDecodeError as error:
            raise InputError(f"{path} line {number} is not utf-8") from error
        id_, tab, text = line.partition("\t")
        if not tab or not id_:
            raise InputError(f"{path} line {number} is not an id, a tab and a text")
        yield number, id_, text


LAYOUTS = (
    Layout(files="corpus.jsonl, queries.jsonl and qrels/SPLIT.tsv, from " + BEIR, splits=_beir_splits, read=_read_beir),
    Layout(files=f"{', '.join(_CRANFIELD)} (Cranfield)", splits=_cranfield_splits, read=_read_cranfield),
    Layout(files="SPLIT.docs, SPLIT.titles.queries and SPLIT.2-1-0.qrel (NFCorpus)", splits=_nfcorpus_splits, read=_read_nfcorpus),
)


# -- documents as Parquet --------------------------------------------------------------------------


def prepare(collection: Collection, scratch: str, access: Access) -> Documents:
    """Writes the documents as Parquet files into a directory under ``scratch``; reads only the digest of the source where they are there already.

    Raises InputError for a malformed line, for ids that are not unique, and for a corpus without documents; StorageError.
    """
    directory = f"{collection.name.replace('/', '-')}-{_digest(collection)}"
    url = f"{absolute(scratch).rstrip('/')}/{directory}"
    storage = Storage(url, access)
    there = {entry.path for entry in storage.list()}
    record: dict[str, Any] = json.loads(storage.read(RECORD)) if RECORD in there else {}
    if not record or not there.issuperset(record["files"]):
        record = _write(collection, storage)
    return Documents(directory=directory, files=[f"{url}/{name}" for name in record["files"]], count=record["documents"], storage=storage)


def _digest(collection: Collection) -> str:
    """Of the source file and of how it is read."""
    try:
        with open(collection.corpus, "rb") as file:
            content = hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise InputError(f"{collection.corpus} cannot be read: {error.strerror}") from error
    return hashlib.sha256(f"{FORMAT} {collection.documents.__name__} {content}".encode()).hexdigest()[:12]


def _write(collection: Collection, storage: Storage) -> dict[str, Any]:
    """The record of what was written; itself written last, so that files without it are made again."""
    record: dict[str, Any] = {"source": collection.corpus.name, "documents": 0, "files": []}
    with tempfile.TemporaryDirectory(prefix="llmemb-ids-") as spill:
        ids = Partitions(Path(spill))
        for number, documents in enumerate(_parts(collection.documents(collection.corpus))):
            table = pa.table({name: pa.array([getattr(document, name) for document in documents], pa.string()) for name in ("id", "title", "text")})
            ids.add(id_digests(table["id"]), np.array([document.line for document in documents], np.int64))
            buffer = io.BytesIO()
            pq.write_table(table, buffer, row_group_size=GROUP_DOCUMENTS, compression="zstd")
            record["files"].append(f"part-{number:05d}.parquet")
            storage.put(record["files"][-1], buffer.getbuffer())
            record["documents"] += len(documents)
        _refuse_doubles(ids, collection.corpus)
    if not record["documents"]:
        raise InputError(f"{collection.corpus} has no documents")
    storage.put(RECORD, json.dumps(record, indent=1).encode())
    return record


def _parts(documents: Iterator[Document]) -> Iterator[Sequence[Document]]:
    part: list[Document] = []
    size = 0
    for document in documents:
        part.append(document)
        size += len(document.title) + len(document.text)
        if len(part) >= PART_DOCUMENTS or size >= PART_BYTES:
            yield part
            part, size = [], 0
    if part:
        yield part


def _refuse_doubles(ids: Partitions, path: Path) -> None:
    for digests, lines in ids:
        order = np.lexsort((lines, sortable(digests)["low"], sortable(digests)["high"]))
        same = np.flatnonzero(digests[order][1:] == digests[order][:-1])
        if len(same):
            first, second = lines[order][same[0]], lines[order][same[0] + 1]
            raise InputError(f"{path}: lines {first} and {second} have the same document id; each id must stand once")
