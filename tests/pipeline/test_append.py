"""Files added to a finished run: a new generation of its plan, the old vectors untouched."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest

from llmemb_ray.errors import ConfigError, InputError, OutputError, RunMismatch
from llmemb_ray.pipeline import job
from llmemb_ray.storage import Storage
from tests.small_jobs import embed, opened, problems_of, rows_of, vectors_by_text_id, write


@pytest.fixture
def grown(tmp_path: Path, model: Path) -> Path:
    """A finished run over two files, and a third file in the corpus since, whose name sorts before theirs."""
    for name, start in (("b", 0), ("c", 100)):
        write(tmp_path / "in" / f"{name}.parquet", [f"text {name} {row}" for row in range(12)], id=[start + row for row in range(12)])
    embed(tmp_path / "in", tmp_path / "out", model, rows_per_unit=5)
    write(tmp_path / "in" / "a.parquet", [f"text a {row}" for row in range(7)], id=[200 + row for row in range(7)])
    return tmp_path / "in"


def shards(output: Path) -> dict[str, bytes]:
    return {str(path.relative_to(output)): path.read_bytes() for path in output.glob("data/*")}


def test_only_new_files_are_embedded_and_old_shards_stay_as_they_are(grown: Path, tmp_path: Path, model: Path) -> None:
    output = tmp_path / "out"
    before = shards(output)
    receipt = embed(grown, output, model, rows_per_unit=5, append=True)
    assert (receipt.rows_embedded, receipt.generation) == (31, 1)
    after = shards(output)
    assert before.items() <= after.items()
    assert len(after) == len(before) + 2
    run = opened(output)
    assert [Path(file.url).name for file in run.plan.files] == ["b.parquet", "c.parquet", "a.parquet"]
    assert [file.generation for file in run.plan.files] == [0, 0, 1]
    assert set(rows_of(output)["id"].to_pylist()) == {*range(12), *range(100, 112), *range(200, 207)}
    assert problems_of(output, grown) == []
    embed(grown, tmp_path / "at-once", model)
    grown_vectors, at_once = vectors_by_text_id(output), vectors_by_text_id(tmp_path / "at-once")
    assert max(float(abs(grown_vectors[id_] - at_once[id_]).max()) for id_ in at_once) <= 1e-5


def test_the_new_files_alone_are_enough_and_appending_again_changes_nothing(grown: Path, tmp_path: Path, model: Path) -> None:
    first = embed(grown / "a.parquet", tmp_path / "out", model, rows_per_unit=5, append=True)
    again = embed(grown, tmp_path / "out", model, rows_per_unit=5, append=True)
    assert first.to_dict() == again.to_dict()
    assert embed(grown, tmp_path / "out", model, rows_per_unit=5).to_dict() == first.to_dict(), "without append too: the corpus is the run's"
    write(grown / "d.parquet", ["one more"], id=[300])
    assert embed(grown, tmp_path / "out", model, rows_per_unit=5, append=True).generation == 2
    assert problems_of(tmp_path / "out", grown) == []


def test_append_into_nothing_begins_a_run(grown: Path, tmp_path: Path, model: Path) -> None:
    receipt = embed(grown, tmp_path / "fresh", model, append=True)
    assert (receipt.rows_embedded, receipt.generation) == (31, 0)


@pytest.mark.parametrize("step", ["plan saved", "first unit done", "all units done"])
def test_an_append_that_is_stopped_goes_on(grown: Path, tmp_path: Path, model: Path, step: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Stopped by an exception at each step; until it is finished the run says that it is not."""

    class Stopped(Exception):
        pass

    def stop(*_: Any, **__: Any) -> None:
        raise Stopped

    if step == "plan saved":
        monkeypatch.setattr(job, "_embed_units", stop)
    elif step == "all units done":
        monkeypatch.setattr(job, "finish", stop)
    else:
        from llmemb_ray.shards import commits

        plain, calls = commits.write, []

        def second_fails(storage: Storage, commit: Any) -> None:
            calls.append(commit)
            if len(calls) == 2:
                raise Stopped
            plain(storage, commit)

        monkeypatch.setattr(commits, "write", second_fails)
    with pytest.raises(Stopped):
        embed(grown, tmp_path / "out", model, rows_per_unit=5, append=True)
    monkeypatch.undo()
    assert opened(tmp_path / "out").receipt is None
    assert opened(tmp_path / "out").status()["state"] == "stopped"
    receipt = embed(grown, tmp_path / "out", model, rows_per_unit=5, append=True)
    assert (receipt.rows_embedded, receipt.generation) == (31, 1)
    assert problems_of(tmp_path / "out", grown) == []


def test_without_append_new_files_are_refused_with_the_way_out(grown: Path, tmp_path: Path, model: Path) -> None:
    with pytest.raises(OutputError, match=r"a\.parquet is new\n.*--append"):
        embed(grown, tmp_path / "out", model, rows_per_unit=5)


def test_a_file_that_changed_is_refused_by_name(grown: Path, tmp_path: Path, model: Path) -> None:
    write(grown / "c.parquet", ["other"] * 12, id=list(range(12)))
    os.utime(grown / "c.parquet", (1, 1))
    before = shards(tmp_path / "out")
    with pytest.raises(OutputError, match=r"append: .*\n  .*/c\.parquet changed\n.*--reuse"):
        embed(grown, tmp_path / "out", model, rows_per_unit=5, append=True)
    assert shards(tmp_path / "out") == before
    assert opened(tmp_path / "out").receipt is not None


def test_other_settings_are_refused_field_by_field(grown: Path, tmp_path: Path, model: Path) -> None:
    with pytest.raises(RunMismatch, match=r"engine\.dtype: the run there has \"float32\", asked for now \"float16\""):
        embed(grown, tmp_path / "out", model, rows_per_unit=5, append=True, dtype="float16")


def test_a_new_file_of_another_schema_is_refused(grown: Path, tmp_path: Path, model: Path) -> None:
    write(grown / "a.parquet", ["x"], id=["a text id"])
    with pytest.raises(InputError, match=r"a\.parquet: has another schema than the run: id is string here and int64 in the run"):
        embed(grown, tmp_path / "out", model, rows_per_unit=5, append=True)


def test_units_that_an_earlier_command_left_are_done_before_more_files_are_added(grown: Path, tmp_path: Path, model: Path) -> None:
    run = opened(tmp_path / "out")
    run.storage.delete(["_llmemb/receipt.json"])
    from llmemb_ray.shards import commits

    commits.compact(run.storage, run.commits[1:])
    receipt = embed(grown, tmp_path / "out", model, rows_per_unit=5, append=True)
    assert (receipt.rows_embedded, receipt.generation) == (31, 1)
    assert problems_of(tmp_path / "out", grown) == []


def test_an_empty_file_may_be_among_the_new_ones(grown: Path, tmp_path: Path, model: Path) -> None:
    (grown / "a.parquet").unlink()
    write(grown / "d.parquet", pa.array([], pa.string()), id=pa.array([], pa.int64()))
    receipt = embed(grown, tmp_path / "out", model, rows_per_unit=5, append=True)
    assert (receipt.rows_embedded, receipt.generation) == (24, 1)


def test_a_bad_file_that_was_left_out_is_taken_in_once_it_is_mended(tmp_path: Path, model: Path) -> None:
    write(tmp_path / "in" / "a.parquet", ["one"], id=[1])
    (tmp_path / "in" / "b.parquet").write_bytes(b"broken")
    embed(tmp_path / "in", tmp_path / "out", model, skip_bad_files=True)
    again = embed(tmp_path / "in", tmp_path / "out", model, append=True, skip_bad_files=True)
    assert (again.generation, len(again.bad_files)) == (0, 1)
    write(tmp_path / "in" / "b.parquet", ["two"], id=[2])
    receipt = embed(tmp_path / "in", tmp_path / "out", model, append=True)
    assert (receipt.rows_embedded, receipt.generation, receipt.bad_files) == (2, 1, {})
    assert problems_of(tmp_path / "out", tmp_path / "in") == []
    assert embed(tmp_path / "in", tmp_path / "out", model).to_dict() == receipt.to_dict()


def test_a_file_under_another_name_is_not_embedded_twice(grown: Path, tmp_path: Path, model: Path) -> None:
    (grown / "b.parquet").rename(grown / "renamed.parquet")
    with pytest.raises(OutputError, match=r"renamed\.parquet is the file that the run has embedded as .*/b\.parquet, which is gone"):
        embed(grown, tmp_path / "out", model, rows_per_unit=5, append=True)
    (grown / "renamed.parquet").rename(grown / "b.parquet")
    assert embed(f"file://{grown}", tmp_path / "out", model, rows_per_unit=5, append=True).rows_embedded == 31, "file:// is the same file"


def test_partitions_keep_the_type_they_had(tmp_path: Path, model: Path) -> None:
    """Their values stand in prompts: 01 must not become 1 because a file that was a text is not among the new ones."""
    for day in ("01", "none"):
        write(tmp_path / "in" / f"day={day}" / "x.parquet", ["same text"])
    settings: dict[str, Any] = {"text_column": "{day}: {text}", "rows_per_unit": 5}
    embed(tmp_path / "in", tmp_path / "out", model, **settings)
    write(tmp_path / "in" / "day=01" / "y.parquet", ["same text"])
    embed(tmp_path / "in", tmp_path / "out", model, append=True, **settings)
    hashes = dict(zip(rows_of(tmp_path / "out")["source_file"].to_pylist(), rows_of(tmp_path / "out")["prompt_hash"].to_pylist(), strict=True))
    names = [Path(file.url).parent.name + "/" + Path(file.url).name for file in opened(tmp_path / "out").plan.files]
    by_name = {names[file]: hash_ for file, hash_ in hashes.items()}
    assert by_name["day=01/x.parquet"] == by_name["day=01/y.parquet"] != by_name["day=none/x.parquet"]


def test_an_appended_run_is_checked_against_its_corpus_in_another_place(grown: Path, tmp_path: Path, model: Path) -> None:
    import shutil

    embed(grown, tmp_path / "out", model, rows_per_unit=5, append=True)
    shutil.copytree(grown, tmp_path / "moved", copy_function=shutil.copy2)
    assert problems_of(tmp_path / "out", tmp_path / "moved") == []


def test_a_lost_calibration_is_not_made_anew_beside_codes_of_the_old_one(tmp_path: Path, model: Path) -> None:
    write(tmp_path / "in" / "a.parquet", [f"text {row}" for row in range(20)], id=list(range(20)))
    embed(tmp_path / "in", tmp_path / "out", model, dtype="int8")
    (tmp_path / "out" / "_llmemb" / "calibration.json").unlink()
    write(tmp_path / "in" / "b.parquet", ["more"], id=[100])
    with pytest.raises(OutputError, match=r"calibration\.json is gone, and the units that are committed were written with it; bring it back"):
        embed(tmp_path / "in", tmp_path / "out", model, dtype="int8", append=True)


def test_append_refuses_what_makes_no_sense_beside_it(grown: Path, tmp_path: Path, model: Path) -> None:
    with pytest.raises(ConfigError, match="append and overwrite exclude each other"):
        embed(grown, tmp_path / "out", model, append=True, overwrite=True)
    with pytest.raises(ConfigError, match="limit_rows"):
        embed(grown, tmp_path / "out", model, append=True, limit_rows=3)


def test_appended_codes_have_the_calibration_of_the_run(tmp_path: Path, model: Path) -> None:
    write(tmp_path / "in" / "a.parquet", [f"text {row}" for row in range(30)], id=list(range(30)))
    embed(tmp_path / "in", tmp_path / "out", model, dtype="int8")
    calibration = (tmp_path / "out" / "_llmemb" / "calibration.json").read_bytes()
    write(tmp_path / "in" / "b.parquet", ["something longer, and quite different"] * 3, id=[50, 51, 52])
    receipt = embed(tmp_path / "in", tmp_path / "out", model, dtype="int8", append=True)
    assert receipt.rows_embedded == 33
    assert (tmp_path / "out" / "_llmemb" / "calibration.json").read_bytes() == calibration
    assert problems_of(tmp_path / "out", tmp_path / "in") == []
