"""Bad rows, bad files and bad places, end to end in one process: nothing vanishes, and every message names what, where and the way out."""

from __future__ import annotations

import errno
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

import llmemb_ray
from llmemb_ray.errors import ConfigError, InputError, LlmembError, ModelError, OutputError, RejectsExceeded, RunFailed, RunMismatch, StorageError
from llmemb_ray.shards import commits
from llmemb_ray.shards.receipt import Receipt
from llmemb_ray.shards.run import Run
from tests.faulty_fs import FAULTS, FOREVER
from tests.small_jobs import vectors_of


@pytest.fixture(autouse=True)
def _no_fault_left() -> Iterator[None]:
    yield
    FAULTS.clear()


class Job:
    """``embed`` of this test's corpus into its output."""

    def __init__(self, root: Path, model: Path) -> None:
        self.root, self.model = root, model
        self.corpus, self.output = root / "in", root / "out"
        self.corpus.mkdir()

    def write(self, name: str, texts: Any, row_group_size: int = 10, **columns: Any) -> Path:
        table = pa.table({"id": [f"{name}-{row}" for row in range(len(texts))], "text": texts} | columns)
        pq.write_table(table, self.corpus / f"{name}.parquet", row_group_size=row_group_size)
        return self.corpus / f"{name}.parquet"

    def run(self, **settings: Any) -> Receipt:
        settings = {"input": str(self.corpus), "output": str(self.output), "model": str(self.model), "actors": "0", "quiet": True} | settings
        return llmemb_ray.embed(**settings)

    def opened(self, output: Path | None = None) -> Run:
        return llmemb_ray.open_run(str(output or self.output))

    def vectors(self, output: Path | None = None) -> dict[str, np.ndarray]:
        shards = self.opened(output).shards(["id", "embedding"])
        return {id_: vector for _, table in shards for id_, vector in zip(table["id"].to_pylist(), vectors_of(table["embedding"]), strict=True)}

    def rejects(self) -> dict[tuple[int, int], tuple[str | None, str, str]]:
        rows = [row for table in self.opened().rejects() for row in table.to_pylist()]
        return {(row["source_file"], row["source_row"]): (row["id"], row["reason"], row["detail"]) for row in rows}

    def sound(self) -> None:
        assert llmemb_ray.verify(self.opened(), against=[str(self.corpus)]).problems == []


@pytest.fixture
def job(tmp_path: Path, model: Path) -> Job:
    return Job(tmp_path, model)


def sentences(count: int) -> list[str | None]:
    return [f"sentence number {row}" for row in range(count)]


def assert_same_vectors(one: dict[str, np.ndarray], other: dict[str, np.ndarray]) -> None:
    assert one.keys() == other.keys()
    assert max(float(np.abs(one[key] - other[key]).max()) for key in one) <= 1e-5


# -- rows --------------------------------------------------------------------------------------------


def test_rows_without_text_are_rejected_with_source_row_and_reason(job: Job) -> None:
    texts = sentences(30)
    texts[3], texts[11], texts[12], texts[29] = None, "", " \t\n\u3000", None
    job.write("a", texts)
    job.write("b", sentences(5))
    receipt = job.run(rows_per_unit=7)
    assert (receipt.rows_read, receipt.rows_embedded, receipt.rows_rejected) == (35, 31, 4)
    assert receipt.rejects_by_reason == {"null": 2, "empty": 2}
    assert {place: reject[:2] for place, reject in job.rejects().items()} == {
        (0, 3): ("a-3", "null"),
        (0, 11): ("a-11", "empty"),
        (0, 12): ("a-12", "empty"),
        (0, 29): ("a-29", "null"),
    }
    job.sound()


def test_a_bad_row_does_not_touch_its_neighbours(job: Job) -> None:
    job.write("a", sentences(20))
    job.run(output=str(job.root / "clean"))
    texts = sentences(20)
    texts[4], texts[5] = None, ""
    job.write("a", texts)
    job.run()
    whole = job.vectors(job.root / "clean")
    assert_same_vectors(job.vectors(), {id_: vector for id_, vector in whole.items() if id_ not in ("a-4", "a-5")})


def test_a_text_of_ten_megabytes_is_cut_and_says_so(job: Job) -> None:
    texts = sentences(5)
    texts[2] = "a very long story, " * (10 * 2**20 // 19)
    job.write("a", texts)
    receipt = job.run()
    assert (receipt.rows_embedded, receipt.truncated) == (5, 1)
    (table,) = [table for _, table in job.opened().shards()]
    assert table["truncated"].to_pylist() == [False, False, True, False, False]
    assert table["n_tokens"].to_pylist()[2] <= 256
    assert receipt.tokens == sum(table["n_tokens"].to_pylist())
    job.sound()


def test_text_that_is_no_utf8_is_rejected_and_says_where(job: Job) -> None:
    spoilt = pa.array([b"fine", b"caf\xe9", b"fine too", b"\xff"], pa.binary())
    job.write("a", pa.Array.from_buffers(pa.string(), 4, spoilt.buffers()))
    job.write("b", spoilt)
    receipt = job.run()
    assert receipt.rejects_by_reason == {"undecodable": 4}
    assert job.rejects()[(0, 1)] == ("a-1", "undecodable", "column 'text': not UTF-8 at byte 3")
    assert job.rejects()[(1, 3)] == ("b-3", "undecodable", "column 'text': not UTF-8 at byte 0")
    job.sound()


def test_every_kind_of_text_column_gives_the_same_vectors_even_in_one_corpus(job: Job) -> None:
    texts = sentences(6)
    kinds = [pa.string(), pa.large_string(), pa.string_view(), pa.binary(), pa.large_binary()]
    arrays = [
        pa.array([text and text.encode() if pa.types.is_binary(kind) or pa.types.is_large_binary(kind) else text for text in texts], kind) for kind in kinds
    ]
    arrays.append(pa.array(texts).dictionary_encode())
    for number, array in enumerate(arrays):
        job.write(str(number), array)
    receipt = job.run()
    assert (receipt.rows_embedded, receipt.rows_rejected) == (36, 0)
    vectors = job.vectors()
    for number in range(1, len(arrays)):
        for row in range(6):
            np.testing.assert_allclose(vectors[f"{number}-{row}"], vectors[f"0-{row}"], atol=1e-5)


def test_null_and_double_ids_are_embedded_and_reported(job: Job) -> None:
    pq.write_table(pa.table({"id": ["x", None, "x", "y", None], "text": sentences(5)}), job.corpus / "a.parquet")
    receipt = job.run()
    assert (receipt.rows_embedded, receipt.null_ids) == (5, 2)
    findings = llmemb_ray.verify(job.opened(), against=[str(job.corpus)])
    assert findings.duplicate_ids == 1
    assert [problem[:35] for problem in findings.problems] == ["1 ids stand in more than one row (t"]
    assert findings.notes == ["2 rows have a null id"]


def test_a_corpus_without_ids_is_embedded_by_row(job: Job) -> None:
    pq.write_table(pa.table({"text": sentences(15)}), job.corpus / "a.parquet", row_group_size=4)
    assert job.run(rows_per_unit=4).rows_embedded == 15
    rows = [row for _, table in job.opened().shards() for row in table["source_row"].to_pylist()]
    assert rows == list(range(15))
    job.sound()


def test_kept_columns_templates_partitions_and_filter_go_together(job: Job) -> None:
    for lang in ("de", "en"):
        (job.corpus / f"lang={lang}").mkdir()
        job.write(f"lang={lang}/x", ["one", None, "three", "four"], title=["A", None, None, "D"], n=[1, 2, 3, 4], tags=[["a"], [], None, ["b", "c"]])
    receipt = job.run(text_column="{lang}: {title} {text}", keep_columns=["lang", "n", "tags"], filter="lang = 'en' OR n > 3")
    assert (receipt.rows_read, receipt.rows_filtered, receipt.rows_embedded) == (5, 3, 5)
    kept = [(row["lang"], row["n"], row["tags"]) for _, table in job.opened().shards() for row in table.to_pylist()]
    assert kept == [("de", 4, ["b", "c"]), ("en", 1, ["a"]), ("en", 2, []), ("en", 3, None), ("en", 4, ["b", "c"])]
    job.sound()


def test_a_prompt_that_leaves_no_room_stops_before_anything_is_written(job: Job) -> None:
    job.write("a", sentences(5))
    with pytest.raises((ConfigError, ModelError)) as caught:
        job.run(max_tokens=5)
    assert "max_tokens" in str(caught.value)
    assert not job.output.exists() or not list(job.output.rglob("*.parquet"))


# -- the reject gate ---------------------------------------------------------------------------------


def test_too_many_rejects_fail_a_whole_and_counted_run(job: Job) -> None:
    job.write("a", [None if row % 4 == 0 else f"text {row}" for row in range(60)])
    with pytest.raises(
        RejectsExceeded, match=r"15 of 60 rows were rejected \(25\.00%, allowed 1\.00%\): 15 null\. .*/rejects; mend them, or .*larger max_reject_rate"
    ) as caught:
        job.run()
    assert caught.value.exit_code == 1
    job.sound()
    before = stamps(job.output)
    assert job.run(max_reject_rate=0.25).rows_rejected == 15
    assert stamps(job.output) == before, "nothing was embedded again"


def test_a_small_corpus_may_have_its_floor_of_rejects(job: Job) -> None:
    job.write("a", [None] * 10 + sentences(3))
    assert job.run().rows_rejected == 10
    with pytest.raises(RejectsExceeded, match="10 of 13 rows"):
        job.run(reject_floor=9)


def test_a_corpus_of_rejects_alone_still_has_its_accounts(job: Job) -> None:
    job.write("a", [None] * 4)
    receipt = job.run()
    assert (receipt.rows_read, receipt.rows_embedded, receipt.rows_rejected) == (4, 0, 4)
    assert job.vectors() == {}
    job.sound()


# -- files -------------------------------------------------------------------------------------------


@pytest.fixture
def spoilt(job: Job) -> Job:
    """One good file among bad ones of each kind."""
    data = job.write("a-good", sentences(12)).read_bytes()
    (job.corpus / "b-empty.parquet").write_bytes(b"")
    (job.corpus / "c-cut.parquet").write_bytes(data[: len(data) * 2 // 3])
    (job.corpus / "d-csv.parquet").write_text("id,text\n1,one\n")
    pq.write_table(pa.table({"id": ["1"], "body": ["no text column"]}), job.corpus / "e-column.parquet")
    pq.write_table(pa.table({"id": [1], "text": ["ids are numbers here"]}), job.corpus / "f-schema.parquet")
    pq.write_table(pa.table({"id": ["1"], "text": [["a", "list"]]}), job.corpus / "g-list.parquet")
    return job


REASONS = {
    "b-empty": "is empty (0 bytes)",
    "c-cut": "is not a whole Parquet file: ",
    "d-csv": "is not a whole Parquet file: ",
    "e-column": "has no column 'text'; its columns are id, body",
    "f-schema": "has another schema: id is int64 here and string in the first file",
    "g-list": "column 'text' is list<element: string>, a list and not one text; join its items into a text column first",
}


def test_bad_files_fail_the_plan_with_each_of_them_named(spoilt: Job) -> None:
    with pytest.raises(InputError) as caught:
        spoilt.run()
    message = str(caught.value)
    assert caught.value.exit_code == 2
    assert message.startswith("6 of 7 files cannot be used:")
    for name, reason in REASONS.items():
        assert f"{spoilt.corpus}/{name}.parquet: {reason}" in message
    assert "a-good" not in message
    assert "skip_bad_files" in message
    assert not (spoilt.output / "data").exists()


def test_bad_files_left_out_stand_in_the_receipt(spoilt: Job) -> None:
    receipt = spoilt.run(skip_bad_files=True)
    assert (receipt.rows_read, receipt.rows_embedded) == (12, 12)
    assert set(receipt.bad_files) == {f"{spoilt.corpus}/{name}.parquet" for name in REASONS}
    for name, reason in REASONS.items():
        assert receipt.bad_files[f"{spoilt.corpus}/{name}.parquet"].startswith(reason)
    spoilt.sound()


def test_a_corpus_of_bad_files_alone_cannot_be_skipped(job: Job) -> None:
    (job.corpus / "a.parquet").write_bytes(b"")
    with pytest.raises(InputError, match=r"no file of the corpus can be read: .*\n.*a\.parquet: is empty"):
        job.run(skip_bad_files=True)


def test_a_corpus_without_rows_says_so(job: Job) -> None:
    job.write("a", pa.array([], pa.string()))
    with pytest.raises(InputError, match="the corpus has 1 files but no rows; check the input paths"):
        job.run()
    assert not (job.output / "_llmemb" / "plan").exists()


def test_files_without_rows_among_others_are_no_trouble(job: Job) -> None:
    job.write("a", pa.array([], pa.string()), id=pa.array([], pa.string()))
    job.write("b", sentences(3))
    assert job.run().rows_embedded == 3
    job.sound()


def test_an_input_that_is_not_there_is_named(job: Job) -> None:
    with pytest.raises(LlmembError, match=rf"{job.root}/typo"):
        job.run(input=str(job.root / "typo"))
    with pytest.raises(InputError, match=rf"input {job.corpus}: no Parquet files there"):
        job.run()


def test_a_bad_filter_is_refused_before_anything_is_read(job: Job) -> None:
    job.write("a", sentences(5))
    with pytest.raises(ConfigError, match=r"filter: 'no_such > 1': .*no_such"):
        job.run(filter="no_such > 1")
    assert not (job.output / "data").exists()


def test_a_file_that_changes_during_the_run_fails_its_units_by_name(job: Job, monkeypatch: pytest.MonkeyPatch) -> None:
    job.write("a", sentences(20))
    changed = job.write("b", sentences(20))
    old = shutil.copy2(changed, job.root / "old.parquet")
    plain = commits.write

    def write_then_change(storage: Any, commit: Any) -> None:
        plain(storage, commit)
        if commit.unit == "000001-000000000000":
            job.write("b", [f"other text {row}" for row in range(21)])

    monkeypatch.setattr(commits, "write", write_then_change)
    with pytest.raises(RunFailed) as caught:
        job.run(rows_per_unit=5)
    message = str(caught.value)
    assert message.startswith("3 of 8 units failed, the others are committed:\n  unit 000001-000000000005: ")
    assert f"{changed} changed after the run was planned (size " in message
    assert "run the same command again" in message
    monkeypatch.undo()
    with pytest.raises(
        OutputError,
        match=rf"the corpus is not the one .*:\n  {changed} changed\nBring the old files back, add new ones with --append, or embed",
    ):
        job.run(rows_per_unit=5)
    shutil.copy2(old, changed)
    assert job.run(rows_per_unit=5).rows_embedded == 40
    job.sound()


# -- the output --------------------------------------------------------------------------------------


def stamps(output: Path) -> dict[str, tuple[int, int]]:
    return {str(path): (path.stat().st_mtime_ns, path.stat().st_size) for path in output.rglob("*") if path.is_file()}


def test_an_output_that_cannot_be_written_fails_by_name(job: Job) -> None:
    job.write("a", sentences(3))
    with pytest.raises(StorageError, match="cannot write /proc/nowhere/_llmemb/"):
        job.run(output="/proc/nowhere")
    FAULTS.set(at=1, times=FOREVER, error=errno.EACCES, operations=("mkdir", "write"))
    with pytest.raises(
        StorageError, match=r"no permission to write .*/out/_llmemb/.*: Permission denied; check the credentials and the bucket policy or file mode"
    ):
        job.run(output=f"faulty://{job.output}")


def test_an_output_with_other_peoples_files_is_left_alone(job: Job) -> None:
    job.write("a", sentences(3))
    job.output.mkdir()
    (job.output / "thesis.tex").write_text("years of work")
    with pytest.raises(OutputError, match=rf"{job.output} is not empty \(thesis\.tex …\) and holds no run of llmemb_ray; choose another output"):
        job.run()
    assert [path.name for path in job.output.iterdir()] == ["thesis.tex"]


def test_overwrite_replaces_the_run_and_spares_what_is_not_its_own(job: Job) -> None:
    job.write("a", sentences(3))
    job.run()
    (job.output / "notes.txt").write_text("mine")
    job.write("a", sentences(4))
    assert job.run(overwrite=True).rows_embedded == 4
    assert (job.output / "notes.txt").read_text() == "mine"
    job.sound()


def test_credentials_in_an_output_are_refused_unseen(job: Job) -> None:
    job.write("a", sentences(3))
    with pytest.raises(ConfigError, match="credentials do not belong in a URL") as caught:
        job.run(output="s3://AKIA:hunter2@bucket/out")
    assert "hunter2" not in str(caught.value)


def test_another_run_in_the_output_is_told_field_by_field_and_left_alone(job: Job) -> None:
    job.write("a", sentences(3))
    job.run()
    before = stamps(job.output)
    with pytest.raises(RunMismatch, match=r'(?s)representation\.pooling: the run there has "last", asked for now "mean".*with overwrite') as caught:
        job.run(pooling="mean", dtype="float16")
    assert 'engine.dtype: the run there has "float32", asked for now "float16"' in str(caught.value)
    assert stamps(job.output) == before


def test_a_full_disk_fails_the_units_it_hits_and_the_run_goes_on_when_there_is_space(job: Job) -> None:
    job.write("a", sentences(40))
    job.run(output=str(job.root / "clean"), rows_per_unit=10)
    FAULTS.set(at=3, times=FOREVER, error=errno.ENOSPC, operations=("write",), path=r"/data/", moment="half")
    with pytest.raises(RunFailed) as caught:
        job.run(output=f"faulty://{job.output}", rows_per_unit=10)
    message = str(caught.value)
    assert message.startswith("2 of 4 units failed, the others are committed:\n  unit 000000-000000000020: cannot write ")
    assert "No space left on device; free some space and run the same command again, it resumes" in message
    assert not [path for path in job.output.rglob("*") if ".tmp-" in path.name]
    first = stamps(job.output / "data")
    assert len(first) == 2
    FAULTS.clear()
    assert job.run(output=f"faulty://{job.output}", rows_per_unit=10).rows_embedded == 40
    assert first.items() <= stamps(job.output / "data").items(), "committed units are not done again"
    assert_same_vectors(job.vectors(), job.vectors(job.root / "clean"))
    job.sound()


def test_a_disk_full_for_the_plan_already_leaves_an_output_that_can_be_used_later(job: Job) -> None:
    job.write("a", sentences(5))
    for path in ("plan/files", "plan/plan.json", "receipt", "commits.parquet"):
        FAULTS.set(at=1, times=FOREVER, error=errno.ENOSPC, operations=("write",), path=path)
        with pytest.raises(StorageError, match=rf"cannot write .*{path}.*free some space and run the same command again"):
            job.run(output=f"faulty://{job.output}")
    FAULTS.clear()
    assert job.run(output=f"faulty://{job.output}").rows_embedded == 5
    job.sound()


def test_a_unit_that_failed_is_named_and_done_by_the_next_call(job: Job) -> None:
    job.write("a", sentences(30))
    job.run(output=str(job.root / "clean"), rows_per_unit=10)
    FAULTS.set(at=1, times=FOREVER, error=errno.EROFS, operations=("write",), path=r"commits/000000-000000000010")
    with pytest.raises(RunFailed, match=r"1 of 3 units failed, the others are committed:\n  unit 000000-000000000010: cannot write .*Read-only file system"):
        job.run(output=f"faulty://{job.output}", rows_per_unit=10)
    assert {commit.start for commit in job.opened().commits} == {0, 20}
    assert job.opened().receipt is None
    assert job.opened().status()["state"] == "stopped"
    assert len(list((job.output / "data").iterdir())) == 3, "the shard without a commit is there …"
    FAULTS.clear()
    receipt = job.run(output=f"faulty://{job.output}", rows_per_unit=10)
    assert receipt.units == 3
    assert len(list((job.output / "data").iterdir())) == 3, "… and was removed at the end"
    assert_same_vectors(job.vectors(), job.vectors(job.root / "clean"))
    job.sound()


def test_storage_that_stumbles_is_retried_and_counted(job: Job) -> None:
    job.write("a", sentences(20))
    FAULTS.set(at=1, times=2, error=errno.EIO, operations=("write",), path=r"/data/")
    receipt = job.run(output=f"faulty://{job.output}", rows_per_unit=10)
    assert receipt.rows_embedded == 20
    assert receipt.storage_retries == 2
    job.sound()


def test_a_finished_run_is_returned_and_left_alone(job: Job) -> None:
    job.write("a", sentences(12))
    first = job.run(rows_per_unit=5)
    before = stamps(job.output)
    assert job.run(rows_per_unit=5) == first
    assert stamps(job.output) == before


def test_a_run_stopped_at_any_commit_is_finished_by_the_same_call(job: Job, monkeypatch: pytest.MonkeyPatch) -> None:
    job.write("a", sentences(30))
    whole = job.run(output=str(job.root / "clean"), rows_per_unit=6)
    plain = commits.write
    for survive in range(5):
        shutil.rmtree(job.output, ignore_errors=True)
        written = 0

        def write(storage: Any, commit: Any, survive: int = survive) -> None:
            nonlocal written
            if written == survive:
                raise KeyboardInterrupt
            written += 1
            plain(storage, commit)

        with monkeypatch.context() as patched:
            patched.setattr(commits, "write", write)
            with pytest.raises(KeyboardInterrupt):
                job.run(rows_per_unit=6)
        assert len(job.opened().commits) == survive
        receipt = job.run(rows_per_unit=6)
        assert (receipt.units, receipt.rows_embedded, receipt.tokens) == (whole.units, whole.rows_embedded, whole.tokens)
        assert_same_vectors(job.vectors(), job.vectors(job.root / "clean"))
    job.sound()
