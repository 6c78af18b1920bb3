"""The job as a whole, in one process: continuing, refusing, overwriting, finishing; and results that depend on the texts alone."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest

import llmemb_ray
from llmemb_ray import cli
from llmemb_ray.errors import LlmembError, OutputError, RejectsExceeded, RunFailed, RunMismatch
from llmemb_ray.pipeline import job, opening
from llmemb_ray.shards import commits
from llmemb_ray.shards.verify import verify
from llmemb_ray.storage import Storage
from tests.s3_server import KEY, SECRET, S3Server
from tests.small_jobs import embed, opened, problems_of, rejects_of, rows_of, settled, vectors_by_text_id, vectors_of, write
from tests.small_models import make_model


def sentences(count: int, first: int = 0) -> list[str]:
    return [f"sentence number {row} of many" for row in range(first, first + count)]


def assert_close(one: dict[Any, Any], other: dict[Any, Any]) -> None:
    assert one.keys() == other.keys()
    assert max(float(np.abs(one[key] - other[key]).max()) for key in one) <= 1e-5


def without_weights(model: Path, directory: Path) -> Path:
    """A copy of a model that fails when its weights are loaded. The size and name of the file stay, so its own key differs."""
    shutil.copytree(model, directory)
    (directory / "model.safetensors").write_bytes(b"\0" * (directory / "model.safetensors").stat().st_size)
    return directory


# -- continuing --------------------------------------------------------------------------------------


def test_a_run_that_failed_in_part_does_only_what_is_missing(tmp_path: Path, model: Path) -> None:
    for number in range(3):
        write(tmp_path / "in" / f"{number}.parquet", sentences(20, number * 20), id=list(range(number * 20, number * 20 + 20)))
    embed(tmp_path / "in", tmp_path / "whole", model, rows_per_unit=10)
    hidden = tmp_path / "hidden.parquet"
    stat = (tmp_path / "in" / "1.parquet").stat()

    shutil.copy2(tmp_path / "in" / "1.parquet", hidden)
    broken = bytearray(hidden.read_bytes())
    start = broken.find(b"sentence number 20")
    broken[4:start] = b"\xff" * (start - 4)
    (tmp_path / "in" / "1.parquet").write_bytes(broken)
    os.utime(tmp_path / "in" / "1.parquet", ns=(stat.st_atime_ns, stat.st_mtime_ns))
    with pytest.raises(RunFailed, match="1 of 6 units failed") as raised:
        embed(tmp_path / "in", tmp_path / "out", model, rows_per_unit=10)
    assert "1.parquet" in str(raised.value)
    assert "run the same command again" in str(raised.value)
    assert opened(tmp_path / "out").receipt is None
    before = {commit.unit: commit for commit in opened(tmp_path / "out").commits}
    assert sorted(before) == [f"{file:06d}-{start:012d}" for file, start in ((0, 0), (0, 10), (1, 10), (2, 0), (2, 10))]

    shutil.copy2(hidden, tmp_path / "in" / "1.parquet")
    receipt = embed(tmp_path / "in", tmp_path / "out", model, rows_per_unit=10)
    after = {commit.unit: commit for commit in opened(tmp_path / "out").commits}
    assert {unit: after[unit] for unit in before} == before, "a committed unit was attempted again"
    assert (receipt.units, receipt.rows_embedded) == (6, 60)
    assert problems_of(tmp_path / "out", tmp_path / "in") == []
    assert_close(vectors_by_text_id(tmp_path / "out"), vectors_by_text_id(tmp_path / "whole"))


def test_a_finished_run_is_left_alone(tmp_path: Path, model: Path, corpus: Path) -> None:
    first = embed(corpus, tmp_path / "out", model)
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "out").rglob("*") if path.is_file()}
    assert embed(corpus, tmp_path / "out", model) == first
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "out").rglob("*") if path.is_file()} == before


@pytest.mark.parametrize("compacted", ["wholly", "in part", "not yet"])
def test_a_job_that_died_while_finishing_finishes_without_embedding_again(tmp_path: Path, model: Path, corpus: Path, compacted: str) -> None:
    first = embed(corpus, tmp_path / "out", model, rows_per_unit=15)
    shards = {path.name: path.stat().st_mtime_ns for path in (tmp_path / "out" / "data").iterdir()}
    (tmp_path / "out" / "_llmemb" / "receipt.json").unlink()
    storage = Storage(str(tmp_path / "out"))
    all_commits = opened(tmp_path / "out").commits
    for commit in all_commits if compacted == "not yet" else all_commits[::2] if compacted == "in part" else []:
        commits.write(storage, commit)
    if compacted == "not yet":
        (tmp_path / "out" / commits.COMPACTED).unlink()
    (tmp_path / "out" / "data" / "000000-000000000000-0123456789ab.parquet").write_bytes(b"left by an attempt that died")
    second = embed(corpus, tmp_path / "out", model, rows_per_unit=15)
    differing = {name for name, value in first.to_dict().items() if second.to_dict()[name] != value}
    assert differing <= {"finished", "seconds_wall"}
    assert {path.name: path.stat().st_mtime_ns for path in (tmp_path / "out" / "data").iterdir()} == shards
    assert problems_of(tmp_path / "out", corpus) == []


def test_a_run_whose_committed_shard_is_gone_is_not_called_finished(tmp_path: Path, model: Path, corpus: Path) -> None:
    embed(corpus, tmp_path / "out", model)
    (tmp_path / "out" / "_llmemb" / "receipt.json").unlink()
    gone = next((tmp_path / "out" / "data").iterdir())
    gone.unlink()
    with pytest.raises(RunFailed, match=gone.name):
        embed(corpus, tmp_path / "out", model)
    assert not (tmp_path / "out" / "_llmemb" / "receipt.json").exists()


def test_the_reject_gate_fails_the_job_but_not_the_work(tmp_path: Path, model: Path) -> None:
    texts: list[str | None] = [*sentences(20), *[None] * 12]
    corpus = write(tmp_path / "in" / "a.parquet", texts)
    with pytest.raises(RejectsExceeded, match=r"12 of 32 rows were rejected.*12 null"):
        embed(corpus, tmp_path / "out", model)
    shards = {path.name: path.stat().st_mtime_ns for path in (tmp_path / "out" / "data").iterdir()}
    with pytest.raises(RejectsExceeded, match="max_reject_rate"):
        embed(corpus, tmp_path / "out", model, max_reject_rate=0.37)
    receipt = embed(corpus, tmp_path / "out", model, max_reject_rate=0.375)
    assert (receipt.rows_embedded, receipt.rows_rejected) == (20, 12)
    assert {path.name: path.stat().st_mtime_ns for path in (tmp_path / "out" / "data").iterdir()} == shards
    assert len(rejects_of(tmp_path / "out")) == 12


# -- refusing ----------------------------------------------------------------------------------------


def test_other_settings_are_refused_field_by_field_before_the_model_is_loaded(tmp_path: Path, model: Path, corpus: Path) -> None:
    """The second model's weights are noise that no loader accepts: an attempt to load them would raise ModelError instead."""
    embed(corpus, tmp_path / "out", model, limit_rows=20)
    before = {path: path.read_bytes() for path in (tmp_path / "out").rglob("*") if path.is_file()}
    broken = without_weights(model, tmp_path / "broken")
    with pytest.raises(RunMismatch) as raised:
        embed(corpus, tmp_path / "out", broken, limit_rows=30, pooling="mean", prompt="none", dtype="float16")
    message = str(raised.value)
    for field in ("space.model", "space.representation.pooling", "space.representation.document.template", "engine.dtype", "corpus.limit_rows"):
        assert f"  {field}: the run there has" in message
    assert '"last", asked for now "mean"' in message
    assert "20, asked for now 30" in message
    assert "space.tokenizer" not in message
    assert "overwrite" in message
    assert {path: path.read_bytes() for path in (tmp_path / "out").rglob("*") if path.is_file()} == before
    with pytest.raises(LlmembError):
        embed(corpus, tmp_path / "new", broken)


def test_a_changed_corpus_is_refused_by_its_files_names(tmp_path: Path, model: Path, corpus: Path) -> None:
    embed(corpus, tmp_path / "out", model)
    write(corpus / "part-9.parquet", ["new"], id=["new"])
    with pytest.raises(OutputError, match=r"part-9.parquet is new"):
        embed(corpus, tmp_path / "out", model)


def test_an_output_with_other_things_in_it_is_refused_and_left_alone(tmp_path: Path, model: Path, corpus: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "thesis.tex").write_text("years of work")
    with pytest.raises(OutputError, match=r"thesis.tex"):
        embed(corpus, tmp_path / "out", model)
    assert [path.name for path in (tmp_path / "out").rglob("*")] == ["thesis.tex"]


def test_overwrite_deletes_the_runs_own_files_and_nothing_else(tmp_path: Path, model: Path, corpus: Path) -> None:
    embed(corpus, tmp_path / "out", model)
    (tmp_path / "out" / "notes").mkdir()
    foreign = [tmp_path / "out" / "notes" / "mine.txt", tmp_path / "out" / "README.md", tmp_path / "out" / "database.parquet"]
    for path in foreign:
        path.write_text("not of the run")
    old = {path.name for path in (tmp_path / "out" / "data").iterdir()}
    receipt = embed(corpus, tmp_path / "out", model, overwrite=True, pooling="mean")
    assert all(path.read_text() == "not of the run" for path in foreign)
    assert {path.name for path in (tmp_path / "out" / "data").iterdir()} & old == set()
    assert opened(tmp_path / "out").plan.representation.pooling == "mean"
    assert opened(tmp_path / "out").plan.run_key == receipt.run_key
    for path in foreign:
        path.unlink()
    assert problems_of(tmp_path / "out", corpus) == []


# -- windows -----------------------------------------------------------------------------------------


def test_windows_hold_the_missing_units_once_and_about_as_many_as_asked(tmp_path: Path, model: Path, corpus: Path) -> None:
    plan = settled(corpus, tmp_path / "out", model, rows_per_unit=4).plan
    names = [unit.name for unit in plan.units()]
    done = set(names[3:9])
    found = list(job.windows(plan, done, 5))
    wanted = [sorted(name for task in window for name in task.wanted) for window in found]
    assert [name for window in wanted for name in window] == [name for name in names if name not in done]
    largest_piece = max(len(piece.units) for piece in plan.pieces())
    assert all(5 <= len(window) < 5 + largest_piece for window in wanted[:-1])
    assert list(job.windows(plan, set(names), 5)) == []


def test_a_window_lasts_however_many_actors_share_it() -> None:
    """Each window loads the models anew: 200 units for each of 512 actors, not 4,000 in all."""
    assert [job.window_units(actors) for actors in (1, 20, 21, 512)] == [4000, 4000, 4200, 102_400]


def test_a_job_of_many_windows_is_the_same_job(tmp_path: Path, model: Path, corpus: Path) -> None:
    embed(corpus, tmp_path / "one", model, rows_per_unit=10)
    embed(corpus, tmp_path / "many", model, rows_per_unit=10, window_units=1)
    assert_close(vectors_by_text_id(tmp_path / "one"), vectors_by_text_id(tmp_path / "many"))


# -- the corpus's shapes -----------------------------------------------------------------------------


def test_partitions_filter_kept_columns_and_a_template_of_columns_in_one_run(tmp_path: Path, model: Path) -> None:
    for year, lang in ((2023, "en"), (2024, "de"), (2024, "en")):
        columns: dict[str, Any] = {
            "id": [f"{year}-{lang}-{row}" for row in range(8)],
            "title": [f"title {row}" if row % 2 else None for row in range(8)],
            "stars": list(range(8)),
        }
        write(tmp_path / "in" / f"year={year}" / f"lang={lang}" / "part.parquet", sentences(8), **columns)
    settings: dict[str, Any] = {"text_column": "{title}: {text} ({year}, {lang})", "keep_columns": ["lang", "stars", "year"], "prompt": "say {text}"}
    receipt = embed(tmp_path / "in", tmp_path / "out", model, filter="stars >= 2 AND year = 2024", rows_per_unit=3, **settings)
    assert (receipt.rows_read, receipt.rows_filtered) == (12, 12)
    table = rows_of(tmp_path / "out")
    assert set(table["lang"].to_pylist()) == {"en", "de"}
    assert set(table["year"].to_pylist()) == {2024}
    assert table["stars"].to_pylist() == list(range(2, 8)) * 2
    assert table["source_row"].to_pylist() == list(range(2, 8)) * 2, "a row's number is that of its file, not of what the filter left"
    texts = [f"{f'title {row}' if row % 2 else ''}: sentence number {row} of many (2024, {lang})" for lang in ("de", "en") for row in range(2, 8)]
    ready = settled(tmp_path / "in", tmp_path / "other", model, **settings)
    assert float(np.abs(vectors_of(table["embedding"]) - ready.embedder().encode(texts)).max()) <= 1e-5
    assert problems_of(tmp_path / "out", tmp_path / "in") == []


@pytest.mark.parametrize("kind", ["llama", "opt", "qwen3", "gemma3_text"])
def test_vectors_depend_on_the_texts_alone(tmp_path: Path, kind: str) -> None:
    """Not on the order of files and rows, the size of units or of forward passes."""
    model = make_model(tmp_path / kind, kind)
    rows = [(f"id-{row}", ("word " * (row * 5 % 17)).strip() + f" number {row}") for row in range(36)]
    for name, order, files in (("forth", rows, 2), ("back", rows[::-1], 3)):
        size = len(rows) // files
        for number in range(files):
            part = order[number * size : (number + 1) * size]
            write(tmp_path / name / f"{number}.parquet", [text for _, text in part], id=[id_ for id_, _ in part])
    embed(tmp_path / "forth", tmp_path / "out-1", model)
    expected = vectors_by_text_id(tmp_path / "out-1")
    embed(tmp_path / "forth", tmp_path / "out-2", model, rows_per_unit=5, token_budget=40)
    embed(tmp_path / "back", tmp_path / "out-3", model, token_budget=300)
    for output in ("out-2", "out-3"):
        assert_close(vectors_by_text_id(tmp_path / output), expected)


# -- secrets -----------------------------------------------------------------------------------------


def contents(directory: Path) -> str:
    """Everything below a directory as text; Parquet files decoded, for a secret could lie compressed in them."""
    parts = []
    for path in sorted(directory.rglob("*")):
        if path.is_file():
            parts += [str(path), path.read_bytes().decode("latin-1")]
        if path.suffix == ".parquet":
            parts += [str(pq.read_table(path).to_pylist()), str(pq.read_schema(path).metadata)]
    return "\n".join(parts)


SIGNATURE = "sig-0123456789-secret"


def test_secrets_stand_in_no_file_message_or_output(
    s3: S3Server,
    model: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    write(s3.path("corpus/a.parquet"), [*sentences(10), None])
    write(s3.path("corpus/bad.parquet"), ["x"])
    s3.path("corpus/bad.parquet").write_bytes(b"not Parquet")
    config = tmp_path / "job.yaml"
    access = {"storage_options": {"key": KEY, "secret": SECRET}, "endpoint_url": s3.endpoint_url}
    config.write_text(json.dumps(access | {"model": str(model), "actors": "0", "storage_retry_seconds": 5}))
    said = ""

    def llmemb(*arguments: str) -> int:
        nonlocal said
        code = cli.main(arguments)
        shown = capsys.readouterr()
        said += shown.out + shown.err
        return code

    embedding = ("embed", s3.url("corpus"), s3.url("out"), "--config", str(config))
    assert llmemb(*embedding) == 2, said
    Storage(s3.url("corpus"), s3.access()).delete(["bad.parquet"])
    assert llmemb(*embedding, "--print-config") == 0
    assert llmemb("plan", s3.url("corpus"), s3.url("out"), "--config", str(config)) == 0, said
    assert llmemb(*embedding) == 0, said
    assert llmemb(*embedding, "--pooling", "mean") == 2, "another run key"
    assert llmemb("embed", s3.url("corpus"), "s3://no-such-bucket/out", "--config", str(config)) in (1, 2)
    reading = tmp_path / "access.yaml"
    reading.write_text(json.dumps(access | {"storage_retry_seconds": 5}))
    for command in (("status", s3.url("out")), ("status", s3.url("out"), "--json"), ("verify", s3.url("out")), ("search", s3.url("out"), "sentence", "--json")):
        assert llmemb(*command, "--config", str(reading)) == 0, said
    reading.write_text(json.dumps(access | {"storage_options": {"key": KEY, "secret": SECRET + "x"}, "storage_retry_seconds": 1}))
    assert llmemb("status", s3.url("out"), "--config", str(reading)) != 0
    written = contents(s3.path("out"))
    next(s3.path("out/data").iterdir()).write_bytes(b"damaged")
    reading.write_text(json.dumps(access | {"storage_retry_seconds": 5}))
    assert llmemb("verify", s3.url("out"), "--config", str(reading)) == 3

    write(tmp_path / "in" / "a.parquet", sentences(4))
    signed = f"http://user:{SIGNATURE}@127.0.0.1:1/?X-Amz-Signature={SIGNATURE}"
    assert llmemb("embed", str(tmp_path / "in"), str(tmp_path / "out"), "--config", str(config), "--endpoint-url", signed) == 0
    config.write_text(json.dumps({"model": str(model), "actors": "0", "storage_retry_seconds": 1}))
    for place in (f"http://user:{SIGNATURE}@127.0.0.1:1/in.parquet", f"http://127.0.0.1:1/in.parquet?sig={SIGNATURE}"):
        assert llmemb("embed", place, str(tmp_path / "none"), "--config", str(config)) in (1, 2)
        assert llmemb("embed", str(tmp_path / "in"), str(tmp_path / "none"), "--config", str(config), "--model", place) in (
            1,
            2,
        )

    written += contents(tmp_path / "out")
    assert "plan.json" in written
    assert "s3://" in written, "the corpus's own names are expected there"
    for secret in (KEY, SECRET, SIGNATURE):
        assert secret not in written
        assert secret not in said


def test_the_python_call_takes_what_the_command_takes(tmp_path: Path, model: Path, corpus: Path) -> None:
    receipt = llmemb_ray.embed(
        [str(corpus / "part-0.parquet"), str(corpus / "part-2.parquet")], str(tmp_path / "out"), model=str(model), actors="0", quiet=True
    )
    assert (receipt.rows_read, receipt.rows_embedded) == (80, 80)


def test_an_overwriting_that_is_stopped_leaves_nothing_that_passes_for_done(corpus: Path, model: Path, tmp_path: Path) -> None:
    output = tmp_path / "out"
    settings = {"model": str(model), "actors": "0", "quiet": True, "rows_per_unit": 10}
    first = llmemb_ray.embed(str(corpus), str(output), **settings)

    class Stopped(Storage):
        """Stops at the first shard that it should delete."""

        def delete_tree(self, path: str) -> None:
            if path == "data":
                raise KeyboardInterrupt
            super().delete_tree(path)

    with pytest.raises(KeyboardInterrupt):
        opening.clear(Stopped(str(output)))
    again = llmemb_ray.embed(str(corpus), str(output), **settings)
    assert (again.rows_embedded, again.units) == (first.rows_embedded, first.units)
    assert again.finished > first.finished
    assert verify(llmemb_ray.open_run(str(output))).problems == []
