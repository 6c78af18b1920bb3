"""Verify finds each kind of damage to a synthesis at the level that promises to, names file, unit or row, and finds nothing in a sound one."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest

from llmemb_ray import parquet
from llmemb_ray.shards.findings import Level
from llmemb_ray.shards.schema import METADATA_KEY
from llmemb_ray.storage import Storage
from llmemb_ray.synthesis.brainstorming import ACCOUNTS
from llmemb_ray.synthesis.commits import RECORDS, Made
from llmemb_ray.synthesis.receipt import PATH as RECEIPT
from llmemb_ray.synthesis.verify import verify
from tests.synthesis import made_run
from tests.synthesis.made_run import COUNT, UNIT_ROWS, opened

Change = Callable[[pa.Table], pa.Table]


@pytest.fixture(scope="module")
def once(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("synthesis") / "out"
    made_run.make(out)
    return out


@pytest.fixture
def out(once: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(once, tmp_path / "out"))


def problems(out: Path, level: Level = "full") -> list[str]:
    return verify(opened(out), level=level).problems


def edit_commit(out: Path, place: int, **changes: Any) -> Made:
    """The commit as it is then; receipt and files stay as they are."""
    commits = opened(out).commits
    commits[place] = replace(commits[place], **changes)
    RECORDS.compact(Storage(str(out)), commits)
    return commits[place]


def edit_json(path: Path, **changes: Any) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def rewrite(out: Path, place: int, change: Change, kind: str = "shard") -> Made:
    """A file written anew, checksum and sizes made to agree with it: what a bug in a writer would leave."""
    commit = opened(out).commits[place]
    path = out / getattr(commit, kind)
    data = parquet.to_bytes(change(parquet.read(path.read_bytes())))
    path.write_bytes(data)
    commit = edit_commit(out, place, **{f"{kind}_bytes": len(data), f"{kind}_sha256": hashlib.sha256(data).hexdigest()})
    edit_json(out / RECEIPT, shard_bytes=sum(one.shard_bytes for one in opened(out).commits))
    return commit


def with_values(table: pa.Table, name: str, change: Callable[[list[Any]], list[Any]]) -> pa.Table:
    place = table.column_names.index(name)
    return table.set_column(place, table.schema.field(place), pa.array(change(table[name].to_pylist()), table.schema.field(place).type))


def first(name: str, value: Any) -> Change:
    """The first row with another value."""
    return lambda table: with_values(table, name, lambda values: [value, *values[1:]])


def test_a_sound_synthesis_has_no_problems_and_its_counts_are_told(out: Path) -> None:
    for level in ("quick", "sample", "full"):
        findings = verify(opened(out), level=level)
        assert findings.problems == []
        assert (findings.units, findings.units_read) == (5, 0 if level == "quick" else 5)
        assert findings.asked == COUNT == findings.accepted + findings.rejected + findings.duplicates
        assert findings.drawn_again == (0 if level == "quick" else COUNT)
    assert (findings.rejected, findings.repeated) == (46, 0)


def test_one_that_keeps_raw_answers_and_one_of_two_counts_are_sound(tmp_path: Path) -> None:
    assert verify(made_run.make(tmp_path / "raw", keep_raw=True)).problems == []
    grown = made_run.make(tmp_path / "grown", segments=[70, 130])
    assert [unit.rows for unit in grown.record.units()] == [50, 20, 50, 10]
    assert verify(grown).problems == []


def gone(out: Path) -> str:
    path = opened(out).commits[1].shard
    assert path
    (out / path).unlink()
    return f"{path} is named by a commit but is not there"


def shortened(out: Path) -> str:
    path = opened(out).commits[1].rejects
    assert path
    (out / path).write_bytes((out / path).read_bytes()[:-1])
    return f"{path} has {(out / path).stat().st_size} bytes, its commit says"


def unnamed(kind: str) -> Callable[[Path], str]:
    def damage(out: Path) -> str:
        (out / kind / "stranger.parquet").write_bytes(b"")
        return f"{kind}/stranger.parquet is named by no commit"

    return damage


def no_commit(out: Path) -> str:
    commits = opened(out).commits
    RECORDS.compact(Storage(str(out)), commits[:2] + commits[3:])
    return f"unit {commits[2].unit} has no commit"


def no_receipt(out: Path) -> str:
    (out / RECEIPT).unlink()
    return "not finished"


def broken_receipt(out: Path) -> str:
    (out / RECEIPT).write_text("{")
    return "is no receipt"


def broken_tasks(out: Path) -> str:
    (out / ACCOUNTS).write_text("{")
    return "holds no accounts"


def receipt(name: str, value: Any) -> Callable[[Path], str]:
    def damage(out: Path) -> str:
        edit_json(out / RECEIPT, **{name: value})
        return f"the receipt says {name} {value!r}, the commits make"

    return damage


def commit(said: str, **changes: Any) -> Callable[[Path], str]:
    def damage(out: Path) -> str:
        return said.format(edit_commit(out, 0, **changes).unit)

    return damage


def changed_tasks(out: Path) -> str:
    path = out / "tasks.jsonl"
    path.write_text(path.read_text().replace("A task of one's own", "Another task"))
    return "tasks.jsonl holds 13 tasks, and they are not those that the examples were made for"


SEEN_QUICKLY: dict[str, Callable[[Path], str]] = {
    "a file gone": gone,
    "a file shortened": shortened,
    "a shard that nobody names": unnamed("data"),
    "rejects that nobody names": unnamed("rejects"),
    "no commit": no_commit,
    "no receipt": no_receipt,
    "a broken receipt": broken_receipt,
    "broken accounts of the tasks": broken_tasks,
    "accepted": receipt("accepted", 1),
    "reasons": receipt("reasons", {"not_json": 46}),
    "tokens": receipt("prompt_tokens", 5),
    "tokens of tasks": receipt("task_completion_tokens", 5),
    "run key": receipt("run_key", "another"),
    "a commit of other sums": commit("unit {} has 50 requests, its commit accounts for 7 +", accepted=7),
    "a commit of other families": commit("commit {}: its families make 1, it has", families={"sts": 1}),
    "a commit of other languages": commit("commit {}: its languages make 1, it has", languages={"en": 1}),
    "a commit of other reasons": commit("commit {}: its reasons make 1, it has", reasons={"cut": 1}),
    "duplicates called rejects": commit("commit {}: its reasons duplicate and near_duplicate make", duplicates=0, rejected=12),
    "a commit without its shard": commit("rows of shard and names no file for them", shard=None),
    "other tasks": changed_tasks,
}


@pytest.mark.parametrize("damage", SEEN_QUICKLY.values(), ids=SEEN_QUICKLY.keys())
def test_what_every_level_finds(out: Path, damage: Callable[[Path], str]) -> None:
    said = damage(out)
    for level in ("quick", "sample", "full"):
        assert any(said in problem for problem in problems(out, level)), (level, said, problems(out, level))


def flipped(out: Path) -> str:
    path = opened(out).commits[1].shard
    assert path
    data = bytearray((out / path).read_bytes())
    data[len(data) // 2] ^= 1
    (out / path).write_bytes(data)
    return f"{path} does not have the checksum of its commit"


def no_parquet(out: Path) -> str:
    path = opened(out).commits[0].shard
    assert path
    (out / path).write_bytes(b"PAR1")
    edit_commit(out, 0, shard_bytes=4, shard_sha256=hashlib.sha256(b"PAR1").hexdigest())
    edit_json(out / RECEIPT, shard_bytes=sum(one.shard_bytes for one in opened(out).commits))
    return f"{path} cannot be read"


def contents(said: str, change: Change, kind: str = "shard") -> Callable[[Path], str]:
    def damage(out: Path) -> str:
        commit = rewrite(out, 0, change, kind)
        return said.format(path=getattr(commit, kind), unit=commit.unit, accepted=commit.accepted, less=commit.accepted - 1)

    return damage


def changed_metadata(table: pa.Table) -> pa.Table:
    metadata = json.loads(table.schema.metadata[METADATA_KEY])
    return table.replace_schema_metadata({METADATA_KEY: json.dumps(metadata | {"run_key": "another"}).encode()})


def negative_where_none(out: Path) -> str:
    shutil.rmtree(out)
    made_run.make(out, weights={"short-short": 1.0})
    path = rewrite(out, 0, first("negative", "one")).shard
    return f"{path}: row 0 has a negative, its family short-short has none"


# Row 0 is the first of the first shard: it is accepted.
SEEN_IN_THE_FILES: dict[str, Callable[[Path], str]] = {
    "a byte flipped": flipped,
    "no Parquet": no_parquet,
    "a row dropped": contents("unit {unit}: 1 rows are neither in data nor in rejects, 0 among them", lambda table: table.slice(1)),
    "fewer rows than counted": contents("{path} has {less} rows, its commit says {accepted}", lambda table: table.slice(1)),
    "a reject dropped": contents("unit {unit}: 1 rows are neither in data nor in rejects, 3 among them", lambda table: table.slice(1), "rejects"),
    "a row doubled": contents("unit {unit}: row 0 stands 2 times in data and rejects", lambda table: pa.concat_tables([table, table.slice(0, 1)])),
    "a row in both": contents("unit {unit}: row 3 stands 2 times in data and rejects", first("row", 3)),
    "a row of another unit": contents(f"{{path}} has rows outside its unit {{unit}}, {UNIT_ROWS} among them", first("row", UNIT_ROWS)),
    "a column less": contents("{path} has other columns than a synthesis writes", lambda table: table.drop_columns(["instruction"])),
    "a column of another type": contents("{path} has other columns", lambda table: table.set_column(0, "row", table["row"].cast(pa.int32())), "rejects"),
    "another run's file": contents("{path}: its metadata has run_key 'another', the run has", changed_metadata),
    "another generator": contents("{path} has 1 rows of another generator", first("generator", "another")),
    "another family": contents("{path}: row 0 has family 'new', its seed draws", first("family", "new")),
    "families that are not counted": contents("{path} has families", first("family", "new")),
    "another language": contents("{path}: row 0 has language 'fr', its seed draws", first("language", "fr")),
    "languages that are not counted": contents("{path} has languages", first("language", "fr")),
    "another task": contents("{path}: row 3 has task 'new', its seed draws", first("task", "new"), "rejects"),
    "other placeholders": contents("{path}: row 0 has placeholders 'others', its seed draws", first("placeholders", "others")),
    "another seed": contents("{path}: row 0 has seed 1, its seed draws", first("seed", 1)),
    "reasons that are not counted": contents("{path} has reasons", first("reason", "empty"), "rejects"),
    "notes that are not counted": contents("{path} has notes", first("notes", ["fence", "fence"])),
    "an empty text": contents("{path}: row 0 has an empty text", first("positive", " ")),
    "no query": contents("{path}: row 0 has an empty text", first("query", None)),
    "another instruction": contents("{path}: row 0 has an instruction that is not its task: 'new'", first("instruction", "new")),
    "a negative where there is none": negative_where_none,
}


@pytest.mark.parametrize("damage", SEEN_IN_THE_FILES.values(), ids=SEEN_IN_THE_FILES.keys())
def test_what_is_found_in_the_files(out: Path, damage: Callable[[Path], str]) -> None:
    said = damage(out)
    for level in ("sample", "full"):
        assert any(said in problem for problem in problems(out, level)), (level, said, problems(out, level))
    assert problems(out, "quick") == []


def test_examples_that_stand_twice_are_found_by_full_alone(tmp_path: Path) -> None:
    made = made_run.make(tmp_path / "out", remove=False)
    rows = range(7, COUNT, 20)
    with_negative = [made_run.has_negative(row) for row in rows]
    same = sum(max(0, with_negative.count(kind) - 1) for kind in (True, False))
    assert same > 5
    findings = verify(made)
    assert findings.repeated == same
    (said,) = findings.problems
    first_of_kind = {kind: rows[with_negative.index(kind)] for kind in set(with_negative)}
    second = min(row for row, kind in zip(rows, with_negative, strict=True) if row != first_of_kind[kind])
    assert said == f"{same} examples are the same as an earlier one: row {second} as row {first_of_kind[made_run.has_negative(second)]}"
    assert verify(made, level="sample").problems == []


def test_one_that_is_not_finished_is_said_to_be_so_and_nothing_else(tmp_path: Path) -> None:
    made = made_run.make(tmp_path / "out", finished=False)
    said = problems(tmp_path / "out")
    assert len(said) == 2
    assert f"unit {made.record.count - 30:012d} has no commit" in said[0]
    assert "not finished" in said[1]


def test_the_command(out: Path, llmemb: Any) -> None:
    shown = llmemb("verify", out)
    assert shown.code == 0
    counts = verify(opened(out))
    accounts = f"5 units, 230 asked = {counts.accepted} accepted + 46 rejected + {counts.duplicates} duplicates"
    assert shown.out == f"sound: {accounts}; checked all contents, 230 rows drawn again, no example stands twice\n"
    refused = llmemb("verify", out, "--against", "x")
    assert (refused.code, "holds a synthesis, leave them out" in refused.err) == (2, True)
    flipped(out)
    assert "1 problems" in llmemb("verify", out).err
    assert llmemb("verify", out, "--quick").code == 0
    found = llmemb("verify", out, "--json")
    assert (found.code, json.loads(found.out)["sound"], json.loads(found.out)["problem_count"]) == (3, False, 1)
