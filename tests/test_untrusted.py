"""Corpora, run directories and models made to do harm: no code of theirs runs, no file outside is read or deleted, no memory is taken."""

from __future__ import annotations

import json
import pickle
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from click.testing import CliRunner

import llmemb_ray
from llmemb_ray import cli, parquet
from llmemb_ray.config import SearchSettings
from llmemb_ray.corpus import files, lookup, reading, sample
from llmemb_ray.corpus.columns import Selection
from llmemb_ray.corpus.units import PlannedFile
from llmemb_ray.errors import InputError, LlmembError, ModelError, OutputError, RunFailed, StorageError
from llmemb_ray.pipeline import job, opening
from llmemb_ray.representation.space import digest
from llmemb_ray.search.job import find
from llmemb_ray.shards import commits, reuse
from llmemb_ray.shards.export import export
from llmemb_ray.storage import Access, Storage
from tests.small_jobs import embed, opened, rejects_of, settled, write

EVIL_NAME = "a\x1b]0;owned\x07\x9b31m\u202e<script>alert(1)</script>"


# -- Parquet files -----------------------------------------------------------------------------------


class Harm:
    """Makes a file when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return Path.touch, (self.path,)


def pickles(tmp_path: Path) -> Any:
    """Of the Arrow type that Ray registers, whose values unpickle themselves when they are looked at; a file can name it."""
    from ray.data._internal.object_extensions.arrow import ArrowPythonObjectType

    return ArrowPythonObjectType().wrap_array(pa.array([pickle.dumps(Harm(tmp_path / "harm"))] * 3, pa.large_binary()))


@pytest.mark.parametrize("kind", ["plain", "nested", "opaque"])
def test_ids_that_are_pickles_are_bytes(tmp_path: Path, model: Path, kind: str) -> None:
    ids = pickles(tmp_path)
    if kind != "plain":
        ids = pa.StructArray.from_arrays([ids], ["inner"])
    if kind == "opaque":
        ids = pa.ExtensionArray.from_storage(pa.opaque(ids.type, "name", "vendor"), ids)
    (tmp_path / "in").mkdir()
    pq.write_table(pa.table({"id": ids, "text": ["one", None, "two"]}), tmp_path / "in" / "a.parquet")
    id_column = "id" if kind == "plain" else "id.inner"
    assert embed(tmp_path / "in", tmp_path / "out", model, id_column=id_column).rows_rejected == 1
    assert pa.concat_tables([table for _, table in opened(tmp_path / "out").shards()])["id"].type == pa.large_binary()
    assert not (tmp_path / "harm").exists()
    assert pq.read_table(tmp_path / "in" / "a.parquet")["id"].to_pylist() is not None
    assert (tmp_path / "harm").exists(), "a reader that takes the file's word would have run it"


def test_pickles_in_containers_that_are_not_unwrapped_make_a_bad_file(tmp_path: Path) -> None:
    """No list of containers is whole: what still holds a type of Python's after all is refused."""
    ids = pickles(tmp_path)
    starts, ones = pa.array([0, 1, 2], pa.int32()), pa.array([1, 1, 1], pa.int32())
    corpus = write(tmp_path / "a.parquet", ["x"] * 3, id=pa.ListViewArray.from_arrays(starts, ones, ids))
    with pytest.raises(pa.ArrowNotImplementedError, match="column 'id' is list_view"):
        parquet.read(corpus.read_bytes()).to_pylist()
    assert "column 'id' is list_view" in str(files.footers(files.discover([str(corpus)], Access()), Access())[0])
    for kind in (pa.large_list_view(ids.type), pa.run_end_encoded(pa.int32(), ids.type), pa.list_view(pa.opaque(pa.struct([("a", ids.type)]), "a", "b"))):
        with pytest.raises(pa.ArrowNotImplementedError, match="column 'x' is"):
            parquet.plain_schema(pa.schema([("x", pa.struct([("deep", kind)]))]))
    kept = pa.schema([("x", pa.uuid()), ("y", pa.list_view(pa.json_()))])
    assert parquet.plain_schema(kept) is kept
    assert not (tmp_path / "harm").exists()


class Refusing(pa.ExtensionType):  # type: ignore[misc]
    """As Ray's tensors: it raises where its description is none that it can read."""

    def __init__(self) -> None:
        super().__init__(pa.int64(), "tests.refusing")

    def __arrow_ext_serialize__(self) -> bytes:
        return b""

    @classmethod
    def __arrow_ext_deserialize__(cls, storage_type: pa.DataType, serialized: bytes) -> Refusing:
        if serialized:
            raise {b"V": ValueError, b"A": AttributeError, b"R": RecursionError}[serialized](f"a description of {len(serialized)} bytes")
        return cls()


@pytest.mark.parametrize("description", ["V", "A", "R"])
def test_an_extension_type_with_a_broken_description_is_a_bad_file(tmp_path: Path, model: Path, description: str) -> None:
    write(tmp_path / "in" / "good.parquet", ["fine"])
    field = pa.field("other", pa.int64(), metadata={"ARROW:extension:name": "tests.refusing", "ARROW:extension:metadata": description})
    bad = pa.table([["x"], [1]], schema=pa.schema([("text", pa.string()), field]))
    pq.write_table(bad, tmp_path / "in" / "bad.parquet")
    pa.register_extension_type(Refusing())
    try:
        with pytest.raises(pa.ArrowInvalid, match="a description of 1 bytes"):
            parquet.read((tmp_path / "in" / "bad.parquet").read_bytes())
        receipt = embed(tmp_path / "in", tmp_path / "out", model, skip_bad_files=True)
    finally:
        pa.unregister_extension_type("tests.refusing")
    assert receipt.rows_embedded == 1
    assert len(receipt.bad_files) == 1


READ = """
import sys
import pyarrow as pa
from llmemb_ray.corpus import files, reading
from llmemb_ray.corpus.columns import Selection
from llmemb_ray.corpus.reading import read_units
from llmemb_ray.corpus.units import PlannedFile
from llmemb_ray.storage import Access
[found] = files.discover([sys.argv[1]], Access())
footer = files.footer(found, Access())
selection = Selection(text="text", max_bytes=2**20)
reading.BATCH_BYTES = 2**26
file = PlannedFile(index=0, url=found.url, size=found.size, version=found.version, group_rows=footer.group_rows, rows=footer.rows, rows_per_unit=footer.rows)
[piece] = file.pieces()
[(unit, table)] = read_units(file, piece, selection, Access(), frozenset([piece.units[0].name]))
texts, problems = selection.texts(table)
print(len(texts), {reason for reason, _ in problems.values()}, len(problems), pa.default_memory_pool().max_memory() >> 20)
"""


@pytest.mark.parametrize("lies", [False, True])
def test_a_dictionary_that_would_fill_the_memory_becomes_rejects(tmp_path: Path, lies: bool) -> None:
    """700 rows that all say the same 4 MiB: 2.9 GB, of a file of 200 kB; also where its footer says that the column has 1 byte."""
    values = pa.DictionaryArray.from_arrays(pa.array(np.zeros(700, np.int32)), pa.array(["b" * 2**22]))
    corpus = write(tmp_path / "a.parquet", values, row_group_size=1000)
    assert corpus.stat().st_size < 2**20
    if lies:
        size = varint(2 * pq.read_metadata(corpus).row_group(0).column(0).total_uncompressed_size)
        data = corpus.read_bytes()
        assert size in data[-2000:]
        corpus.write_bytes(data[:-2000] + data[-2000:].replace(size, b"\x82" + b"\x80" * (len(size) - 2) + b"\x00"))
        assert pq.read_metadata(corpus).row_group(0).column(0).total_uncompressed_size == 1
    done = subprocess.run([sys.executable, "-c", READ, str(corpus)], capture_output=True, text=True, check=True)
    *shown, megabytes = done.stdout.split()
    assert shown == ["700", "{'too_large'}", "700"]
    assert int(megabytes) < 600, "MiB that Arrow had allocated at once"


def varint(value: int) -> bytes:
    """As Thrift writes it."""
    groups = [value >> shift & 0x7F for shift in range(0, max(1, value.bit_length()), 7)]
    return bytes([group | 0x80 for group in groups[:-1]] + groups[-1:])


@pytest.mark.parametrize("nested", [False, True])
def test_a_unit_that_is_large_once_its_dictionary_is_spelled_out_fails_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, nested: bool) -> None:
    """Values just below the limit of a row, so that none is rejected."""
    monkeypatch.setattr(reading, "UNIT_BYTES", 20_000)
    values = pa.array(["a"] * 4 + ["b" * 9_900] * 4 + ["c"] * 8).dictionary_encode()
    deep = pa.StructArray.from_arrays([values], ["inside"])
    corpus = write(tmp_path / "a.parquet", ["x"] * 16, row_group_size=100, **{"deep": deep} if nested else {"flat": values})
    column = "deep.inside" if nested else "flat"
    with pytest.raises(RunFailed, match=r"1 of 4 units failed") as failed:
        embed(corpus, tmp_path / "out", Path("pocket"), text_column=column, rows_per_unit=4, max_text_bytes=10_000)
    assert "rows 4 to 8 take more than" in str(failed.value)


def test_small_row_groups_are_read_together_also_with_dictionaries(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reading, "BATCH_BYTES", 2**21)
    corpus = write(tmp_path / "a.parquet", [f"{row:010000}" for row in range(100)], row_group_size=2)
    [found] = files.discover([str(corpus)], Access())
    file = PlannedFile(index=0, url=found.url, size=found.size, version=found.version)
    with open(corpus, "rb") as reader:
        sizes = [table.num_rows for table in reading.batches(reader, file, range(50), Selection(text="text"), buffer_bytes=2**20)]
    assert sum(sizes) == 100
    assert min(sizes) > 2
    assert max(sizes) * 10_000 <= 2**21


@pytest.mark.parametrize("column", ["text", "id", "inside"])
def test_a_row_with_a_huge_value_is_rejected_and_the_others_are_not(tmp_path: Path, model: Path, column: str) -> None:
    huge = ["x", "y" * 2000, "z"]
    columns = {"id": pa.array(["0", "1", "2"]), "deep": pa.array([{"inside": text} for text in ("a", "b", "c")])}
    columns |= {"id": pa.array(huge)} if column == "id" else {"deep": pa.array([{"inside": text} for text in huge])} if column == "inside" else {}
    corpus = write(tmp_path / "a.parquet", huge if column == "text" else ["x", "y", "z"], **columns)
    text_column = "deep.inside" if column == "inside" else "text"
    receipt = embed(corpus, tmp_path / "out", model, max_text_bytes=1000, text_column=text_column)
    assert receipt.rejects_by_reason == {"too_large": 1}
    [reject] = rejects_of(tmp_path / "out")
    assert reject["source_row"] == 1
    assert "2,000 bytes" in reject["detail"]
    run = opened(tmp_path / "out")
    found = lookup.texts_at(run.plan.files, run.plan.selection, Access(), [(0, 0), (0, 1)])
    assert found.texts[0, 0]
    assert ((0, 1) in found.missing) == (column != "id")


def test_a_huge_field_costs_its_row_nothing_else_and_no_filter_hides_it(tmp_path: Path, model: Path) -> None:
    """The id beside it in its struct still names the reject; a kept list counts as a whole."""
    rows = [{"id": str(row), "inside": "y" * 2000 if row == 1 else "x"} for row in range(4)]
    corpus = write(tmp_path / "a.parquet", ["x"] * 4, deep=rows, tags=[["a"], ["a"], ["z" * 400] * 3, None])
    settings = {"text_column": "deep.inside", "id_column": "deep.id", "keep_columns": ["tags"], "filter": "length(deep.inside) > 0 and deep.id <> '3'"}
    receipt = embed(corpus, tmp_path / "out", model, max_text_bytes=1000, max_reject_rate=1.0, **settings)
    assert (receipt.rows_embedded, receipt.rejects_by_reason, receipt.rows_filtered) == (1, {"too_large": 2}, 1)
    assert [(reject["id"], reject["detail"].split(" bytes")[0]) for reject in rejects_of(tmp_path / "out")] == [("1", "2,000"), ("2", "1,200")]
    plan = opened(tmp_path / "out").plan
    table = sample.read(sample.places(plan.files, 10), plan.selection, Access())
    assert table[sample.SOURCE_ROW].to_pylist() == [0, 1, 2]


def test_a_footer_that_promises_too_much_is_a_bad_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    corpus = write(tmp_path / "a.parquet", ["x"] * 20, row_group_size=20, more=["y"] * 20)
    for name, limit in (("MAX_GROUP_ROWS", 19), ("MAX_ROWS", 19), ("MAX_COLUMNS", 1)):
        with monkeypatch.context() as changed:
            changed.setattr(files, name, limit)
            [problem] = files.footers(files.discover([str(corpus)], Access()), Access())
            assert "are read at most" in str(problem)
    wide = write(tmp_path / "b.parquet", ["x"], **{f"c{number}": ["y"] for number in range(20)})  # type: ignore[arg-type]
    monkeypatch.setattr(parquet, "MAX_FOOTER_ITEMS", 10)
    [problem] = files.footers(files.discover([str(wide)], Access()), Access())
    assert "Exceeded size limit" in str(problem)


def test_names_of_files_and_columns_are_names_and_nothing_else(tmp_path: Path, model: Path) -> None:
    """Directories that look like chained file systems, partitions that are encoded, a column that holds markup and terminal codes."""
    inside = tmp_path / "in" / "a::file:" / "x%2e%2e=%2e%2e%2Fetc" / "id=5;rm"
    write(inside / "c.parquet", ["one"], **{EVIL_NAME: ["../../x"]})  # type: ignore[arg-type]
    receipt = embed(tmp_path / "in", tmp_path / "out", model, keep_columns=[EVIL_NAME, "x.."], id_column=EVIL_NAME)
    assert receipt.rows_embedded == 1
    [row] = pa.concat_tables([table for _, table in opened(tmp_path / "out").shards()]).to_pylist()
    assert (row["id"], row["x.."]) == ("../../x", "../etc")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["in", "out"]
    with pytest.raises(LlmembError) as refused:
        embed(tmp_path / "in", tmp_path / "other", model, text_column="nowhere")
    assert not [character for character in str(refused.value) if not character.isprintable() and character != "\n"]


def test_a_listed_name_that_leads_out_is_no_file_of_the_corpus(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """An object store's keys may hold what no local name can."""
    write(tmp_path / "in" / "a.parquet", ["x"])
    listed = Storage.list
    monkeypatch.setattr(Storage, "list", lambda self, path="": [type(entry)(path=f"../{entry.path}", size=1, version="v") for entry in listed(self, path)])
    with pytest.raises(InputError, match="no Parquet files"):
        files.discover([str(tmp_path / "in")], Access())


def test_links_in_a_circle_are_read_once(tmp_path: Path) -> None:
    write(tmp_path / "in" / "a.parquet", ["x"])
    for name in ("one", "two"):
        (tmp_path / "in" / name).symlink_to(tmp_path / "in")
    assert [entry.path for entry in Storage(str(tmp_path / "in")).list()] == ["a.parquet"]


def test_results_cannot_write_to_the_terminal(tmp_path: Path) -> None:
    write(tmp_path / "in" / "a.parquet", [f"word {EVIL_NAME}\x00"], id=[f"{EVIL_NAME}\n  9.9999  forged"])
    embed(tmp_path / "in", tmp_path / "out", Path("pocket"))
    for options in ([], ["--json"]):
        shown = CliRunner().invoke(cli.llmemb, ["search", str(tmp_path / "out"), "word", *options])
        assert shown.exit_code == 0, shown.output
        assert not [character for character in shown.output if not character.isprintable() and character != "\n"]
        assert "\n  9.9999" not in shown.output
    assert json.loads(shown.stdout)[0]["hits"][0]["id"].startswith(EVIL_NAME)


# -- run directories ---------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("finished")
    write(root / "in" / "a.parquet", ["one", None, "two"], id=[1, 2, 3])
    embed(root / "in", root / "out", Path("pocket"), max_reject_rate=1)
    return root / "out"


@pytest.fixture
def run(finished: Path, tmp_path: Path) -> Path:
    """A copy of a finished run, its commit a file of its own, beside a shard that is none of it."""
    shutil.copytree(finished, tmp_path / "out")
    records = commits.read_all(Storage(str(finished)))
    commits.write(Storage(str(tmp_path / "out")), records[0])
    (tmp_path / "out" / "_llmemb" / "commits.parquet").unlink()
    shutil.copytree(finished / "data", tmp_path / "beside")
    return tmp_path / "out"


READERS: dict[str, Callable[[Path], Any]] = {
    "shards": lambda out: list(opened(out).shards()),
    "rejects": lambda out: list(opened(out).rejects()),
    "verify": lambda out: llmemb_ray.verify(opened(out)).require(),
    "export": lambda out: export(opened(out), str(out.parent / "npy"), to="npy"),
    "search": lambda out: find(SearchSettings(run=str(out), text=["x"])),
    "finish": lambda out: job.finish(opened(out).plan, Storage(str(out)), 0.0),
}


@pytest.mark.parametrize("named", ["../beside/{shard}", "{root}/beside/{shard}", "data/../../beside/{shard}", "file://{root}/beside/{shard}", "..\\x", 7])
def test_a_commit_cannot_name_a_file_elsewhere(run: Path, named: Any) -> None:
    [record] = (run / "_llmemb" / "commits").iterdir()
    values = json.loads(record.read_text())
    shard = values["shard"].removeprefix("data/")
    for field in ("shard", "rejects"):
        changed = named.format(shard=shard, root=run.parent) if isinstance(named, str) else named
        record.write_text(json.dumps(values | {field: changed}))
        for name, read in READERS.items():
            with pytest.raises(LlmembError, match=r"commits/"):
                read(run)
            assert (run.parent / "beside" / shard).is_file(), name
    assert not (run.parent / "npy").exists()


@pytest.mark.parametrize("spoilt", ['{"a": "1"}', '{"a": [1]}', "[" * 200_000])
def test_a_commit_whose_counts_are_none_is_named(run: Path, spoilt: str) -> None:
    [record] = (run / "_llmemb" / "commits").iterdir()
    values = record.read_text()
    assert '"reasons": {"null": 1}' in values
    record.write_text(values.replace('{"null": 1}', spoilt))
    with pytest.raises(OutputError, match=r"commits/.*is no commit record"):
        list(opened(run).shards())


@pytest.mark.parametrize(
    ("names", "shard"),
    [
        ({"{root}/harm": "payload"}, "data/a"),
        ({"../harm": "payload"}, "data/a"),
        ({"1": "../payload"}, "data/a"),
        ({"64": "payload"}, "data/a"),
        ({}, "../a"),
        ([], "data/a"),
    ],
)
def test_an_index_of_vectors_cannot_name_a_file_elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, names: Any, shard: str) -> None:
    monkeypatch.setenv("LLMEMB_CACHE", str(tmp_path / "cache"))
    output = Storage(str(tmp_path / "out"))
    for path in ("payload", "../payload"):
        (tmp_path / "out").mkdir(exist_ok=True)
        (tmp_path / "out" / path).write_bytes(b"owned\n")
    output.put(reuse.SHARDS, parquet.to_bytes(pa.table({"shard": [shard]})))
    named = {key.format(root=tmp_path): name for key, name in names.items()} if names else names
    output.put(reuse.RECORD, json.dumps({"of": {}, "partitions": named}).encode())
    with pytest.raises(OutputError, match=r"reuse/(index\.json|shards\.parquet) .*start the job again"):
        reuse._Index(output, lambda: None)
    assert not list(tmp_path.rglob("harm"))


def test_a_plan_cannot_name_a_file_elsewhere(run: Path) -> None:
    path = run / "_llmemb" / "plan" / "plan.json"
    record = json.loads(path.read_text()) | {"files": "../../beside/x.parquet"}
    del record["digest"]
    path.write_text(json.dumps(record | {"digest": digest(record)}))
    with pytest.raises(OutputError, match=r"plan\.json names '\.\./"):
        opened(run)


def test_nothing_is_deleted_through_a_link(run: Path) -> None:
    (run / "data" / "away").symlink_to(run.parent / "beside")
    for delete in (READERS["finish"], lambda out: opening.clear(Storage(str(out)))):
        with pytest.raises(StorageError, match="by a link"):
            delete(run)
    assert list((run.parent / "beside").iterdir())


def test_a_run_does_not_decide_that_code_may_run(tmp_path: Path, model: Path) -> None:
    """The plan says what the job was allowed to; who searches allows it anew."""
    coded = shutil.copytree(model, tmp_path / "coded")
    write(tmp_path / "in" / "a.parquet", ["one"])
    made = settled(tmp_path / "in", tmp_path / "out", coded)
    config = json.loads((coded / "config.json").read_text()) | {"model_type": "mine", "auto_map": {"AutoConfig": "code.Mine"}}
    (coded / "config.json").write_text(json.dumps(config))
    (coded / "code.py").write_text(f"open({str(tmp_path / 'harm')!r}, 'w')\n")
    path = tmp_path / "out" / "_llmemb" / "plan" / "plan.json"
    record = json.loads(path.read_text())
    record["settings"] |= {"trust_remote_code": True, "allow_pickle": True}
    del record["digest"]
    path.write_text(json.dumps(record | {"digest": digest(record)}))
    assert opened(tmp_path / "out").plan.run_key == made.plan.run_key
    with pytest.raises(ModelError, match="trust_remote_code"):
        find(SearchSettings(run=str(tmp_path / "out"), text=["x"]))
    assert not (tmp_path / "harm").exists()
