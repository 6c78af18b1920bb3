"""A synthesis against a server that answers well, badly and repeatedly: its accounts are the server's own."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from llmemb_ray.config import SynthesizeSettings
from llmemb_ray.errors import ConfigError, RunFailed, RunStopped
from llmemb_ray.storage import Access
from llmemb_ray.synthesis.drawing import Draw
from llmemb_ray.synthesis.families import WEIGHTS
from llmemb_ray.synthesis.job import synthesize
from llmemb_ray.synthesis.languages import LANGUAGES, SHARES
from llmemb_ray.synthesis.prompts import Prompts
from llmemb_ray.synthesis.receipt import Receipt
from llmemb_ray.synthesis.tasks import Pool, read_file
from tests.synthesis.spoken import SENTENCES
from tests.synthesis.stand_in import KINDS, LEAKED, PROMPTS, Given, Key, Rules, StandIn

SEED = 3

SOME = 240
"""Examples of a run that another one is compared with."""

FAULTY = Rules(faulty=60, faults=("429", "500"), kinds={kind: share for kind, (share, _) in KINDS.items()} | {"repeated": 300, "nearly repeated": 300})


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A place with a file of prompts and one of evaluation texts."""
    directory = tmp_path_factory.mktemp("synthesis")
    (directory / "prompts.yaml").write_text(PROMPTS)
    (directory / "leaked.txt").write_text(f"What is it?\n{LEAKED}\n")
    return directory


def settings(made: Path, out: Path, server: StandIn, count: int, **more: Any) -> SynthesizeSettings:
    values: dict[str, Any] = {
        "out": str(out),
        "llm": "stand-in",
        "base_url": server.url,
        "prompts": str(made / "prompts.yaml"),
        "contamination": [str(made / "leaked.txt")],
        "count": count,
        "seed": SEED,
        "tasks_per_family": 60,
        "unit_rows": 40,
        "concurrency": 8,
        "near_duplicates": 0.8,
    }
    return SynthesizeSettings.make(values | more)


def run(settings: SynthesizeSettings) -> Receipt:
    receipt = synthesize(settings, quiet=True)
    assert isinstance(receipt, Receipt)
    return receipt


@dataclass(frozen=True)
class Written:
    """What stands in all files of OUT: examples and rejects, by row; raises where a row stands twice."""

    examples: dict[int, dict[str, Any]]
    rejects: dict[int, dict[str, Any]]

    @classmethod
    def of(cls, out: Path) -> Written:
        tables = [[row for file in sorted((out / name).glob("*.parquet")) for row in rows(file)] for name in ("data", "rejects")]
        assert len({row["row"] for table in tables for row in table}) == sum(map(len, tables))
        return cls(*({row["row"]: row for row in table} for table in tables))

    @property
    def reasons(self) -> dict[int, str]:
        return {row: reject["reason"] for row, reject in self.rejects.items()}

    @property
    def texts(self) -> dict[int, tuple[str, ...]]:
        return {row: tuple(filter(None, (example["query"], example["positive"], example["negative"]))) for row, example in self.examples.items()}


def rows(file: Path) -> list[dict[str, Any]]:
    table: pa.Table = pq.ParquetFile(file).read()
    return list(table.to_pylist())


def drawn(made: Path, out: Path, count: int) -> dict[int, Key]:
    """Prompt and seed of each row, from what was brainstormed."""
    draw = Draw(
        seed=SEED,
        families=WEIGHTS,
        languages=SHARES,
        pool=Pool(read_file(str(out / "tasks.jsonl"), Access())),
        prompts=Prompts.load(str(made / "prompts.yaml")),
        generator_name="any",
    )
    return {row: (request.prompt, request.seed) for row, request in ((row, draw.request(row)) for row in range(count))}


def expected(given: Mapping[int, Given], *, near: bool = True) -> dict[int, str | None]:
    """Why each row is rejected, None where it is not, by the rules of the server: of equal answers the first stays, then of those that are nearly so."""
    why, seen, alike = {}, set[tuple[str, ...]](), set[str]()
    for row, one in sorted(given.items()):
        why[row] = one.reason
        if one.reason is None and one.texts in seen:
            why[row] = "duplicate"
        elif one.reason is None:
            why[row] = "near_duplicate" if near and one.alike in alike else None
            seen.add(one.texts)
            alike.add(one.alike)
    return why


def require(made: Path, out: Path, receipt: Receipt, rules: Rules, count: int, *, near: bool = True) -> dict[int, Given]:
    """What the rules give for each row, once it is known that files and receipt are just that."""
    given = {row: rules.given(key) for row, key in drawn(made, out, count).items()}
    why = expected(given, near=near)
    rejected = {row: reason for row, reason in why.items() if reason}
    duplicates = sum(reason in ("duplicate", "near_duplicate") for reason in rejected.values())
    written = Written.of(out)
    assert written.reasons == rejected
    assert written.texts == {row: one.texts for row, one in given.items() if row not in rejected}
    assert (receipt.asked, receipt.accepted, receipt.rejected, receipt.duplicates) == (count, count - len(rejected), len(rejected) - duplicates, duplicates)
    assert receipt.reasons == Counter(rejected.values())
    accepted = [one for row, one in given.items() if row not in rejected]
    assert receipt.families == Counter(one.family for one in accepted)
    assert {LANGUAGES[code].name: number for code, number in receipt.languages.items()} == Counter(one.language for one in accepted)
    assert receipt.notes.get("fence", 0) == sum(one.kind == "fenced" for one in accepted)
    assert (receipt.prompt_tokens, receipt.completion_tokens) == tuple(sum(one.tokens[place] for one in given.values()) for place in (0, 1))
    return given


def test_accounts_of_five_thousand_requests(made: Path, tmp_path: Path) -> None:
    rules, count = Rules(faulty=15), 5000
    with StandIn(rules) as server:
        more = {
            "tasks_per_family": 200,
            "unit_rows": 200,
            "concurrency": 16,
            "near_duplicates": None,
            "structured": "none",
        }  # The client goes through a schema slowly.
        receipt = run(settings(made, tmp_path, server, count, **more))
    given = require(made, tmp_path, receipt, rules, count, near=False)
    keys = drawn(made, tmp_path, count)
    assert server.accounts.requests == Counter({keys[row]: 1 + len(one.faults) for row, one in given.items()})
    assert receipt.retries == sum(len(one.faults) for one in given.values()) > 50
    told = server.accounts.prompt_tokens, server.accounts.completion_tokens
    assert told == (receipt.prompt_tokens + receipt.task_prompt_tokens, receipt.completion_tokens + receipt.task_completion_tokens)

    assert {one.kind for one in given.values()} == set(KINDS)
    assert {one.family for one in given.values()} == set(WEIGHTS)
    assert len({one.language for one in given.values()}) == len(receipt.languages) == 93
    spoken = {one.language for one in given.values() if one.reason is None and one.texts[0].startswith(SENTENCES.get(one.language, ("-",)))}
    assert len(spoken) == len(SENTENCES) == 19  # Long enough that an identifier was asked.

    tasks = [json.loads(line) for line in (tmp_path / "tasks.jsonl").read_text().splitlines()]
    brainstormed = json.loads((tmp_path / "_llmemb" / "tasks.json").read_text())
    assert brainstormed["answers"] == Counter(rules.tasks(key)[0] for key in server.accounts.lists.elements())
    assert Counter(task["family"] for task in tasks) == dict.fromkeys(["short-long", "long-short", "long-long", "short-short"], 200)
    plain = [" ".join(task["task"].split()).rstrip(" .").lower() for task in tasks]
    assert len(set(plain)) == len(plain)
    assert set(plain) <= {task.lower() for key in server.accounts.lists for task in rules.tasks(key)[1]}


@pytest.fixture(scope="module")
def straight(made: Path) -> tuple[Written, Receipt, StandIn]:
    """A run that nothing disturbed, its accounts checked."""
    with StandIn(FAULTY) as server:
        receipt = run(settings(made, made / "straight", server, SOME))
    given = require(made, made / "straight", receipt, FAULTY, SOME)
    assert {"duplicate", "near_duplicate"} <= set(expected(given).values())
    return Written.of(made / "straight"), receipt, server


def plain(receipt: Receipt) -> dict[str, Any]:
    """Without times, and without bytes, which the names of attempts decide."""
    return {name: value for name, value in receipt.to_dict().items() if name not in ("seconds_wall", "finished", "shard_bytes")}


def kept(out: Path) -> set[int]:
    """Rows whose answers are safe: in a unit that is written, or kept for one."""
    return Written.of(out).examples.keys() | Written.of(out).rejects.keys() | {int(line["prompt"]) for line in kept_lines(out)}


def kept_lines(out: Path) -> Iterable[dict[str, Any]]:
    files = (out / "_llmemb" / "answers").glob("*.jsonl")
    return [json.loads(line) for file in files for line in file.read_text().splitlines()]


def test_a_server_that_is_killed_and_comes_back(made: Path, tmp_path: Path, straight: tuple[Written, Receipt, StandIn]) -> None:
    rules = replace(FAULTY, faulty=0)  # The answers are the same.
    with StandIn(rules, dies_at=SOME // 2, seconds=0.002) as first:
        these = settings(made, tmp_path, first, SOME, retries=0)
        with pytest.raises(RunFailed, match=r"prompts in a row failed.*Connection error.*the same command asks"):
            run(these)
    safe = kept(tmp_path)
    assert SOME // 2 - 8 <= len(safe) <= first.accounts.received
    with pytest.raises(ConfigError, match="does not answer"):
        run(these)
    with StandIn(rules, port=first.port) as second:
        receipt = run(these)
    assert second.accounts.requests == Counter(key for row, key in drawn(made, tmp_path, SOME).items() if row not in safe)
    assert not second.accounts.lists
    assert Written.of(tmp_path) == straight[0]
    assert plain(receipt) == plain(straight[1]) | {"retries": 0}


@pytest.mark.parametrize(("fault", "faulty"), [("429", 100), ("500", 100), ("broken", 30), ("hang", 30)])
def test_a_fault_that_passes_changes_nothing(made: Path, tmp_path: Path, fault: str, faulty: int) -> None:
    rules, count = Rules(faulty=faulty, faults=(fault,)), 100
    with StandIn(rules, hang=1.0) as server:
        receipt = run(settings(made, tmp_path, server, count, request_timeout=0.5 if fault == "hang" else 60))
    given = require(made, tmp_path, receipt, rules, count)
    faults = sum(len(one.faults) for one in given.values())
    assert faults
    assert receipt.retries == faults or (fault == "hang" and receipt.retries > faults)  # A busy machine may be too late by itself.


@pytest.mark.parametrize(
    ("fault", "told"),
    [
        ("429", "too many requests"),
        ("500", "out of order"),
        ("broken", "Connection error"),
        ("hang", "timed out"),
        ("half a body", "no chat completion"),
        ("no body", "no chat completion"),
    ],
)
def test_a_fault_that_stays_leaves_its_units_and_the_same_command_continues(made: Path, tmp_path: Path, fault: str, told: str) -> None:
    rules, count = Rules(faulty=30, faults=(fault,)), 100
    with StandIn(rules, stays=True, hang=1.0) as server:
        these = settings(made, tmp_path, server, count, retries=1, request_timeout=0.5 if fault == "hang" else 60, unit_rows=10)
        with pytest.raises(RunFailed, match=rf"(?s)of 10 units failed.*request \d+: .*{told}.*same command again"):
            run(these)
    faulty = {row for row, key in drawn(made, tmp_path, count).items() if rules.given(key).faults}
    assert faulty
    assert set(range(count)) - kept(tmp_path) == faulty
    assert Written.of(tmp_path).texts.keys() | Written.of(tmp_path).reasons.keys() == {
        row for row in range(count) if {*range(row // 10 * 10, row // 10 * 10 + 10)}.isdisjoint(faulty)
    }
    sound = Rules()
    with StandIn(sound, port=server.port) as mended:
        receipt = run(these)
    assert mended.accounts.received == len(faulty)
    require(made, tmp_path, receipt, sound, count)


@pytest.mark.parametrize(("kind", "reason"), [("half", "not_json"), ("blank", "not_json"), ("silent", "refused"), ("cut", "cut")])
def test_an_answer_that_is_none_becomes_a_reject_and_is_not_asked_again(made: Path, tmp_path: Path, kind: str, reason: str) -> None:
    rules, count = Rules(kinds={"good": 4, kind: 1}), 60
    with StandIn(rules) as server:
        receipt = run(settings(made, tmp_path, server, count))
    given = require(made, tmp_path, receipt, rules, count)
    assert receipt.reasons == {reason: sum(one.kind == kind for one in given.values())} != {reason: 0}
    assert set(server.accounts.requests.values()) == {1}


def test_a_budget_stops_and_a_larger_one_continues(made: Path, tmp_path: Path, straight: tuple[Written, Receipt, StandIn]) -> None:
    whole = straight[1].prompt_tokens + straight[1].completion_tokens + straight[1].task_prompt_tokens + straight[1].task_completion_tokens
    spent = []
    with StandIn(FAULTY) as server:
        for share in (0.3, 0.7):
            with pytest.raises(RunStopped, match="larger --budget"):
                run(settings(made, tmp_path, server, SOME, concurrency=4, price_in=1.0, price_out=1.0, budget=share * whole / 1e6))
            spent.append((server.accounts.prompt_tokens + server.accounts.completion_tokens) / whole)
        receipt = run(settings(made, tmp_path, server, SOME, concurrency=4, price_in=1.0, price_out=1.0, budget=2 * whole / 1e6))
    assert 0.2 < spent[0] <= 0.3
    assert 0.6 < spent[1] <= 0.7
    assert server.accounts.requests == straight[2].accounts.requests
    assert server.accounts.lists == straight[2].accounts.lists
    assert Written.of(tmp_path) == straight[0]
    assert plain(receipt) == plain(straight[1]) | {"cost": pytest.approx(whole / 1e6)}


def test_a_larger_count_goes_on_where_the_smaller_ended(made: Path, tmp_path: Path, straight: tuple[Written, Receipt, StandIn]) -> None:
    with StandIn(FAULTY) as server:
        first = run(settings(made, tmp_path, server, 130))
        require(made, tmp_path, first, FAULTY, 130)
        receipt = run(settings(made, tmp_path, server, SOME))
    assert server.accounts.requests == straight[2].accounts.requests
    assert Written.of(tmp_path) == straight[0]
    units = {"units": straight[1].units + 1}  # 40 40 40 10, then 40 40 40 40 10: a unit never spans two counts.
    assert plain(receipt) == plain(straight[1]) | units


def test_receipts_do_not_tell_how_many_requests_were_made_at_once(made: Path, tmp_path: Path, straight: tuple[Written, Receipt, StandIn]) -> None:
    with StandIn(FAULTY) as server:
        receipt = run(settings(made, tmp_path, server, SOME, concurrency=1))
    assert server.busiest == 1 < straight[2].busiest
    assert plain(receipt) == plain(straight[1])
    assert Written.of(tmp_path) == straight[0]
