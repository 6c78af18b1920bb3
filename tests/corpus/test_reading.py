"""Reading units: each row once, in order, from files that must still be the planned ones, without holding a row group whole."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llmemb_ray.corpus.columns import Selection
from llmemb_ray.corpus.files import Footer, discover, footers
from llmemb_ray.corpus.reading import read_units
from llmemb_ray.corpus.units import PlannedFile, Unit
from llmemb_ray.errors import InputError, StorageError
from llmemb_ray.storage import Access, Storage
from tests.faulty_fs import FAULTS, FOREVER

SELECTION = Selection(text="text", id="id")


def planned(path: Path | str, *, size: int, rows: int | None = None, access: Access | None = None) -> PlannedFile:
    (found,) = discover([str(path)], access or Access())
    (footer,) = footers([found], access or Access())
    assert isinstance(footer, Footer), footer
    return PlannedFile(
        index=0,
        url=found.url,
        size=found.size,
        version=found.version,
        group_rows=footer.group_rows,
        rows=footer.rows if rows is None else rows,
        rows_per_unit=size,
        partitions=dict(found.partitions),
    )


def read(file: PlannedFile, selection: Selection = SELECTION, wanted: frozenset[str] | None = None) -> list[tuple[Unit, pa.Table]]:
    result = []
    for piece in file.pieces():
        names = frozenset(unit.name for unit in piece.units)
        result += list(read_units(file, piece, selection, Access(retry_seconds=0.3), names if wanted is None else names & wanted))
    return result


def write(path: Path, groups: list[int]) -> Path:
    """A file with row groups of these sizes, empty ones too; row n has id n."""
    schema = pa.schema([("id", pa.int64()), ("text", pa.string()), ("unused", pa.string())])
    with pq.ParquetWriter(path, schema) as writer:
        start = 0
        for rows in groups:
            ids = range(start, start + rows)
            table = pa.table({"id": list(ids), "text": [f"text {n}" for n in ids], "unused": ["x"] * rows}, schema=schema)
            writer.write_table(table) if rows else writer.write_batch(table.to_batches()[0] if table.to_batches() else pa.RecordBatch.from_pylist([], schema))
            start += rows
    return path


@settings(max_examples=40, deadline=None)
@given(groups=st.lists(st.integers(0, 40), min_size=1, max_size=6), size=st.integers(1, 50), data=st.data())
def test_units_hold_their_rows_in_order(groups: list[int], size: int, data: st.DataObject, tmp_path_factory: pytest.TempPathFactory) -> None:
    limit = data.draw(st.integers(0, sum(groups)))
    file = planned(write(tmp_path_factory.mktemp("x") / "x.parquet", groups), size=size, rows=limit)
    read_rows: list[int] = []
    for unit, table in read(file):
        assert table["id"].to_pylist() == list(range(unit.start, unit.start + unit.rows))
        assert set(table.column_names) == {"id", "text"}
        read_rows += table["id"].to_pylist()
    assert read_rows == list(range(limit))


def test_a_row_group_larger_than_a_decoded_batch_is_cut_right(tmp_path: Path) -> None:
    file = planned(write(tmp_path / "x.parquet", [30_000]), size=7_001)
    units = read(file)
    assert [unit.rows for unit, _ in units] == [6000] * 5
    assert [row for _, table in units for row in table["id"].to_pylist()] == list(range(30_000))


def test_only_wanted_units_are_given(tmp_path: Path) -> None:
    file = planned(write(tmp_path / "x.parquet", [20, 20]), size=5)
    units = [unit.name for unit in file.units()]
    wanted = frozenset({units[1], units[7]})
    given = read(file, wanted=wanted)
    assert [(unit.name, table["id"].to_pylist()) for unit, table in given] == [(units[1], list(range(5, 10))), (units[7], list(range(35, 40)))]


def test_a_file_without_rows_gives_no_units(tmp_path: Path) -> None:
    assert read(planned(write(tmp_path / "x.parquet", [0, 0]), size=5)) == []
    pq.write_table(pa.table({"id": pa.array([], pa.int64()), "text": pa.array([], pa.string())}), tmp_path / "y.parquet")
    assert read(planned(tmp_path / "y.parquet", size=5)) == []


def test_partition_columns_are_filled_in(tmp_path: Path) -> None:
    (tmp_path / "lang=en").mkdir()
    write(tmp_path / "lang=en" / "x.parquet", [4])
    file = planned(tmp_path, size=3)
    selection = Selection(text="{lang}: {text}", id="id", keep=("lang",))
    assert [selection.texts(table)[0] for _, table in read(file, selection)] == [["en: text 0", "en: text 1"], ["en: text 2", "en: text 3"]]


MEASURE = """
import re, sys
import pyarrow as pa, pyarrow.parquet as pq
from tests.corpus.test_reading import SELECTION, planned
from llmemb_ray.corpus.reading import read_units
from llmemb_ray.storage import Access
file = planned(sys.argv[1], size=2000)
(piece,) = file.pieces()
assert len(piece.groups) == 1
status = lambda name: int(re.search(rf"{name}:\\s+(\\d+) kB", open("/proc/self/status").read())[1])
open("/proc/self/clear_refs", "w").write("5")  # forget the peak so far
before = status("VmRSS")
if sys.argv[2] == "units":
    rows = sum(table.num_rows for _, table in read_units(file, piece, SELECTION, Access(), frozenset(unit.name for unit in piece.units)))
else:
    rows = pq.ParquetFile(sys.argv[1]).read_row_group(0, columns=["id", "text"]).num_rows
assert rows == 1_000_000
print(status("VmHWM") - before)
"""


def test_a_row_group_of_a_million_rows_is_not_held_whole(tmp_path: Path) -> None:
    text = pa.array([f"{row:08d} " + "words of a text that compress well " * 6 for row in range(1_000_000)])
    pq.write_table(
        pa.table({"id": pa.array(range(1_000_000)), "text": text}), tmp_path / "x.parquet", row_group_size=1_000_000, compression="ZSTD", use_dictionary=False
    )

    def growth(how: str) -> int:
        """KiB that the process's peak grows by."""
        return int(subprocess.run([sys.executable, "-c", MEASURE, str(tmp_path / "x.parquet"), how], check=True, capture_output=True, text=True).stdout)

    whole, units = growth("whole"), growth("units")
    assert whole > 200_000, "the row group is large enough to tell"
    assert units < whole / 3


# -- files that are not what was planned -------------------------------------------------------------


def test_a_file_of_another_size_fails_by_name(tmp_path: Path) -> None:
    file = planned(write(tmp_path / "x.parquet", [10]), size=5)
    write(tmp_path / "x.parquet", [11])
    with pytest.raises(
        InputError, match=rf"{tmp_path}/x.parquet changed after the run was planned \(size {file.size} → \d+.*bring the old file back, or embed"
    ):
        read(file)


def test_a_file_of_another_time_fails_by_name(tmp_path: Path) -> None:
    file = planned(write(tmp_path / "x.parquet", [10]), size=5)
    os.utime(tmp_path / "x.parquet", (1, 1))
    with pytest.raises(InputError, match=r"x\.parquet changed after the run was planned .*version mtime:.* → mtime:1\.0"):
        read(file)


def test_a_file_that_changes_while_it_is_read_gives_no_further_unit(tmp_path: Path) -> None:
    file = planned(write(tmp_path / "x.parquet", [10]), size=2)
    (piece,) = file.pieces()
    units = read_units(file, piece, SELECTION, Access(), frozenset(unit.name for unit in piece.units))
    next(units)
    write(tmp_path / "x.parquet", [12])
    with pytest.raises(InputError, match=r"x\.parquet changed after the run was planned"):
        list(units)


def test_a_file_that_is_gone_fails_by_name_with_a_way_out(tmp_path: Path) -> None:
    file = planned(write(tmp_path / "x.parquet", [10]), size=5)
    (tmp_path / "x.parquet").unlink()
    with pytest.raises(InputError, match=r"x\.parquet is gone since the run was planned; bring it back, or embed the corpus without it"):
        read(file)


def test_bytes_spoilt_under_the_same_size_and_time_fail_by_name(tmp_path: Path) -> None:
    path = tmp_path / "x.parquet"
    pq.write_table(pa.table({"id": list(range(1000)), "text": [f"{n} {n * 7919}" for n in range(1000)]}), path, compression="ZSTD")
    file = planned(path, size=500)
    stamp = path.stat()
    data = bytearray(path.read_bytes())
    data[200:4000] = b"\xaa" * 3800
    path.write_bytes(data)
    os.utime(path, ns=(stamp.st_atime_ns, stamp.st_mtime_ns))
    with pytest.raises(InputError, match=r"x\.parquet: row groups 0 to 0 cannot be (decoded|read)"):
        read(file)


def test_storage_that_fails_for_good_is_a_storage_error_by_name(tmp_path: Path) -> None:
    write(tmp_path / "x.parquet", [10])
    file = planned(f"faulty://{tmp_path}/x.parquet", size=5)
    FAULTS.set(at=1, times=FOREVER, operations=("read",))
    try:
        with pytest.raises(StorageError, match=r"cannot read .*x\.parquet: Input/output error"):
            read(file)
        FAULTS.set(at=1, times=1, operations=("read",))
        assert sum(table.num_rows for _, table in read(file)) == 10
    finally:
        FAULTS.clear()
    assert Storage(str(tmp_path)).exists("x.parquet")
