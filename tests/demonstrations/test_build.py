"""``llmemb demos build`` against a real HTTP server and a real model."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from llmemb_ray.config import DemosBuildSettings
from llmemb_ray.demonstrations.build import Built, build
from llmemb_ray.demonstrations.candidates import read_candidates
from llmemb_ray.errors import ConfigError, InputError, OutputError, RunFailed
from llmemb_ray.generation.answers import Answers
from llmemb_ray.generation.generator import Answer
from tests.generation.chat_server import ChatServer, Reply, completion, fault
from tests.ray_cluster import free_port
from tests.small_models import make_model

ASKED = re.compile(r'This sentence : "Sentence (\d+)\." means in one word:"')


@pytest.fixture(autouse=True)
def no_key(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)


@pytest.fixture
def sentences(tmp_path: Path) -> str:
    path = tmp_path / "sentences.txt"
    path.write_text("".join(f"Sentence {number}.\n" for number in range(30)))
    return str(path)


def words(prompt: str, _: int) -> Reply:
    """'word' with the sentence's number in letters."""
    match = ASKED.fullmatch(prompt)
    assert match, prompt
    return '"word' + "".join(chr(ord("a") + int(digit)) for digit in match[1]) + '".'


def run(out: Path, **values: Any) -> Built:
    return build(DemosBuildSettings.make({"out": str(out)} | values))


def test_the_template_is_asked_and_each_answer_accounted_for(tmp_path: Path, sentences: str) -> None:
    faulty: dict[str, Reply] = {
        "3": "I'm sorry, I cannot do that.",
        "5": (200, completion("Wor", finish="length")),
        "7": (400, fault("content policy")),
        "9": "The answer is: an Apple",
    }

    def reply(prompt: str, before: int) -> Reply:
        match = ASKED.fullmatch(prompt)
        assert match
        return (429, fault("slow down")) if match[1] == "11" and not before else faulty.get(match[1]) or words(prompt, before)

    out = tmp_path / "made" / "demos.jsonl"
    with ChatServer(reply) as server:
        built = run(out, sentences=[sentences], llm="tiny", base_url=server.url)
    assert (built.sentences, built.summed_up, built.candidates, built.asked_now, built.retries) == (30, 27, 27, 30, 1)
    assert built.dropped == {"several words": 1, "cut off": 1, "refused": 1}
    assert built.repairs == {"quotes": 26, "punctuation": 26, "capital": 26, "phrase": 1, "article": 1}
    assert built.prompt_tokens == 29 * 11  # one was refused without usage
    made = {candidate.sentence: candidate for candidate in read_candidates(str(out))}
    assert made["Sentence 14."].word == "Wordbe"
    assert made["Sentence 9."].word == "Apple"
    assert {candidate.source for candidate in made.values()} == {"sentences.txt"}
    rejects = {record["sentence"]: record for record in map(json.loads, (tmp_path / "made" / "demos.jsonl.rejects.jsonl").read_text().splitlines())}
    assert rejects["Sentence 3."] == {
        "sentence": "Sentence 3.",
        "source": "sentences.txt",
        "answer": "I'm sorry, I cannot do that.",
        "reason": "several words",
    }
    assert "content policy" in rejects["Sentence 7."]["reason"]
    assert set(rejects) | set(made) == {f"Sentence {number}." for number in range(30)}


def test_a_killed_build_asks_only_about_what_has_no_answer(tmp_path: Path, sentences: str) -> None:
    out = tmp_path / "demos.jsonl"
    with ChatServer(words, seconds=0.1) as server:
        values = {"out": str(out), "sentences": [sentences], "count": 30, "llm": "tiny", "base_url": server.url, "concurrency": 2}
        code = "import json, sys; from llmemb_ray.config import DemosBuildSettings; from llmemb_ray.demonstrations.build import build; "
        code += "build(DemosBuildSettings.make(json.loads(sys.argv[1])))"
        process = subprocess.Popen([sys.executable, "-c", code, json.dumps(values)], env=os.environ)
        deadline = time.monotonic() + 60
        answers = tmp_path / "demos.jsonl.answers.jsonl"
        while not answers.exists() or answers.read_bytes().count(b"\n") < 8:
            assert process.poll() is None
            assert time.monotonic() < deadline
            time.sleep(0.02)
        process.kill()
        process.wait()
        assert not out.exists()
        kept = answers.read_bytes().count(b"\n")
        answers.write_bytes(answers.read_bytes() + b'{"asked": "tiny at h')  # half a line, as a kill may leave
        built = build(DemosBuildSettings.make(values))
    assert built.asked_now == 30 - kept
    assert built.candidates == 30
    assert all(times <= 2 for times in server.asked.values())
    assert sum(server.asked.values()) <= 30 + 2 + 2 + 1  # under way, answered and not yet taken, and taken and not yet kept, when it was killed
    assert len({json.loads(line)["prompt"] for line in answers.read_text().splitlines()}) == 30


def test_what_passes_is_asked_again_by_the_same_command(tmp_path: Path, sentences: str) -> None:
    out = tmp_path / "demos.jsonl"
    up = False

    def reply(prompt: str, before: int) -> Reply:
        return (503, fault("no room")) if not up and "Sentence 4." in prompt else words(prompt, before)

    with ChatServer(reply) as server:
        values = {"sentences": [sentences], "llm": "tiny", "base_url": server.url, "retries": 0}
        with pytest.raises(RunFailed, match=r"1 of 30 sentences.*no room.*demos\.jsonl\.answers\.jsonl"):
            run(out, **values)
        assert not out.exists()
        up = True
        built = run(out, **values)
    assert (built.asked_now, built.candidates) == (1, 30)


def test_what_was_wrong_for_every_prompt_leaves_nothing_behind(tmp_path: Path, sentences: str) -> None:
    out = tmp_path / "demos.jsonl"
    wrong: tuple[int, Reply] | None = (0, (402, fault("Insufficient balance")))

    def reply(prompt: str, before: int) -> Reply:
        match = ASKED.fullmatch(prompt)
        assert match
        return wrong[1] if wrong and int(match[1]) >= wrong[0] else words(prompt, before)

    with ChatServer(reply) as server:
        values = {"sentences": [sentences], "llm": "tiny", "base_url": server.url}
        with pytest.raises(ConfigError, match="Insufficient balance"):
            run(out, **values)
        wrong = (5, (400, fault("the free tier is used up")))
        with pytest.raises(RunFailed, match="in a row failed"):
            run(out, **values)
        assert not out.exists()
        wrong = None
        built = run(out, **values)
    assert (built.asked_now, built.candidates, built.dropped) == (25, 30, {})


def test_rejects_stand_as_long_as_their_sentence_has_no_word(tmp_path: Path) -> None:
    out, rejects = tmp_path / "demos.jsonl", tmp_path / "demos.jsonl.rejects.jsonl"
    (tmp_path / "a.txt").write_text("Sentence 1.\nSentence 2.\nSentence 3.\n")
    (tmp_path / "b.txt").write_text("Sentence 2.\nSentence 4.\nSentence 5.\n")
    mute = {"1", "2"}

    def reply(prompt: str, before: int) -> Reply:
        match = ASKED.fullmatch(prompt)
        assert match
        return "I cannot say." if match[1] in mute else words(prompt, before)

    def dropped() -> list[str]:
        return [json.loads(line)["sentence"] for line in rejects.read_text().splitlines()]

    with ChatServer(reply) as server:
        values = {"llm": "tiny", "base_url": server.url}
        assert run(out, sentences=[str(tmp_path / "a.txt")], **values).rejects == str(rejects)
        assert dropped() == ["Sentence 1.", "Sentence 2."]
        (tmp_path / "words.tsv").write_text("swiss\trelating to Switzerland\n")
        assert run(out, dictionary=[str(tmp_path / "words.tsv")], append=True).rejects == str(rejects)
        assert dropped() == ["Sentence 1.", "Sentence 2."]
        mute = {"4"}
        built = run(out, sentences=[str(tmp_path / "b.txt")], append=True, max_new_tokens=25, **values)
        assert dropped() == ["Sentence 1.", "Sentence 4."]
        assert (built.dropped, built.summed_up) == ({"several words": 1}, 2)
        run(tmp_path / "demos.json", sentences=[str(tmp_path / "b.txt")], **values | {"max_new_tokens": 26})
        assert dropped() == ["Sentence 1.", "Sentence 4."]
        mute = set()
        built = run(out, sentences=[str(tmp_path / "b.txt")], overwrite=True, max_new_tokens=27, **values)
    assert built.rejects is None
    assert not rejects.exists()


def test_sources_mix_and_pairs_that_are_there_are_left_out(tmp_path: Path, sentences: str) -> None:
    out, dictionary = tmp_path / "demos.jsonl", tmp_path / "words.tsv"
    dictionary.write_text("".join(f"w{chr(97 + number)}\tdefinition {number}\n" for number in range(20)) + "two words\tpassed over\n")
    (tmp_path / "more.txt").write_text("Sentence 1.\nSentence 99.\n")
    with ChatServer(words) as server:
        endpoint = {"llm": "tiny", "base_url": server.url}
        first = run(out, sentences=[sentences], dictionary=[str(dictionary)], dictionary_count=5, count=10, **endpoint)
        assert (first.summed_up, first.definitions, first.candidates, first.passed_over) == (10, 5, 15, 1)
        before = read_candidates(str(out))
        assert [candidate.source for candidate in before] == ["sentences.txt"] * 10 + ["words.tsv"] * 5
        with pytest.raises(OutputError, match="append"):
            run(out, dictionary=[str(dictionary)])
        assert read_candidates(str(out)) == before
        second = run(out, sentences=[sentences, str(tmp_path / "more.txt")], dictionary=[str(dictionary)], append=True, **endpoint)
        assert set(server.asked.values()) == {1}
    assert (second.earlier, second.sentences, second.asked_now, second.definitions) == (15, 31, 21, 20)
    assert second.duplicates == 15
    assert second.candidates == 15 + 31 + 20 - 15
    assert read_candidates(str(out))[:15] == before
    assert run(out, dictionary=[str(dictionary)], overwrite=True).candidates == 20


def test_a_model_of_one_s_own_is_asked_and_not_loaded_where_all_is_answered(tmp_path: Path, sentences: str) -> None:
    model = make_model(tmp_path / "model", head=True)
    values = {"sentences": [sentences], "model": str(model), "actors": 0, "max_new_tokens": 1, "asking": "plain"}
    (tmp_path / "words.tsv").write_text("swiss\trelating to Switzerland\n")
    values["dictionary"] = [str(tmp_path / "words.tsv")]
    built = run(tmp_path / "demos.jsonl", **values)
    assert built.sentences == built.summed_up + sum(built.dropped.values()) == 30
    assert built.candidates == built.summed_up + 1
    assert built.completion_tokens <= 30 < built.prompt_tokens
    nowhere = {"actors": 1, "ray_address": f"127.0.0.1:{free_port()}", "overwrite": True}
    again = run(tmp_path / "demos.jsonl", **values | nowhere)
    assert (again.asked_now, again.summed_up) == (0, built.summed_up)


def test_a_build_whose_answers_are_no_words_fails_with_what_it_has_from_elsewhere_written(tmp_path: Path) -> None:
    out = tmp_path / "demos.jsonl"
    (tmp_path / "words.tsv").write_text("swiss\trelating to Switzerland\n")
    (tmp_path / "s.txt").write_text("Sentence 1.\n")
    with (
        ChatServer(lambda *_: "I cannot say.") as server,
        pytest.raises(RunFailed, match=r"none of 1 answers is one word \(1 several words\).*holds its other 1 candidates"),
    ):
        run(out, dictionary=[str(tmp_path / "words.tsv")], sentences=[str(tmp_path / "s.txt")], llm="tiny", base_url=server.url)
    assert [candidate.word for candidate in read_candidates(str(out))] == ["Swiss"]


def test_a_build_without_one_word_writes_no_candidates(tmp_path: Path, sentences: str) -> None:
    with (
        ChatServer(lambda *_: "I cannot say.") as server,
        pytest.raises(RunFailed, match=r"none of 30 answers is one word \(30 several words\), see .*demos\.jsonl\.rejects\.jsonl; .*is not written"),
    ):
        run(tmp_path / "demos.jsonl", sentences=[sentences], llm="tiny", base_url=server.url)
    assert not (tmp_path / "demos.jsonl").exists()


@pytest.mark.parametrize(
    ("values", "named"),
    [
        ({}, "sentences or dictionary"),
        ({"sentences": ["s.txt"]}, "llm or model"),
        ({"sentences": ["s.txt"], "llm": "a", "model": "b"}, "llm or model"),
        ({"dictionary": ["w.tsv"], "llm": "a"}, "give sentences"),
        ({"sentences": ["s.txt"], "model": "b", "base_url": "http://x"}, "for an endpoint"),
        ({"sentences": ["s.txt"], "llm": "a", "actors": 2}, "model that is loaded"),
        ({"dictionary": ["w.tsv"], "append": True, "overwrite": True}, "append and overwrite"),
        ({"dictionary": ["w.tsv"], "count": 5, "max_new_tokens": 9}, "count, max_new_tokens: .*dictionary alone"),
        ({"dictionary": ["w.tsv"], "data": "d", "sentence_column": "a"}, "data, sentence_column: .*dictionary alone"),
        ({"dictionary": ["w.tsv"], "allow_pickle": True}, "allow_pickle: .*model that is loaded"),
        ({"sentences": ["s.txt"], "llm": "a", "trust_remote_code": True}, "trust_remote_code: .*model that is loaded"),
        ({"sentences": ["s.txt"], "llm": "a", "dictionary_count": 5}, "without a dictionary"),
        ({"sentences": ["stsb-train"], "llm": "a", "sentence_column": "b"}, "sentence_column: is for files with columns, not for stsb-train"),
        ({"sentences": ["s.csv"], "llm": "a", "data": "d"}, "data: only stsb-train"),
    ],
)
def test_settings_that_do_nothing_or_contradict_are_refused(values: dict[str, Any], named: str) -> None:
    with pytest.raises(ConfigError, match=named):
        DemosBuildSettings.make({"out": "demos.jsonl"} | values)


def test_answers_on_an_object_store_are_kept_when_closed() -> None:
    url = "memory://llmemb-demos/kept.answers.jsonl"
    answers = Answers(url)
    answers.add("tiny", "prompt", Answer(text="Wörd", cut=True))
    answers.close()
    again = Answers(url)
    assert again.get("tiny", "prompt") == Answer(text="Wörd", cut=True)
    assert again.get("other", "prompt") is None


def test_a_kept_answer_that_is_damaged_is_named(tmp_path: Path) -> None:
    (tmp_path / "a.answers.jsonl").write_text('{"asked": "x", "prompt": "y", "answer": {"text": "z"}}\n{"asked": 1}\n')
    with pytest.raises(InputError, match=r"a\.answers\.jsonl line 2 is no answer"):
        Answers(str(tmp_path / "a.answers.jsonl"))
