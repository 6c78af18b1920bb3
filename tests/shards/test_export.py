"""Each form of export, loaded back with its own library and compared with the run, row by row."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

import llmemb_ray
from llmemb_ray import cli
from llmemb_ray.errors import ConfigError, OutputError
from llmemb_ray.search.exact import search_vectors
from llmemb_ray.shards import commits
from llmemb_ray.shards.export import export, exporting, rows, writers
from llmemb_ray.shards.run import Run
from llmemb_ray.shards.schema import raw_values
from tests.small_jobs import embed, opened, rows_of, write
from tests.small_models import SENTENCES

FORMS = ["npy", "faiss", "lance", "hf"]
LIBRARIES = {"faiss": "faiss", "lance": "lance", "hf": "datasets"}


def needs(form: str) -> None:
    if form in LIBRARIES:
        pytest.importorskip(LIBRARIES[form])


def made(directory: Path, model: Path, **settings: Any) -> Path:
    """47 embedded rows and one reject, in two files and six units, with a kept column that can be null."""
    for file in range(2):
        texts = [f"{SENTENCES[(row + file) % len(SENTENCES)]} {row}" if (file, row) != (1, 3) else None for row in range(24)]
        write(
            directory / "in" / f"{file}.parquet",
            texts,
            id=[f"{file}-{row}" for row in range(24)],
            year=[2000 + row if row % 5 else None for row in range(24)],
            row_group_size=8,
        )
    embed(directory / "in", directory / "out", model, rows_per_unit=8, keep_columns=["year"], **settings)
    return directory / "out"


@pytest.fixture(scope="module")
def floats(tmp_path_factory: pytest.TempPathFactory, model: Path) -> Path:
    return made(tmp_path_factory.mktemp("floats"), model)


@pytest.fixture(scope="module", params=["float16", "int8", "ubinary"])
def coded(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory, model: Path) -> Path:
    return made(tmp_path_factory.mktemp(str(request.param)), model, dtype=request.param)


def decoded(output: Path) -> np.ndarray:
    run = opened(output)
    return run.precision.decode(rows_of(output)["embedding"])


def stored(output: Path) -> np.ndarray:
    return raw_values(rows_of(output)["embedding"])


def loaded(form: str, dest: Path, width: int) -> tuple[np.ndarray, pa.Table]:
    """(vectors, table with ids) of an export, through the library that it is for."""
    if form == "npy":
        return np.load(dest / "vectors.npy", mmap_mode="r"), pq.read_table(dest / "ids.parquet")
    if form == "faiss":
        import faiss

        ids = pq.read_table(dest / "ids.parquet")
        index = faiss.read_index(str(dest / "index.faiss"))
        return np.stack([index.reconstruct(int(row)) for row in ids["row"].to_pylist()]), ids
    if form == "lance":
        import lance

        table = lance.dataset(str(dest)).to_table()
    else:
        import datasets

        table = datasets.load_dataset(str(dest), split="train", cache_dir=str(dest.parent / "hf-cache")).with_format("arrow")[:]
    vectors = table["embedding"].combine_chunks()
    assert vectors.type.list_size == width
    return raw_values(vectors), table


@pytest.mark.parametrize("form", FORMS)
def test_an_export_holds_the_vectors_ids_and_kept_columns_in_the_order_of_the_corpus(floats: Path, tmp_path: Path, form: Any) -> None:
    needs(form)
    exported = export(opened(floats), str(tmp_path / "new" / "dest"), to=form)
    expected = rows_of(floats)
    vectors, table = loaded(form, tmp_path / "new" / "dest", exported.dimension)
    assert vectors.dtype == np.float32
    np.testing.assert_array_equal(vectors, stored(floats))
    for name in ("id", "source_file", "source_row", "year"):
        assert table[name].to_pylist() == expected[name].to_pylist(), name
    assert (exported.rows, exported.form, exported.dtype, exported.finished, exported.normalized) == (47, form, "float32", True, True)
    assert exported.bytes > vectors.nbytes
    assert [path.name for path in (tmp_path / "new").iterdir() if path.name != "hf-cache"] == ["dest"], "nothing else is left behind"


@pytest.mark.parametrize("form", FORMS)
def test_codes_are_exported_as_the_vectors_they_stand_for(coded: Path, tmp_path: Path, form: Any) -> None:
    needs(form)
    exported = export(opened(coded), str(tmp_path / "dest"), to=form)
    vectors, _ = loaded(form, tmp_path / "dest", exported.dimension)
    np.testing.assert_array_equal(vectors, decoded(coded))


@pytest.mark.parametrize("form", ["npy", "lance", "hf"])
def test_vectors_are_exported_in_half_precision_on_request(floats: Path, tmp_path: Path, form: Any) -> None:
    needs(form)
    export(opened(floats), str(tmp_path / "dest"), to=form, dtype="float16")
    vectors, _ = loaded(form, tmp_path / "dest", 32)
    assert vectors.dtype == np.float16
    np.testing.assert_array_equal(vectors, stored(floats).astype(np.float16))


@pytest.mark.parametrize("form", ["npy", "lance", "hf"])
def test_raw_values_are_those_of_the_shards(coded: Path, tmp_path: Path, form: Any) -> None:
    needs(form)
    export(opened(coded), str(tmp_path / "dest"), to=form, raw=True)
    codes = stored(coded)
    vectors, _ = loaded(form, tmp_path / "dest", codes.shape[1])
    assert vectors.dtype == codes.dtype
    np.testing.assert_array_equal(vectors, codes)
    mark = json.loads((tmp_path / "dest" / exporting.MARK).read_text())
    assert (mark["calibration"] is not None) == (codes.dtype == np.int8), "with it int8 codes can be read"


def test_faiss_finds_what_exact_search_finds(floats: Path, tmp_path: Path) -> None:
    faiss = pytest.importorskip("faiss")
    run = opened(floats)
    export(run, str(tmp_path / "dest"), to="faiss")
    ids = pq.read_table(tmp_path / "dest" / "ids.parquet")["id"].to_pylist()
    queries = stored(floats)[::9] + np.float32(0.01)
    scores, found = faiss.read_index(str(tmp_path / "dest" / "index.faiss")).search(queries, 5)
    expected = search_vectors(run, queries, top_k=5)
    assert [[ids[row] for row in hits] for hits in found] == [[hit.id for hit in hits] for hits in expected]
    np.testing.assert_allclose(scores, [[hit.score for hit in hits] for hits in expected], atol=1e-5)


def test_a_faiss_factory_is_trained_on_the_run(floats: Path, tmp_path: Path) -> None:
    faiss = pytest.importorskip("faiss")
    export(opened(floats), str(tmp_path / "dest"), to="faiss", faiss_factory="IVF1,SQ8")
    index = faiss.read_index(str(tmp_path / "dest" / "index.faiss"))
    assert (index.ntotal, index.metric_type) == (47, faiss.METRIC_INNER_PRODUCT)
    _, found = index.search(stored(floats), 1)
    assert (found[:, 0] == np.arange(47)).mean() > 0.9, "eight bits a value keep nearly every vector its own nearest"
    for factory, words in (("IVF64,Flat", "47 vectors"), ("Nonsense", "'Nonsense'")):
        with pytest.raises(ConfigError, match=f"faiss_factory: .*{words}"):
            export(opened(floats), str(tmp_path / "other"), to="faiss", faiss_factory=factory)
    assert not (tmp_path / "other").exists()


def test_raw_bits_make_a_binary_index_and_other_raw_values_none(coded: Path, tmp_path: Path) -> None:
    faiss = pytest.importorskip("faiss")
    codes = stored(coded)
    if codes.dtype != np.uint8:
        with pytest.raises(ConfigError, match="raw: faiss has no index of raw"):
            export(opened(coded), str(tmp_path / "dest"), to="faiss", raw=True)
        return
    export(opened(coded), str(tmp_path / "dest"), to="faiss", raw=True)
    distances, found = faiss.read_index_binary(str(tmp_path / "dest" / "index.faiss")).search(codes, 47)
    expected = np.unpackbits(codes[:, None] ^ codes[None], axis=2).sum(axis=2)
    np.testing.assert_array_equal(distances, np.take_along_axis(expected, found, axis=1))


def test_chunks_are_exported_with_their_places(tmp_path: Path, model: Path) -> None:
    text = "Snow fell all night. " * 10 + "The market fell again. " * 10
    corpus = write(tmp_path / "in" / "a.parquet", ["short", text])
    embed(corpus, tmp_path / "out", model, chunk_tokens=40)
    exported = export(opened(tmp_path / "out"), str(tmp_path / "dest"), to="npy")
    table = pq.read_table(tmp_path / "dest" / "ids.parquet")
    expected = rows_of(tmp_path / "out")
    assert exported.rows == expected.num_rows > 3
    assert "id" not in table.column_names, "the corpus has none"
    for name in ("source_row", "chunk", "chunk_start", "chunk_end"):
        assert table[name].to_pylist() == expected[name].to_pylist()
    assert table["row"].to_pylist() == list(range(expected.num_rows))


@pytest.mark.parametrize("form", FORMS)
def test_small_blocks_and_files_change_nothing(floats: Path, tmp_path: Path, form: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Blocks of 3 rows and files of 10: their borders cross those of row groups and units."""
    needs(form)
    monkeypatch.setattr(rows, "BLOCK_BYTES", 3 * 4 * 32)
    monkeypatch.setattr(writers, "HF_FILE_BYTES", 10 * 4 * 32)
    export(opened(floats), str(tmp_path / "dest"), to=form)
    vectors, table = loaded(form, tmp_path / "dest", 32)
    np.testing.assert_array_equal(vectors, stored(floats))
    assert table["id"].to_pylist() == rows_of(floats)["id"].to_pylist()
    if form == "hf":
        names = sorted(path.name for path in (tmp_path / "dest" / "data").iterdir())
        assert names == [f"train-{number:05d}-of-00005.parquet" for number in range(5)]


# -- what is refused ---------------------------------------------------------------------------------


@pytest.fixture
def unfinished(floats: Path, tmp_path: Path) -> Run:
    import shutil

    shutil.copytree(floats, tmp_path / "part")
    run = opened(tmp_path / "part")
    for commit in run.commits[:3]:
        commits.write(run.storage, commit)
    (tmp_path / "part" / commits.COMPACTED).unlink()
    (tmp_path / "part" / "_llmemb" / "receipt.json").unlink()
    return opened(tmp_path / "part")


def test_a_run_that_is_not_finished_is_exported_only_on_request(unfinished: Run, tmp_path: Path) -> None:
    with pytest.raises(OutputError, match=r"not finished.*allow_unfinished"):
        export(unfinished, str(tmp_path / "dest"), to="npy")
    exported = export(unfinished, str(tmp_path / "dest"), to="npy", allow_unfinished=True)
    assert (exported.rows, exported.finished) == (24, False)
    assert np.load(tmp_path / "dest" / "vectors.npy").shape == (24, 32)


def test_only_an_earlier_export_is_replaced_and_only_on_request(floats: Path, tmp_path: Path) -> None:
    run, dest = opened(floats), tmp_path / "dest"
    dest.mkdir()
    export(run, str(dest), to="npy")
    with pytest.raises(OutputError, match=r"holds an export already.*overwrite"):
        export(run, str(dest), to="hf")
    export(run, f"file://{dest}", to="hf", overwrite=True)
    assert sorted(path.name for path in dest.iterdir()) == ["data", exporting.MARK]
    for other in (floats, floats.parent):
        with pytest.raises(OutputError, match="no export wrote"):
            export(run, str(other), to="npy", overwrite=True)
    (tmp_path / "file").write_text("mine")
    with pytest.raises(OutputError, match="no export wrote"):
        export(run, str(tmp_path / "file"), to="npy", overwrite=True)
    assert opened(floats).receipt is not None
    assert (tmp_path / "file").read_text() == "mine"
    with pytest.raises(ConfigError, match="not local"):
        export(run, "s3://bucket/dest", to="npy")


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("damage", ["gone", "short"])
def test_an_export_that_fails_leaves_nothing_and_keeps_what_was_there(floats: Path, tmp_path: Path, form: Any, damage: str) -> None:
    import shutil

    needs(form)
    shutil.copytree(floats, tmp_path / "run")
    run = opened(tmp_path / "run")
    export(run, str(tmp_path / "dest"), to=form)
    before = sorted((path, path.stat().st_mtime_ns) for path in (tmp_path / "dest").rglob("*"))
    shard = sorted((tmp_path / "run" / "data").iterdir())[-1]
    if damage == "gone":
        shard.unlink()
    else:
        table = pq.read_table(shard)
        pq.write_table(table.slice(1), shard)
    with pytest.raises(OutputError, match="run verify"):
        export(run, str(tmp_path / "dest"), to=form, overwrite=True)
    assert sorted((path, path.stat().st_mtime_ns) for path in (tmp_path / "dest").rglob("*")) == before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["dest", "run"]


@pytest.mark.parametrize(("form", "module"), [("faiss", "faiss"), ("lance", "lance")])
def test_a_library_that_is_missing_is_named_with_the_way_to_get_it(floats: Path, tmp_path: Path, form: Any, module: str) -> None:
    script = f"import sys; sys.modules[{module!r}] = None\nfrom llmemb_ray.cli import main\nsys.exit(main(sys.argv[1:]))"
    done = subprocess.run([sys.executable, "-c", script, "export", str(floats), "--to", form, str(tmp_path / "dest")], capture_output=True, text=True)
    assert done.returncode == 2
    assert "pip install 'llmemb-ray[export]'" in done.stderr
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"to": "csv"}, "npy, faiss, lance, hf"),
        ({"to": "npy", "raw": True, "dtype": "float16"}, "exclude each other"),
        ({"to": "npy", "faiss_factory": "Flat"}, "is for faiss"),
        ({"to": "faiss", "dtype": "float16"}, "SQfp16"),
    ],
)
def test_settings_that_do_not_go_together_are_refused(floats: Path, tmp_path: Path, settings: Any, words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        export(opened(floats), str(tmp_path / "dest"), **settings)
    assert not list(tmp_path.iterdir())


def test_a_run_without_vectors_is_not_exported(tmp_path: Path, model: Path) -> None:
    embed(write(tmp_path / "in" / "a.parquet", [None, ""]), tmp_path / "out", model, max_reject_rate=1.0)
    with pytest.raises(OutputError, match="nothing to export"):
        export(opened(tmp_path / "out"), str(tmp_path / "dest"), to="npy")


# -- the command -------------------------------------------------------------------------------------


def test_the_command_tells_what_it_wrote_and_how_to_load_it(floats: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["export", str(floats), "--to", "npy", str(tmp_path / "dest")]) == 0
    shown = capsys.readouterr()
    assert shown.out.startswith("47 vectors of 32 dimensions as float32, ")
    expression = shown.out.strip().splitlines()[-1].removeprefix("to load it: ")
    np.testing.assert_array_equal(eval(expression, {"numpy": np}), stored(floats))
    assert cli.main(["export", str(floats), "--to", "npy", str(tmp_path / "dest"), "--overwrite", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["space"] == opened(floats).plan.space_digest
    assert cli.main(["export", str(floats), "--to", "npy", str(tmp_path / "dest")]) == 2


def test_export_is_a_public_name() -> None:
    assert llmemb_ray.export is export


# -- many rows ---------------------------------------------------------------------------------------

MANY, WIDTH = 600_000, 64

MEASURE = """
import re, sys
from llmemb_ray.cli import main
sys.exit(main(sys.argv[1:]) or print(re.search(r"VmHWM:\\s+(\\d+)", open("/proc/self/status").read())[1]))
"""
"""Runs the command and prints the most memory that the process had, in KiB (getrusage would count the parent's)."""


@pytest.fixture(scope="module")
def many(floats: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """600,000 vectors (154 MB) in six shards under the plan of a real run. ``third`` beside it has two of the shards."""
    import shutil
    from dataclasses import replace

    from llmemb_ray.shards import schema
    from llmemb_ray.shards.plan import Plan

    directory = tmp_path_factory.mktemp("many") / "out"
    shutil.copytree(floats, directory)
    run = opened(directory)
    plan = Plan.load(run.storage)
    assert plan is not None
    replace(plan, dimension=WIDTH).save(run.storage)
    random = np.random.default_rng(1)
    made = []
    for commit in run.commits:
        count = MANY // 6
        table = pa.table(
            {
                "id": [f"{commit.unit}-{row}" for row in range(count)],
                "source_file": pa.array(np.full(count, commit.file, np.int32)),
                "source_row": pa.array(np.arange(count)),
                "embedding": schema.embedding_column(random.standard_normal((count, WIDTH)), "float32"),
                "n_tokens": pa.array(np.ones(count, np.int32)),
                "truncated": pa.array(np.zeros(count, bool)),
                "year": pa.array(np.zeros(count, np.int64)),
            }
        )
        assert commit.shard is not None
        run.storage.put(commit.shard, schema.encode_shard(table, {}, vector_bytes=4 * WIDTH))
        made.append(replace(commit, vectors=count))
    shutil.copytree(directory, directory.parent / "third")
    commits.compact(run.storage, made)
    commits.compact(opened(directory.parent / "third").storage, made[:2])
    return directory


def memory(*arguments: object) -> int:
    """Bytes of the largest resident set of a process that runs the command."""
    done = subprocess.run([sys.executable, "-c", MEASURE, *map(str, arguments)], capture_output=True, text=True, check=True)
    return 1024 * int(done.stdout.strip().splitlines()[-1])


@pytest.mark.parametrize("form", ["npy", "lance", "hf"])
def test_memory_does_not_grow_with_the_rows(many: Path, tmp_path: Path, form: str) -> None:
    needs(form)
    third = memory("export", many.parent / "third", "--to", form, tmp_path / "third", "--allow-unfinished")
    whole = memory("export", many, "--to", form, tmp_path / "many", "--allow-unfinished")
    assert whole - third < MANY * WIDTH * 4 / 2, "less than three quarters of the vectors that it has more; Arrow's pool keeps some of what it freed"


def test_a_killed_export_leaves_nothing_that_looks_finished(many: Path, tmp_path: Path) -> None:
    arguments = [sys.executable, "-m", "llmemb_ray.cli", "export", str(many), "--to", "npy", str(tmp_path / "dest"), "--allow-unfinished"]
    process = subprocess.Popen(arguments, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 60
    while not list(tmp_path.glob("dest.tmp-*/vectors.npy")) and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.001)
    os.kill(process.pid, signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    assert not (tmp_path / "dest").exists()
    assert export(opened(many), str(tmp_path / "dest"), to="npy", allow_unfinished=True).rows == MANY
