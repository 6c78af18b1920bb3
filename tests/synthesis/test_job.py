"""The synthesis job as its users meet it: who asks, what is killed and continued, tasks, other settings, checks, storage and the command line."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from random import Random
from typing import Any

import psutil
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml

from llmemb_ray.config import SynthesizeSettings
from llmemb_ray.errors import ConfigError, LeaseHeld, OutputError, RunFailed, RunMismatch, StorageError
from llmemb_ray.shards.lease import LeaseHolder
from llmemb_ray.storage import Storage
from llmemb_ray.synthesis import duplicates
from llmemb_ray.synthesis.brainstorming import Brainstorming
from llmemb_ray.synthesis.commits import RECORDS, Made
from llmemb_ray.synthesis.families import ASYMMETRIC, FAMILIES
from llmemb_ray.synthesis.job import synthesize
from llmemb_ray.synthesis.prompts import wanted
from llmemb_ray.synthesis.receipt import Receipt
from llmemb_ray.synthesis.record import Synthesis
from llmemb_ray.synthesis.units import EXAMPLES, put_examples
from tests.generation.chat_server import ChatServer, Reply
from tests.generation.test_local import bytewise_tokenizer
from tests.s3_server import S3Server
from tests.small_models import make_model

KINDS = ("duplicate", "near_duplicate")


class Server(ChatServer):
    """An LLM that lists tasks and writes an example about each seed; ``say`` may answer otherwise.

    say: called with the body of the request and the place of its seed among those seen, from 0; None leaves the answer as it is. asked: by (prompt, seed).
    """

    def __init__(self, say: Callable[[dict[str, Any], int], Reply | None] = lambda *_: None, seconds: float = 0.0) -> None:
        self._say, self._places = say, dict[tuple[str, int], int]()
        super().__init__(lambda *_: "", seconds)

    @property
    def examples(self) -> Counter[tuple[str, int]]:
        """How often each was asked for."""
        return Counter((prompt, body["seed"]) for _, body in self.requests if not (prompt := body["messages"][-1]["content"]).startswith("Tasks of"))

    @property
    def lists(self) -> int:
        """Requests for tasks."""
        return len(self.requests) - self.examples.total()

    def answer(self, body: dict[str, Any], before: int) -> Reply:
        prompt, seed = body["messages"][-1]["content"], body["seed"]
        brainstorms = prompt.startswith("Tasks of")
        place = -1 if brainstorms else self._places.setdefault((prompt, seed), len(self._places))
        said = self._say(body, place)
        if said is not None:
            return said
        if brainstorms:
            return json.dumps([f"Given {prompt.split()[-1]} number {seed % 1000} {number}, find its like." for number in range(20)])
        family = FAMILIES[prompt.split()[0]]
        return json.dumps({key: f"{key[:2]} {seed}" for key in family.keys})


@pytest.fixture(scope="module")
def prompts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("prompts") / "prompts.yaml"
    generate = {name: " ".join([name, *(f"{{{placeholder}}}" for placeholder in wanted(family))]) for name, family in FAMILIES.items()}
    path.write_text(yaml.safe_dump({"brainstorm": {family: f"Tasks of {family}" for family in ASYMMETRIC}, "generate": generate}))
    return path


@pytest.fixture
def settings(prompts: Path, tmp_path: Path) -> Callable[..., SynthesizeSettings]:
    """Settings of a small run into tmp_path/out."""

    def make(server: ChatServer | None = None, **more: Any) -> SynthesizeSettings:
        endpoint = {} if server is None else {"llm": "tiny", "base_url": server.url, "retries": 0}
        small = {"out": str(tmp_path / "out"), "prompts": str(prompts), "count": 30, "unit_rows": 10, "tasks_per_family": 5, "check_language": False}
        return SynthesizeSettings.make(small | endpoint | more)

    return make


Settings = Callable[..., SynthesizeSettings]


def run(settings: SynthesizeSettings) -> Receipt:
    receipt = synthesize(settings, quiet=True)
    assert isinstance(receipt, Receipt)
    return receipt


def rows(out: Path, kind: str = "data") -> dict[int, dict[str, Any]]:
    """By row, of all files, that a run wrote; no row twice."""
    found = [row for file in sorted((out / kind).glob("*.parquet")) for row in pq.ParquetFile(file).read().to_pylist()]
    by_row = {row["row"]: row for row in found}
    assert len(by_row) == len(found)
    return by_row


def require_whole(out: Path, receipt: Receipt, count: int) -> None:
    """Each request stands once, as an example or as a reject, and the receipt says so."""
    examples, rejects = rows(out), rows(out, "rejects")
    assert not examples.keys() & rejects.keys()
    assert examples.keys() | rejects.keys() == set(range(count))
    of_duplicates = sum(row["reason"] in KINDS for row in rejects.values())
    assert (receipt.asked, receipt.accepted, receipt.rejected, receipt.duplicates) == (count, len(examples), len(rejects) - of_duplicates, of_duplicates)
    assert json.loads((out / "_llmemb" / "receipt.json").read_text())["asked"] == count


def answered(out: Path) -> set[int]:
    """Rows whose answers are safe: committed, or kept."""
    found: set[int] = set()
    for path in (out / "_llmemb" / "commits").glob("*.json"):
        made = json.loads(path.read_text())
        found |= set(range(made["start"], made["start"] + made["rows"]))
    for path in (out / "_llmemb" / "answers").glob("*.jsonl"):
        whole = path.read_text().rpartition("\n")[0].splitlines()
        found |= {int(json.loads(line)["prompt"]) for line in whole}
    return found


def wait_for(condition: Callable[[], Any], what: str) -> None:
    deadline = time.monotonic() + 180
    while not condition():
        assert time.monotonic() < deadline, f"no {what} within three minutes"
        time.sleep(0.02)


# -- who asks --------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def ray_here() -> Iterator[None]:
    import ray

    ray.init(address="local", num_cpus=4, include_dashboard=False, log_to_driver=False, logging_level="ERROR")
    yield
    ray.shutdown()


@pytest.mark.usefixtures("ray_here")
def test_actors_write_what_one_process_does_whatever_becomes_of_them(settings: Settings, tmp_path: Path) -> None:
    model = make_model(tmp_path / "model", tokenizer=bytewise_tokenizer(), head=True, max_position_embeddings=1024)
    tasks = tmp_path / "tasks.jsonl"
    tasks.write_text("".join(json.dumps({"family": family, "task": f"Find what fits, {family}."}) + "\n" for family in ASYMMETRIC))
    common = {"model": str(model), "count": 24, "unit_rows": 2, "max_new_tokens": 160, "max_characters": 16, "compute_dtype": "float32"}
    given = {"tasks": [str(tasks)], "tasks_per_family": 0, "languages": {"en": 1, "de": 1}, **common}
    runs = {}
    for actors in (0, 1, 4):
        out = tmp_path / str(actors)
        cluster = where(actors)
        killer = threading.Thread(target=kill_an_actor, args=(out,), daemon=True)
        if actors == 4:
            killer.start()
        receipt = run(settings(out=str(out), **given, **cluster))
        if actors == 4:
            killer.join(200)
            assert killed == [True]
        require_whole(out, receipt, 24)
        runs[actors] = rows(out), rows(out, "rejects"), receipt.run_key, receipt.reasons, receipt.prompt_tokens, receipt.completion_tokens
    assert runs[0] == runs[1] == runs[4]
    assert len(runs[0][0]) > 8
    pools = []
    for actors in (0, 1):
        brief = {"families": {"short-short": 1}, "tasks_per_family": 3, "tasks_only": True, **common, "max_new_tokens": 8}
        made = synthesize(settings(out=str(tmp_path / f"tasks-{actors}"), **brief, **where(actors)), quiet=True)
        assert isinstance(made, Brainstorming)
        pools.append((made, (tmp_path / f"tasks-{actors}" / "tasks.jsonl").read_text()))
    assert pools[0] == pools[1]
    assert pools[0][0].answers["cut"] > 0
    assert pools[0][0].tasks["short-short"] > 0


def where(actors: int) -> dict[str, Any]:
    return {"actors": actors, "cpus_per_actor": 1, "ray_address": "local"} if actors else {"actors": 0}


killed: list[bool] = []


def kill_an_actor(out: Path) -> None:
    """Once a unit is committed, one of the actors that hold a generator."""
    wait_for(lambda: any((out / "_llmemb" / "commits").glob("*.json")), "commit")
    for process in psutil.Process().children(recursive=True):
        try:
            title = " ".join(process.cmdline())
        except psutil.NoSuchProcess:
            continue
        if "Synthesize" in title:
            process.kill()
            killed.append(True)
            return


def test_a_driver_that_is_killed_is_continued_and_nothing_is_asked_again(prompts: Path, tmp_path: Path, llmemb: Any) -> None:
    count, concurrency = 40, 4
    out = tmp_path / "out"
    with Server(seconds=0.1) as server:
        common = ("--count", count, "--unit-rows", 5, "--tasks-per-family", 5, "--no-check-language", "--prompts", prompts, "--languages", "{en: 1, de: 2}")
        arguments = ["synthesize", "--out", out, "--llm", "tiny", "--base-url", server.url, "--concurrency", concurrency, *common]
        driver = subprocess.Popen([sys.executable, "-m", "llmemb_ray.cli", *map(str, arguments)], stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
        try:
            wait_for(lambda: driver.poll() is not None or len(answered(out)) > 12, "answers")
            assert driver.poll() is None, driver.stderr
        finally:
            driver.send_signal(signal.SIGKILL)
            driver.wait()
        commits = {path.stem: json.loads(path.read_text())["attempt"] for path in (out / "_llmemb" / "commits").glob("*.json")}
        safe = answered(out)
        lists, asked = server.lists, server.examples.total()
        assert commits
        assert len(safe) < count
        shown = llmemb(*arguments)
        assert shown.code == 0, shown.err
        assert f"{count} asked = " in shown.out
        assert server.lists == lists
        assert asked - len(safe) <= 2 * concurrency
        assert server.examples.total() - asked == count - len(safe)
    assert len(server.examples) == count
    synthesis = Synthesis.open(Storage(str(out)))
    assert synthesis is not None
    assert synthesis.receipt is not None
    require_whole(out, synthesis.receipt, count)
    assert {made.unit: made.attempt for made in synthesis.commits}.items() >= commits.items()
    assert not list((out / "_llmemb").glob("answers*"))
    again = llmemb(*arguments, "--json")
    assert json.loads(again.out) == synthesis.receipt.to_dict()
    assert server.examples.total() == asked + count - len(safe)


# -- tasks -----------------------------------------------------------------------------------------


def test_tasks_are_made_looked_at_edited_and_used(settings: Settings, tmp_path: Path) -> None:
    out = tmp_path / "out"
    with Server() as server:
        made = synthesize(settings(server, tasks_only=True), quiet=True)
        assert isinstance(made, Brainstorming)
        assert (made.tasks, made.calls, server.lists) == (dict.fromkeys(ASYMMETRIC, 5), 4, 4)
        assert synthesize(settings(server, tasks_only=True), quiet=True) == made
        tasks = [json.loads(line) for line in (out / "tasks.jsonl").read_text().splitlines()]
        edited = [task | {"task": f"Mine: {task['task']}"} for task in tasks if task["family"] != "short-long"]
        edited += [{"family": "short-long", "task": "The only one."}]
        (out / "tasks.jsonl").write_text("".join(json.dumps(task) + "\n" for task in edited))
        with pytest.raises(ConfigError, match=r"tasks\.jsonl was edited, and the settings that it was made with have changed.*name the copy with --tasks"):
            run(settings(server, tasks_per_family=6))
        receipt = run(settings(server))
        assert server.lists == 4
        require_whole(out, receipt, 30)
        used = {(row["family"], row["instruction"]) for row in rows(out).values() if FAMILIES[row["family"]].asymmetric}
        assert used <= {(task["family"], task["task"]) for task in edited}
        assert ("short-long", "The only one.") in used

        copy = tmp_path / "copy.jsonl"  # As the message above says.
        os.replace(out / "tasks.jsonl", copy)
        with pytest.raises(OutputError, match=r"tasks\.jsonl is gone; bring it back"):
            run(settings(server))
        mine = {"out": str(tmp_path / "mine"), "tasks": [str(copy)], "tasks_per_family": 0}
        own = run(settings(server, **mine))
        assert (server.lists, own.task_prompt_tokens) == (4, 0)
        assert {(row["family"], row["instruction"]) for row in rows(tmp_path / "mine").values() if FAMILIES[row["family"]].asymmetric} == used
    copy.write_text('{"family": "short-long", "task": "A"}\n')
    with pytest.raises(ConfigError, match=r"tasks: the pool has none of family long-short; .*add a file of tasks"):
        run(settings(server, **mine | {"out": str(tmp_path / "lacking"), "families": {"short-long": 1, "long-short": 1}}))


def test_brainstorming_that_gives_nothing_ends_after_a_bounded_number_of_calls(settings: Settings, tmp_path: Path) -> None:
    with Server(lambda body, place: "I would rather talk about the weather." if place < 0 else None) as server:
        for _ in range(2):
            with pytest.raises(
                RunFailed, match=r"no task of family short-long and long-short and .* in 8 calls each \(32 not_json\); .*_llmemb/brainstorm\.jsonl"
            ):
                run(settings(server, tasks_per_family=25))
            assert server.lists == 4 * (3 * 2 + 2)
    kept = [json.loads(line) for line in (tmp_path / "out" / "_llmemb" / "brainstorm.jsonl").read_text().splitlines()]
    assert {line["answer"]["text"] for line in kept} == {"I would rather talk about the weather."}
    with Server(lambda body, place: json.dumps(["Find it.", "find  it"]) if place < 0 else None) as server:
        made = synthesize(settings(server, out=str(tmp_path / "few"), tasks_only=True), quiet=True)  # Each answer has the same one task.
        assert isinstance(made, Brainstorming)
        assert (made.tasks, made.calls, server.lists) == (dict.fromkeys(ASYMMETRIC, 1), 20, 20)


def test_a_brainstorming_that_was_stopped_asks_nothing_twice(settings: Settings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    failing = {3, 4}

    def say(body: dict[str, Any], place: int) -> Reply | None:
        return (503, {"error": {"message": "overloaded"}}) if server.lists in failing else None

    with Server(say) as server:
        with pytest.raises(RunFailed, match=r"brainstorming: 2 of 4 calls had no answer: .*overloaded.*asks these again"):
            run(settings(server, concurrency=1))
        with monkeypatch.context() as patched:  # Killed between the two files of a pool.
            patched.setattr(Storage, "put", stopping_at(Storage.put, lambda path: path.endswith("tasks.jsonl")))
            with pytest.raises(StorageError):
                run(settings(server))
        assert server.lists == 4 + 2
        receipt = run(settings(server))
        assert server.lists == 4 + 2
    require_whole(tmp_path / "out", receipt, 30)


def stopping_at(put: Any, stops: Callable[[str], bool]) -> Any:
    """``put``, but for the first path that is ``stops``, where it fails."""
    stopped: list[str] = []

    def wrapped(self: Storage, path: str, data: Any) -> None:
        if stops(path) and not stopped:
            stopped.append(path)
            raise StorageError(f"the disk went away at {path}")
        put(self, path, data)

    return wrapped


# -- other settings, other users -------------------------------------------------------------------


def test_other_settings_are_another_run_and_are_named(settings: Settings, prompts: Path, tmp_path: Path) -> None:
    other = tmp_path / "other.yaml"
    other.write_text(prompts.read_text().replace("sts {unit}", "sts anew {unit}"))
    assert other.read_text() != prompts.read_text()
    weather = tmp_path / "weather.txt"
    weather.write_text("It rains.\n")
    out = tmp_path / "out"
    with Server() as server:
        before = run(settings(server, count=10))
        asked = len(server.requests)
        for changed, named in (
            ({"seed": 1}, "seed: 0 there, 1 now"),
            ({"prompts": str(other)}, "prompts: "),
            ({"languages": {"en": 1, "de": 1}}, r"languages\."),
            ({"families": {"sts": 1, "bitext": 1, "short-long": 1}}, r"families: .* there, \[\"short-long\"\] now"),
            ({"strict": True}, r"checks\.strict: false there, true now"),
            ({"near_duplicates": 0.5}, r"checks\.near_duplicates: null there, 0.5 now"),
            ({"contamination": [str(weather)]}, r"checks\.contamination: null there"),
            ({"max_characters": 500}, r"checks\.max_characters: 16000 there, 500 now"),
            ({"unit_rows": 5}, r"checks\.unit_rows: 10 there, 5 now"),
            ({"temperature": 0.5}, r"temperature 1\.0.* there, .*temperature 0\.5.* now"),
        ):
            with pytest.raises(RunMismatch, match=rf"(?s)holds a synthesis with other settings:.*{named}.*or begin anew with overwrite"):
                run(settings(server, **{"count": 10} | changed))
        assert len(server.requests) == asked
        assert run(settings(server, count=10, concurrency=2, request_timeout=9, price_in=3)) == before

        stranger = out / "data" / "stranger.parquet"
        stranger.write_text("mine")
        receipt = run(settings(server, seed=1, overwrite=True))
        stranger.unlink()
        require_whole(out, receipt, 30)
        assert receipt.run_key != before.run_key


def test_an_overwriting_that_was_stopped_leaves_nothing_that_is_taken_for_the_new_run(
    settings: Settings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    small: dict[str, Any] = {"count": 4, "unit_rows": 2, "families": {"short-short": 1}}
    with Server() as server:
        run(settings(server, **small))
        for gone in ("_llmemb/commits.parquet", "data/", "tasks.jsonl", "_llmemb/tasks.json", "_llmemb/synthesis.json"):
            run(settings(server, **small, overwrite=True))
            with monkeypatch.context() as patched:
                patched.setattr(Storage, "delete", stopping_deletion(gone))
                with pytest.raises(StorageError, match="the disk went away"):
                    run(settings(server, **small, seed=1, overwrite=True))
            with pytest.raises((RunMismatch, ConfigError, OutputError)):
                run(settings(server, **small, seed=1))
        receipt = run(settings(server, **small, seed=1, overwrite=True))
    require_whole(out, receipt, 4)


def stopping_deletion(at: str) -> Any:
    delete = Storage.delete

    def wrapped(self: Storage, paths: Any) -> None:
        for path in list(paths):
            if path.startswith(at):
                raise StorageError(f"the disk went away at {path}")
            delete(self, [path])

    return wrapped


def test_what_is_not_ours_is_left_alone(settings: Settings, tmp_path: Path) -> None:
    with Server() as server:
        for path, told in (("data/x.parquet", "from no synthesis"), ("_llmemb/plan/plan.json", "holds an embedding run"), ("tasks.jsonl", "move it away")):
            out = tmp_path / path.replace("/", "-")
            (out / path).parent.mkdir(parents=True)
            (out / path).write_text("{}")
            for overwrite in (False, True):
                with pytest.raises((OutputError, ConfigError), match=told):
                    run(settings(server, out=str(out), overwrite=overwrite))
            assert (out / path).read_text() == "{}"
        output = Storage(str(tmp_path / "out"))
        with LeaseHolder(output, dict, waiting=lambda _: None) as other:
            threading.Timer(0.5, other._write).start()  # Its heartbeat, which else comes after seconds.
            with pytest.raises(LeaseHeld, match=r"another driver .* is at work"):
                run(settings(server, overwrite=True))
        assert not server.requests


def test_a_driver_that_lost_its_lease_stops_before_it_removes_anything(settings: Settings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def say(body: dict[str, Any], place: int) -> None:
        if place == 25:
            holders[0].lost = "process 1 on elsewhere took the lease"

    holders: list[LeaseHolder] = []
    entered = LeaseHolder.__enter__

    def remembered(self: LeaseHolder) -> LeaseHolder:
        holders.append(self)
        return entered(self)

    monkeypatch.setattr(LeaseHolder, "__enter__", remembered)
    with Server(say) as server:
        with pytest.raises(OutputError, match="took the lease; this driver stops"):
            run(settings(server, concurrency=1))
        assert not (tmp_path / "out" / "_llmemb" / "receipt.json").exists()
        holders.clear()
        (tmp_path / "out" / "_llmemb" / "lease.json").unlink()
        require_whole(tmp_path / "out", run(settings(server)), 30)


def test_a_growing_count_goes_on_and_a_smaller_one_changes_nothing(settings: Settings, tmp_path: Path) -> None:
    with Server() as server:
        for count, examples in ((12, 12), (25, 25), (5, 25)):
            require_whole(tmp_path / "out", run(settings(server, count=count)), examples)
            assert server.examples.total() == examples


def test_units_that_fail_are_told_and_closed_and_what_is_missing_is_named(settings: Settings, tmp_path: Path) -> None:
    out, opened, failing = tmp_path / "out", [0], True

    def say(body: dict[str, Any], place: int) -> Reply | None:
        opened.append(sum("/answers/" in file.path for file in psutil.Process().open_files()))
        return (503, {"error": {"message": "overloaded"}}) if failing and place % 5 == 3 and place > 4 else None

    small: dict[str, Any] = {"count": 60, "unit_rows": 5, "families": {"sts": 1}, "concurrency": 1}
    with Server(say) as server:
        with pytest.raises(RunFailed, match=r"(?s)11 of 12 units failed.*their answers are kept.*unit 000000000005: request 8: .*overloaded.*and 6 more"):
            run(settings(server, **small))
        assert max(opened) <= 2
        failing = False
        [shard] = (out / "data").glob("*.parquet")
        shard.unlink()
        with pytest.raises(RunFailed, match=rf"1 files that commits name are gone, .*{shard.name} among them; delete their commits to ask again"):
            run(settings(server, **small))
        assert server.examples.total() == 60 + 11
        (out / "_llmemb" / "commits" / "000000000000.json").unlink()
        receipt = run(settings(server, **small))
        assert server.examples.total() == 60 + 11 + 5
        require_whole(out, receipt, 60)
        (out / "_llmemb" / "synthesis.json").unlink()
        with pytest.raises(OutputError, match=r"synthesis\.json is gone, .* bring it back"):
            run(settings(server, **small))


# -- checks ----------------------------------------------------------------------------------------

FOX = "the quick brown fox jumps over the lazy dog near the old stone bridge in the early morning mist"


def sts(query: str, positive: str = "Something alike.", negative: str = "Something else.") -> str:
    return json.dumps({"S1": query, "S2": positive, "S3": negative})


def test_texts_of_an_evaluation_and_answers_that_are_no_text_are_rejected(settings: Settings, tmp_path: Path) -> None:
    (tmp_path / "leaked.txt").write_text("A man is playing a guitar.\n")
    (tmp_path / "leaked.jsonl").write_text(json.dumps({"id": 3, "texts": ["Two dogs run."]}) + "\n")
    said = {
        0: sts("a MAN is  playing a guitar."),
        1: sts("One.", positive="Two dogs run. "),
        2: sts("One.", negative="Two dogs run."),
        3: f"```json\n{sts('Three.')}\n```",
        4: '{"S1": "half \ud83d", "S2": "a", "S3": "b"}',
        5: "no JSON but half a \udc00 pair",
    }
    files = [str(tmp_path / "leaked.txt"), str(tmp_path / "leaked.jsonl")]
    with Server(lambda body, place: said.get(place)) as server:
        receipt = run(
            settings(server, count=8, families={"sts": 1}, languages={"en": 1}, concurrency=1, contamination=files, keep_raw=True, tasks_per_family=0)
        )
    require_whole(tmp_path / "out", receipt, 8)
    rejects, examples = rows(tmp_path / "out", "rejects"), rows(tmp_path / "out")
    assert {row: reject["reason"] for row, reject in rejects.items()} == {0: "contaminated", 1: "contaminated", 2: "contaminated", 4: "not_text", 5: "not_json"}
    assert "Two dogs run." in rejects[1]["detail"]
    assert rejects[4]["raw"] == '{"S1": "half \\ud83d", "S2": "a", "S3": "b"}'
    assert (examples[3]["raw"], examples[3]["notes"], examples[3]["query"]) == (said[3], ["fence"], "Three.")
    assert server.lists == 0


def test_near_duplicates_go_and_a_removal_that_was_stopped_comes_to_the_same(settings: Settings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    near = FOX.replace("lazy", "idle")
    texts = [FOX, near, "Rain is expected in the north.", near, FOX, near.title(), "Rain fell."]

    def say(body: dict[str, Any], place: int) -> str:
        return sts(texts[place % 7], positive=texts[place % 7] + " indeed", negative=texts[place % 7] + " never")

    why = {1: "near_duplicate", 3: "duplicate", 4: "duplicate", 5: "near_duplicate"}
    common = {"count": 7, "unit_rows": 2, "families": {"sts": 1}, "languages": {"en": 1}, "concurrency": 1, "near_duplicates": 0.8, "tasks_per_family": 0}
    with Server(say) as server:
        straight = run(settings(server, **common))
        require_whole(tmp_path / "out", straight, 7)
        assert {row: reject["reason"] for row, reject in rows(tmp_path / "out", "rejects").items()} == why
        for stop in (1, 2):
            out = tmp_path / f"stopped-{stop}"
            with monkeypatch.context() as patched:
                patched.setattr(RECORDS, "write", stopping_write(stop))
                with pytest.raises(StorageError):
                    run(settings(server, out=str(out), **common))
            receipt = run(settings(server, out=str(out), **common))
            assert (rows(out), rows(out, "rejects")) == (rows(tmp_path / "out"), rows(tmp_path / "out", "rejects"))
            assert (receipt.reasons, receipt.duplicates, receipt.accepted) == (straight.reasons, straight.duplicates, straight.accepted)
        grown = tmp_path / "grown"
        for count in (3, 7):
            receipt = run(settings(server, **common | {"out": str(grown), "count": count}))
        assert (rows(grown), rows(grown, "rejects")) == (rows(tmp_path / "out"), rows(tmp_path / "out", "rejects"))
        assert receipt.reasons == straight.reasons == Counter(why.values())


def stopping_write(after: int) -> Any:
    """Of a commit that duplicates are taken from; those of the four units come before."""
    write, times = type(RECORDS).write, [0]

    def wrapped(storage: Storage, record: Any) -> None:
        times[0] += bool(record.duplicates)
        if times[0] > after:
            raise StorageError("the disk went away")
        write(RECORDS, storage, record)

    return wrapped


def shingles(text: str) -> set[str]:
    return {text[place : place + 3] for place in range(len(text) - 2)}


def test_near_duplicates_just_as_alike_as_asked_for_are_found(tmp_path: Path) -> None:
    random, output = Random(0), Storage(str(tmp_path))
    texts = []
    for _ in range(100):  # Pairs with a Jaccard similarity of 0.84 to 0.88: two standard deviations of its estimate above 0.8.
        first = ["".join(random.choices("abcdefghijklmnopqrstuvwxyz", k=5)) for _ in range(60)]
        second, alike = list(first), 1.0
        while alike > 0.88:
            second[random.randrange(60)] = "".join(random.choices("abcdefghijklmnopqrstuvwxyz", k=5))
            one, other = shingles(" ".join(first)), shingles(" ".join(second))
            alike = len(one & other) / len(one | other)
        assert alike > 0.84
        texts += [" ".join(first), " ".join(second)]
    texts += ["Some  text", "some text", "some test"]
    blank: dict[str, Any] = dict.fromkeys(EXAMPLES.names, "") | {"notes": [], "seed": 0}
    table = pa.Table.from_pylist([blank | {"row": row, "query": text} for row, text in enumerate(texts)], schema=EXAMPLES)
    commit = Made(unit="0", attempt="a", start=0, rows=len(texts), accepted=len(texts), rejected=0, **put_examples(output, "key", "0", "a", table))
    found = duplicates.find(output, [commit], near=0.8)
    assert sum(found.get(row) == (row - 1, "near_duplicate") for row in range(1, 200, 2)) > 92
    assert not any(row in found for row in range(0, 200, 2))
    assert duplicates.find(output, [commit], near=1.0) == {201: (200, "near_duplicate")}


def test_weights_decide_families_and_languages(settings: Settings, tmp_path: Path) -> None:
    with Server() as server:
        receipt = run(settings(server, count=300, unit_rows=100, families={"sts": 3, "short-short": 1, "bitext": 0}, languages={"no": 1, "ja": 3}))
        assert server.lists == 1  # For the one family that needs tasks.
    assert receipt.families.keys() == {"sts", "short-short"}
    assert receipt.languages.keys() == {"no", "ja"}
    assert abs(receipt.families["sts"] - 225) < 30  # Four standard deviations of a binomial of 300 draws.
    assert abs(receipt.languages["ja"] - 225) < 30


# -- storage, command line -------------------------------------------------------------------------


def test_a_run_in_object_storage(settings: Settings, s3: S3Server) -> None:
    reach = {"out": s3.url("synthesis"), "endpoint_url": s3.endpoint_url, "storage_options": s3.storage_options}
    failing = True

    def say(body: dict[str, Any], place: int) -> Reply | None:
        return (503, {"error": {"message": "overloaded"}}) if failing and place == 7 else None

    with Server(say) as server:
        with pytest.raises(RunFailed, match=r"(?s)1 of 3 units failed.*unit \d{12}: request \d+: .*overloaded"):
            run(settings(server, **reach))
        failing = False
        receipt = run(settings(server, **reach))
        assert server.examples.total() == 30 + 1
        assert run(settings(server, **reach)) == receipt
    synthesis = Synthesis.open(Storage(s3.url("synthesis"), s3.access()))
    assert synthesis is not None
    assert synthesis.receipt == receipt
    assert synthesis.status()["state"] == "finished"
    assert [row for _, table in synthesis.tables("shard") for row in table["row"].to_pylist()] == list(range(30))
    left = {entry.path for entry in synthesis.storage.list("_llmemb")}
    assert left == {f"_llmemb/{name}" for name in ("brainstorm.jsonl", "commits.parquet", "receipt.json", "synthesis.json", "tasks.json")}


@pytest.mark.parametrize(
    ("given", "told"),
    [
        ({"llm": None}, "llm or model, one of them, must be given"),
        ({"out": None}, "out: must be given"),
        ({"base-url": "http://127.0.0.1:9/v1"}, "base_url: http://127.0.0.1:9/v1 does not answer"),
        ({"base-url": "tiny"}, "base_url: tiny is no http:// or https:// address"),
        ({"families": "{sts: 1, story: 1}"}, "families: 'story' is not known; there are short-long, long-short, sts"),
        ({"languages": "{en: 1, xx: 1}"}, "languages: 'xx' is not known; there are af, "),
        ({"languages": "{en: 1}"}, "languages: bitext needs two, there is en; name another"),
        ({"languages": "{en: -1}"}, "languages: en: -1 is no weight; write a number from 0 on"),
        ({"families": "{sts: 0}"}, "families: all weights are 0"),
        ({"families": "sts"}, "families: "),
        ({"tasks": "nowhere.jsonl"}, "tasks: .*nowhere.jsonl.*check the path"),
        ({"tasks": "broken.jsonl"}, "tasks: .*broken.jsonl line 2 is not JSON"),
        ({"tasks": "unfit.jsonl"}, "tasks: .*unfit.jsonl row 1: family sts has one fixed instruction and no tasks"),
        ({"tasks-per-family": 0}, "tasks_per_family: without brainstorming the tasks must come from --tasks"),
        ({"families": "{short-long: 1}", "tasks-per-family": 0}, "tasks: the pool has none of family short-long"),
        ({"prompts": "nowhere.yaml"}, "prompts: nowhere.yaml is not there"),
        ({"contamination": "nowhere.txt"}, "contamination: .*nowhere.txt is not there"),
        ({"budget": 3}, "budget: cannot be reckoned with without price_in and price_out"),
    ],
)
def test_mistakes_are_told_before_anything_is_paid_for(
    given: Mapping[str, Any], told: str, tmp_path: Path, llmemb: Any, monkeypatch: pytest.MonkeyPatch, prompts: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("OPENAI_BASE_URL", raising=False)
    Path("broken.jsonl").write_text('{"family": "short-long", "task": "A"}\n{"fam\n')
    Path("unfit.jsonl").write_text('{"family": "sts", "task": "A"}\n')
    with Server() as server:
        values = {"out": "out", "llm": "tiny", "base-url": server.url, "retries": 0, "count": 5, **given}
        if values["llm"] is None:
            values = {"out": "out"}
        shown = llmemb("synthesize", *(word for name, value in values.items() if value is not None for word in (f"--{name}", value)))
        assert not server.requests
    assert shown.code == 2
    assert re.search(told, shown.err), shown.err
    assert "Traceback" not in shown.err
    assert not Path("out", "data").exists()
