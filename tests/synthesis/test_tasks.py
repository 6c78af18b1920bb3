"""Tasks from answers and files, each once."""

from __future__ import annotations

from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from llmemb_ray.errors import ConfigError, InputError
from llmemb_ray.storage import Access
from llmemb_ray.synthesis.families import ASYMMETRIC
from llmemb_ray.synthesis.prompts import Prompts
from llmemb_ray.synthesis.tasks import Brainstormed, NoTasks, Pool, Task, brainstorm, read_answer, read_file


def task(text: str, family: str = "short-long", source: str = "s") -> Task:
    return Task(family=family, task=text, source=source)


@pytest.mark.parametrize(
    ("text", "read"),
    [
        ('["Find recipes.", "Find  laws\\n"]', Brainstormed(tasks=("Find recipes.", "Find laws"))),
        ('```json\n["Find recipes."]\n```', Brainstormed(tasks=("Find recipes.",), repairs=("fence",))),
        ('["a", "", " ... "]', Brainstormed(tasks=("a",), blank=2)),
    ],
)
def test_an_answer_with_tasks(text: str, read: Brainstormed) -> None:
    assert read_answer(text) == read


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ('Sure! ["a"]', "not_json"),
        ('["a", "b"', "not_json"),
        ("['a']", "not_json"),
        ('{"tasks": ["a"]}', "not_text"),
        ('["a", 3]', "not_text"),
        ('["\\ud800"]', "not_text"),
        ('["", " "]', "empty"),
        ("[]", "empty"),
        ("", "not_json"),
        ("[" * 100_000, "not_json"),
    ],
)
def test_an_answer_without(text: str, reason: str) -> None:
    found = read_answer(text)
    assert isinstance(found, NoTasks)
    assert found.reason == reason
    assert found.detail


def test_a_request_for_tasks_has_a_seed_of_its_own() -> None:
    prompts = Prompts.load()
    requests = [brainstorm(prompts, 1, family, call) for family in ASYMMETRIC for call in range(3)]
    assert len({request.seed for request in requests}) == 12
    assert all(0 <= request.seed < 2**31 and request.prompt == prompts.brainstorm[request.family] for request in requests)
    assert brainstorm(prompts, 1, "long-long", 2) in requests
    assert brainstorm(prompts, 2, "long-long", 2) not in requests


def test_a_pool_holds_each_task_of_a_family_once_in_order() -> None:
    pool = Pool()
    assert [pool.add(one) for one in (task("Find recipes."), task("find  RECIPES"), task("Find laws"), task("Find recipes", "long-long"))] == [
        True,
        False,
        True,
        True,
    ]
    assert pool.of("short-long") == ("Find recipes.", "Find laws")
    assert pool.of("long-short") == ()
    assert len(pool) == 3
    with pytest.raises(ConfigError, match="family sts has one fixed instruction and no tasks"):
        pool.add(task("a", "sts"))


def test_a_pool_comes_back_from_its_file(tmp_path: Path) -> None:
    pool = Pool([task("Najdi zákony “hned”", source="call 3"), task("b", "short-short"), task("a")])
    (tmp_path / "tasks.jsonl").write_bytes(pool.to_lines())
    again = Pool(read_file(str(tmp_path / "tasks.jsonl"), Access()))
    assert list(again) == list(pool)
    assert again.digest == pool.digest != Pool([task("a")]).digest


@pytest.mark.parametrize("name", ["t.jsonl", "t.csv", "t.tsv", "t.parquet"])
def test_a_file_of_a_user(tmp_path: Path, name: str) -> None:
    file = tmp_path / name
    rows = [{"family": "short-long", "task": "Find recipes, please"}, {"family": "long-short", "task": "Tell the tone"}]
    if name.endswith("parquet"):
        pq.write_table(pa.Table.from_pylist(rows), file)
    elif name.endswith("jsonl"):
        file.write_text("".join(f'{{"family": "{row["family"]}", "task": "{row["task"]}"}}\n' for row in rows))
    else:
        mark = "," if name.endswith("csv") else "\t"
        file.write_text(f"family{mark}task\n" + "".join(f'{row["family"]}{mark}"{row["task"]}"\n' for row in rows))
    assert list(read_file(str(file), Access())) == [Task(**row, source=str(file)) for row in rows]


@pytest.mark.parametrize(
    ("content", "error", "message"),
    [
        ("family,job\nshort-long,a\n", ConfigError, "has no column task; its columns are family, job"),
        ("family,task\nshort-long,a\nshortlong,b\n", InputError, "row 2: family 'shortlong' is not known"),
        ("family,task\nbitext,a\n", InputError, "row 1: family bitext has one fixed instruction"),
        ("family,task\nshort-long,\n", InputError, r"row 1: '' is no task \(empty\)"),
    ],
)
def test_a_file_that_is_wrong_is_refused_with_its_row(tmp_path: Path, content: str, error: type[Exception], message: str) -> None:
    (tmp_path / "t.csv").write_text(content)
    with pytest.raises(error, match=message):
        list(read_file(str(tmp_path / "t.csv"), Access()))


def test_a_file_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="tasks: "):
        list(read_file(str(tmp_path / "t.csv"), Access()))
