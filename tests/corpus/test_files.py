"""Finding the files of a corpus and reading footers, those of broken files too."""

from __future__ import annotations

import shutil
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from llmemb_ray.corpus.files import Footer, Found, discover, footers, partition_values
from llmemb_ray.errors import InputError
from llmemb_ray.storage import Access
from tests.s3_server import S3Server


def write(path: Path, rows: int = 3, **columns: list[object]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.table(columns or {"text": [f"row {row}" for row in range(rows)]}), path)
    return path


def found(*inputs: str | Path) -> list[Found]:
    return discover([str(given) for given in inputs], Access())


def names(root: Path, files: list[Found]) -> list[str]:
    return [file.url.removeprefix(f"{root}/") for file in files]


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    for name in ("b.parquet", "a.parquet", "sub/c.pq", "sub/deep/d.parq", "_SUCCESS/e.parquet", ".hidden.parquet", "_tmp/f.parquet"):
        write(tmp_path / name)
    (tmp_path / "README.md").write_text("not a part of it")
    (tmp_path / "_metadata").write_bytes(b"PAR1")
    return tmp_path


def test_a_directory_gives_its_parquet_files_by_name_without_hidden_ones(tree: Path) -> None:
    files = found(tree)
    assert names(tree, files) == ["a.parquet", "b.parquet", "sub/c.pq", "sub/deep/d.parq"]
    assert all(file.size == Path(file.url).stat().st_size for file in files)
    assert found(f"{tree}/") == files


def test_one_file_a_glob_and_several(tree: Path) -> None:
    assert names(tree, found(tree / "b.parquet")) == ["b.parquet"]
    assert names(tree, found(tree / "*.parquet")) == ["a.parquet", "b.parquet"]
    assert names(tree, found(tree / "**" / "*.p*q*")) == ["a.parquet", "b.parquet", "sub/c.pq", "sub/deep/d.parq"]
    assert names(tree, found(tree / "sub", tree / "a.parquet")) == ["sub/c.pq", "sub/deep/d.parq", "a.parquet"]


def test_a_file_named_twice_is_taken_once_where_it_came_first(tree: Path) -> None:
    assert names(tree, found(tree / "b.parquet", tree, tree / "*.parquet")) == ["b.parquet", "a.parquet", "sub/c.pq", "sub/deep/d.parq"]


def test_a_file_named_outright_may_have_any_name(tree: Path) -> None:
    shutil.copy(tree / "a.parquet", tree / "_table")
    assert names(tree, found(tree / "_table")) == ["_table"]


def test_the_version_of_a_file_is_the_same_listed_in_any_way(tree: Path) -> None:
    """Or a resumed run would take its own corpus for another one."""
    (tree / "link.parquet").symlink_to(tree / "a.parquet")
    for name in ("b.parquet", "link.parquet"):
        ways = [found(tree / name), found(tree / f"{name[:-2]}*"), [file for file in found(tree) if file.url.endswith(f"/{name}")]]
        assert ways[0] == ways[1] == ways[2]


def test_no_files_is_an_error_that_names_the_input(tmp_path: Path) -> None:
    (tmp_path / "readme.txt").write_text("")
    for given in (tmp_path, tmp_path / "*.parquet"):
        with pytest.raises(InputError, match=r"input .*: no Parquet files there \(files named \*\.parquet") as caught:
            found(given)
        assert str(given) in str(caught.value)
    with pytest.raises(InputError, match=rf"input .*: nothing found at {tmp_path}/typo\.parquet; check the path"):
        found(tmp_path / "typo.parquet")


def test_partitions_come_from_the_path_as_numbers_where_all_are_numbers(tmp_path: Path) -> None:
    for path in ("year=2023/lang=en/x.parquet", "year=2024/lang=7/x.parquet", "year=2024/lang=a%20b/_k=1/x.parquet"):
        write(tmp_path / path)
    files = found(tmp_path)
    assert partition_values(files) == [
        {"year": 2023, "lang": "en"},
        {"year": 2024, "lang": "7"},
        {"year": 2024, "lang": "a b", "_k": 1},
    ]


def test_an_equals_sign_above_the_input_is_no_partition(tmp_path: Path) -> None:
    write(tmp_path / "run=5" / "x.parquet")
    assert partition_values(found(tmp_path / "run=5")) == [{}]
    assert partition_values(found(tmp_path / "run=*" / "*.parquet")) == [{"run": 5}]


def test_footers_tell_row_groups_sizes_and_types(tmp_path: Path) -> None:
    table = pa.table({"text": ["x" * 100] * 25, "n": pa.array(range(25), pa.int32())})
    pq.write_table(table, tmp_path / "x.parquet", row_group_size=10)
    (footer,) = footers(found(tmp_path), Access())
    assert isinstance(footer, Footer)
    assert footer.group_rows == (10, 10, 5)
    assert footer.rows == 25
    assert footer.schema.field("n").type == pa.int32()
    assert set(footer.column_bytes) == {"text", "n"}


def test_each_broken_file_has_its_reason_and_spoils_no_other(tmp_path: Path) -> None:
    good = write(tmp_path / "a-good.parquet", rows=500)
    data = good.read_bytes()
    (tmp_path / "b-empty.parquet").write_bytes(b"")
    (tmp_path / "c-cut.parquet").write_bytes(data[: len(data) // 2])
    (tmp_path / "d-text.parquet").write_text("id,text\n1,a CSV file under a wrong name\n")
    (tmp_path / "e-tiny.parquet").write_bytes(b"PAR")
    (tmp_path / "f-thrift.parquet").write_bytes(data[:-40] + b"\xff" * 32 + data[-8:])
    (tmp_path / "g-gone.parquet").symlink_to(tmp_path / "nothing")
    result = footers(found(tmp_path), Access())
    assert isinstance(result[0], Footer)
    assert result[1] == "is empty (0 bytes)"
    for reason in result[2:6]:
        assert isinstance(reason, str)
        assert reason.startswith("is not a whole Parquet file: ")
        assert "\n" not in reason
    assert isinstance(result[6], str)


def test_a_file_that_vanishes_after_the_listing_has_a_reason(tmp_path: Path) -> None:
    files = discover([str(write(tmp_path / "x.parquet"))], Access())
    (tmp_path / "x.parquet").unlink()
    assert footers(files, Access()) == [f"nothing found at {tmp_path}/x.parquet"]


def test_a_corpus_on_s3_at_the_root_of_a_bucket_too(s3: S3Server, tmp_path: Path) -> None:
    for path in ("d/year=2024/x.parquet", "d/y.parquet"):
        write(s3.path(path), rows=7)
    wanted = [s3.url("d/y.parquet"), s3.url("d/year=2024/x.parquet")]
    for given in (s3.url(), s3.url("d"), s3.url("d/"), s3.url("d/**")):
        files = discover([given], s3.access())
        assert [file.url for file in files] == sorted(wanted)
        assert all(file.version.startswith("etag:") for file in files)
    assert [footer.rows for footer in footers(files, s3.access()) if isinstance(footer, Footer)] == [7, 7]
    assert discover([wanted[0]], s3.access())[0] == files[0]
