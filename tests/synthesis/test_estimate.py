"""The estimate against sums made by hand, and against what a run then really asked for."""

from __future__ import annotations

import json
import os
import re
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from llmemb_ray.config import SynthesizeSettings
from llmemb_ray.errors import ConfigError, RunFailed, RunMismatch, RunStopped
from llmemb_ray.storage import Storage
from llmemb_ray.synthesis.drawing import Draw
from llmemb_ray.synthesis.estimate import STAND_IN, preview
from llmemb_ray.synthesis.families import ASYMMETRIC, WEIGHTS
from llmemb_ray.synthesis.job import synthesize
from llmemb_ray.synthesis.languages import SHARES, count_words
from llmemb_ray.synthesis.lengths import answer_tokens, tokens_per_word
from llmemb_ray.synthesis.prompts import Prompts
from llmemb_ray.synthesis.receipt import Receipt
from llmemb_ray.synthesis.tasks import Pool, Task
from llmemb_ray.synthesis.times import elapsed
from tests.generation.chat_server import ChatServer, Reply, completion
from tests.small_models import config_of, make_model, tokenizer_of

OWN = [Task(family=family, task=f"Find number {number}" + " of them" * number, source="mine") for family in ASYMMETRIC for number in range(5)]


def settings(path: Path, **more: Any) -> SynthesizeSettings:
    """Tasks of one's own, no brainstorming, unless said otherwise."""
    tasks = path / "mine.jsonl"
    tasks.write_bytes(Pool(OWN).to_lines())
    values: dict[str, Any] = {"out": str(path / "out"), "llm": "someone", "tasks": [str(tasks)], "tasks_per_family": 0, "seed": 3}
    chosen = {name: value for name, value in (values | more).items() if value is not None}
    return SynthesizeSettings.make(chosen)


def reply(prompt: str, before: int) -> Reply:
    """A list of tasks, or an example with the keys that the prompt shows, of a length that varies; a token is four characters."""
    if "JSON list" in prompt:
        text = json.dumps([f"Find the {before}-th answer of kind {number} to: {prompt[:40]}" for number in range(20)])
    else:
        keys = dict.fromkeys(re.findall(r'"(\w+)":', prompt))
        text = json.dumps({key: f"{key} " + "word " * (5 + hash_of(prompt + key) % 20) + str(hash_of(prompt)) for key in keys})
    return 200, completion(text, tokens=(round(len(prompt) / 4), round(len(text) / 4)))


def hash_of(text: str) -> int:
    return sum(ord(character) * (place + 1) for place, character in enumerate(text))


def files(path: Path) -> dict[str, tuple[int, int]]:
    return {str(file): (file.stat().st_size, file.stat().st_mtime_ns) for file in path.rglob("*")}


def test_requests_and_prompt_tokens_are_those_of_every_row_drawn(tmp_path: Path) -> None:
    made = preview(settings(tmp_path, count=150))
    draw = Draw(seed=3, families=WEIGHTS, languages=SHARES, pool=Pool(OWN), prompts=Prompts.load(), generator_name="")
    requests = [draw.request(row) for row in range(150)]
    assert {name: part.requests for name, part in made.families.items()} == Counter(request.family for request in requests)
    for name, part in made.families.items():
        assert part.prompt_tokens == pytest.approx(sum(len(request.prompt) for request in requests if request.family == name) / 4)
    assert made.left.requests == made.sample == 150
    assert made.left.prompt_tokens == pytest.approx(sum(len(request.prompt) for request in requests) / 4)
    assert (made.prompt_tokens_margin, made.tasks, made.cost, made.done) == (0, {}, None, 0)
    assert not (tmp_path / "out").exists()


def test_a_sample_stands_for_all_rows(tmp_path: Path) -> None:
    made = preview(settings(tmp_path, count=20_000))
    draw = Draw(seed=3, families=WEIGHTS, languages=SHARES, pool=Pool(OWN), prompts=Prompts.load(), generator_name="")
    total = sum(len(draw.request(row).prompt) for row in range(20_000)) / 4
    assert made.sample == 4000
    assert sum(part.requests for part in made.families.values()) == pytest.approx(20_000, abs=3)
    assert 0 < made.prompt_tokens_margin < 0.02 * total
    assert made.left.prompt_tokens == pytest.approx(total, abs=2 * made.prompt_tokens_margin)


def test_answers_have_the_words_that_their_unit_usually_has(tmp_path: Path) -> None:
    """English sts: S1 to S3 are sentences of 15 words (6 to 60), phrases of 6.25 (2.5 to 25) or passages of 62.5 (25 to 250), 16 characters a word at most."""
    chosen = settings(tmp_path, count=80, families={"sts": 1}, languages={"en": 1})
    made = preview(chosen)
    draw = Draw(seed=3, families={"sts": 1}, languages={"en": 1}, pool=Pool(), prompts=Prompts.load(), generator_name="")
    units = Counter(draw.request(row).placeholders["unit"] for row in range(80))
    skeleton = 80 * len('{"S1": "", "S2": "", "S3": ""}') / 4
    longest = {"sentence": 60, "phrase": 25, "passage": 250}
    words = 3 * sum(count * longest[unit] for unit, count in units.items())
    assert made.left.answer_tokens.least == pytest.approx(skeleton + words / 10 * 1.36)
    assert made.left.answer_tokens.expected == pytest.approx(skeleton + words / 4 * 1.36)
    limits = {unit: min(2048, len('{"S1": "", "S2": "", "S3": ""}') / 4 + 3 * most * 16 / 6 * 1.36) for unit, most in longest.items()}
    assert made.left.answer_tokens.most == pytest.approx(sum(count * limits[unit] for unit, count in units.items()))


def test_a_rule_says_the_words_and_a_language_their_tokens() -> None:
    draw = Draw(seed=3, families={"short-long": 1, "bitext": 1}, languages={"hi": 1, "en": 1}, pool=Pool(OWN), prompts=Prompts.load(), generator_name="")
    hindi = (1.36 * 5.6) ** 0.5
    of_query = {"less than 5 words": 2.5, "5 to 15 words": 10, "at least 10 words": 12}
    for request in map(draw.request, range(60)):
        found = answer_tokens(request, skeleton=0, max_characters=16_000)
        each = {"en": 1.36, "hi": hindi}
        if request.family == "bitext":
            words = {"sentence": 15, "phrase": 6.25, "passage": 62.5}[request.placeholders["unit"]]
            assert found.expected == pytest.approx(words * (each[request.language] + 2 * each[str(request.target)]))
        else:
            words = of_query[request.placeholders["query_length"]] + 2 * 1.2 * int(request.placeholders["num_words"])
            assert found.expected == pytest.approx(words * each[request.language])
        assert found.least < found.expected < found.most


def test_tokens_of_a_word_are_as_measured(data: Path, real_models: Path) -> None:
    """Of scripts that one of the languages is written in."""
    import sentencepiece

    if not (data / "tatoeba").is_dir():
        pytest.skip(f"no Tatoeba sentences at {data / 'tatoeba'}; set LLMEMB_DATA")
    mistral = sentencepiece.SentencePieceProcessor(model_file=str(real_models / "mistral_tokenizer" / "tokenizer.model.v1"))
    for code, theirs in {"en": "deu-eng.eng", "el": "ell-eng.ell", "ko": "kor-eng.kor", "th": "tha-eng.tha", "ta": "tam-eng.tam"}.items():
        lines = (data / "tatoeba" / f"tatoeba.{theirs}").read_text(encoding="utf-8").splitlines()[:300]
        tokens = sum(map(len, mistral.encode(lines)))
        assert tokens / sum(count_words(line, code) for line in lines) == pytest.approx(tokens_per_word(code).most, rel=0.03)


def test_brainstorming_is_asked_for_what_is_missing(tmp_path: Path) -> None:
    """50 tasks are 3 answers of 20; in place of tasks that are not there stands one of usual length."""
    made = preview(settings(tmp_path, tasks=[], tasks_per_family=50, count=30, families={"long-long": 1, "sts": 2}))
    prompts = Prompts.load()
    assert list(made.tasks) == ["long-long"]
    assert made.tasks["long-long"].requests == 3
    assert made.tasks["long-long"].prompt_tokens == 3 * len(prompts.brainstorm["long-long"]) / 4
    assert made.tasks["long-long"].answer_tokens.expected == pytest.approx(3 * 20 * (18 * 1.36 + 3))
    assert made.left.requests == 33
    draw = Draw(
        seed=3, families={"long-long": 1}, languages=SHARES, pool=Pool([Task(family="long-long", task=STAND_IN, source="")]), prompts=prompts, generator_name=""
    )
    alone = preview(settings(tmp_path, tasks=[], tasks_per_family=50, count=30, families={"long-long": 1}))
    assert alone.families["long-long"].prompt_tokens == pytest.approx(sum(len(draw.request(row).prompt) for row in range(30)) / 4)
    assert any("stands in" in line for line in alone.assumptions)
    lacking = tmp_path / "lacking.jsonl"
    lacking.write_text('{"family": "short-long", "task": "Find it."}\n')
    with pytest.raises(ConfigError, match="pool has none of family long-short"):
        preview(settings(tmp_path, tasks=[str(lacking)]))


def test_costs_and_what_a_budget_pays(tmp_path: Path) -> None:
    asks = {"count": 200, "price_in": 2.0, "price_out": 10.0}
    made = preview(settings(tmp_path, **asks))
    assert made.cost is not None
    for place in range(3):
        assert made.cost[place] == pytest.approx(2e-6 * made.left.prompt_tokens + 1e-5 * made.left.answer_tokens[place])
    scant = preview(settings(tmp_path, **asks, budget=made.cost.expected / 2))
    assert scant.affordable is not None
    assert scant.enough is False
    assert scant.affordable.expected == 99 or scant.affordable.expected == 100
    assert scant.affordable.least == int(200 * made.cost.expected / 2 / made.cost.most)
    ample = preview(settings(tmp_path, **asks, budget=made.cost.most * 1.001))
    assert (ample.enough, ample.affordable) == (True, (200, 200, 200))


@pytest.mark.parametrize(
    ("limits", "seconds", "binds"),
    [
        # 1,000 answers of 100 tokens, 10 at once: 100 each, of 1 or 5 s and half a second to begin.
        ({"concurrency": 10}, (150.0, 550.0), ("concurrency", "concurrency")),
        ({"concurrency": 500, "requests_per_minute": 50}, (19 * 60.0, 19 * 60.0), ("requests_per_minute", "requests_per_minute")),
        ({"concurrency": 500, "tokens_per_minute": 30_000}, (9 * 60.0, 9 * 60.0), ("tokens_per_minute", "tokens_per_minute")),
        ({"concurrency": 10, "requests_per_minute": 200, "tokens_per_minute": 100_000}, (240.0, 550.0), ("requests_per_minute", "concurrency")),
        ({"concurrency": 10, "requests_per_minute": 5000}, (150.0, 550.0), ("concurrency", "concurrency")),
    ],
)
def test_the_tightest_limit_decides_the_time(tmp_path: Path, limits: dict[str, int], seconds: tuple[float, float], binds: tuple[str, str]) -> None:
    made = elapsed(settings(tmp_path, **limits), requests=1000, prompt_tokens=200_000, answer_tokens=100_000)
    assert made.seconds == pytest.approx(seconds)
    assert made.binds == binds


def test_the_estimate_of_prompts_is_what_a_run_then_asks_for_and_a_pilot_tells_the_rest(tmp_path: Path) -> None:
    with ChatServer(reply) as server:
        common: dict[str, Any] = {"base_url": server.url, "tasks": [], "tasks_per_family": 20, "unit_rows": 25, "check_language": False}
        common |= {"price_in": 1.0, "price_out": 4.0}
        ahead = preview(settings(tmp_path, count=120, **common))
        pilot = synthesize(settings(tmp_path, count=60, **common), quiet=True)
        assert isinstance(pilot, Receipt)
        before = files(tmp_path / "out")
        more = preview(settings(tmp_path, count=240, **common))
        assert files(tmp_path / "out") == before, "a plan writes nothing"
        assert (more.examples, more.done, more.left.requests, more.measured) == (240, 60, 180, 60)
        assert more.tasks == {}
        assert more.left.prompt_tokens == pytest.approx(3 * pilot.prompt_tokens)
        assert more.left.answer_tokens.expected == pytest.approx(3 * pilot.completion_tokens)
        assert more.left.answer_tokens.most == pytest.approx(3 * pilot.completion_tokens * (1 + 2 / 60**0.5))
        assert sum(part.answer_tokens.most for part in more.families.values()) == pytest.approx(more.left.answer_tokens.most)
        assert all(part.answer_tokens.least < part.answer_tokens.expected < part.answer_tokens.most for part in more.families.values())
        assert f"{pilot.accepted} of the 60 examples committed were accepted" in more.notes[0]
        assert more.spent == pytest.approx(pilot.cost)
        assert more.time is not None
        assert more.time.binds == ("the speed so far",) * 2
        slowed = preview(settings(tmp_path, count=240, requests_per_minute=60, **common))
        assert slowed.time is not None
        assert (slowed.time.seconds, slowed.time.binds[0]) == ((120, 120), "requests_per_minute")

        with pytest.raises(RunMismatch, match="seed"):
            preview(settings(tmp_path, count=240, **common | {"seed": 4}))
        anew = preview(settings(tmp_path, count=240, overwrite=True, **common))
        assert (anew.done, anew.spent_tokens, anew.measured) == (0, (0, 0), 0)

        done = synthesize(settings(tmp_path, count=240, **common), quiet=True)
        assert isinstance(done, Receipt)
        asked_then = done.prompt_tokens - pilot.prompt_tokens, done.completion_tokens - pilot.completion_tokens
        assert more.left.prompt_tokens == pytest.approx(asked_then[0], rel=0.05)
        assert more.left.answer_tokens.expected == pytest.approx(asked_then[1], rel=0.05)
        assert ahead.left.prompt_tokens == pytest.approx((done.prompt_tokens + 2 * done.task_prompt_tokens) / 2, rel=0.03)
        over = preview(settings(tmp_path, count=240, **common))
        assert (over.left.requests, over.done, over.time, over.cost) == (0, 240, None, (0, 0, 0))
        assert over.spent == pytest.approx(done.cost)


def test_answers_that_are_kept_are_not_reckoned_as_left(tmp_path: Path) -> None:
    """A budget ends the run in its first unit: no commit, but what was answered is paid."""
    with ChatServer(reply) as server:
        chosen = settings(
            tmp_path, base_url=server.url, count=300, price_in=1.0, price_out=1.0, budget=0.02, unit_rows=300, concurrency=2, check_language=False
        )
        with pytest.raises(RunStopped):
            synthesize(chosen, quiet=True)
        answered = server.asked.total()
        (kept,) = (tmp_path / "out" / "_llmemb" / "answers").iterdir()
        with kept.open("ab") as file:
            file.write(b'{"asked": "some')  # A job is writing at this moment.
        before = files(tmp_path / "out")
        made = preview(chosen)
        assert files(tmp_path / "out") == before
    assert 0 < answered == made.done == made.measured
    assert made.left.requests == 300 - answered
    spent = sum(made.spent_tokens)
    assert made.spent == pytest.approx(spent / 1e6)
    assert made.left.prompt_tokens + made.left.answer_tokens.expected == pytest.approx(spent / answered * (300 - answered))
    assert made.affordable is not None
    assert made.enough is False
    assert made.affordable.most < 5


def test_a_loaded_model_counts_with_its_own_tokenizer(tmp_path: Path) -> None:
    model = make_model(tmp_path / "model", head=True, max_position_embeddings=4096)
    asks: dict[str, Any] = {"llm": None, "model": str(model), "actors": "0", "count": 24, "max_new_tokens": 4, "structured": "none"}
    made = preview(settings(tmp_path, **asks))
    with pytest.raises(RunFailed, match=r"none of 24 answers became an example \(24 cut\): look at .*rejects"):
        synthesize(settings(tmp_path, **asks), quiet=True)
    receipt = Receipt.load(Storage(str(tmp_path / "out")))
    assert receipt is not None
    assert made.left.prompt_tokens == receipt.prompt_tokens > 24 * 100
    assert made.left.answer_tokens.most <= 24 * 4
    assert any("cut" in note for note in made.notes)
    cramped = preview(settings(tmp_path, **asks | {"out": str(tmp_path / "other"), "max_new_tokens": 4000}))
    assert any("4,096 positions" in note for note in cramped.notes)
    gone = preview(settings(tmp_path, **asks | {"model": str(tmp_path / "gone"), "out": str(tmp_path / "other")}))
    assert gone.counted_by == "characters over 4"
    assert any("no such directory" in note for note in gone.notes)
    resumed = preview(settings(tmp_path, **asks | {"model": str(tmp_path / "gone"), "count": 36}))
    assert (resumed.done, resumed.left.requests) == (24, 12)
    assert resumed.left.prompt_tokens == pytest.approx(receipt.prompt_tokens / 2)


def test_one_answer_at_a_time_is_bound_by_reading_the_weights(tmp_path: Path) -> None:
    """A model of 7 billion parameters in bfloat16: an H100 reads its 13.5 GB at 40 to 80% of 3.35 TB/s for each token."""
    tokenizer_of().save_pretrained(tmp_path / "large")
    config_of("llama", 32_000, hidden_size=4096, num_hidden_layers=32, num_attention_heads=32, num_key_value_heads=32, intermediate_size=11008).save_pretrained(
        tmp_path / "large"
    )
    (tmp_path / "large" / "model.safetensors").write_bytes(b"never read")
    asks: dict[str, Any] = {"llm": None, "model": str(tmp_path / "large"), "families": {"short-long": 1}, "languages": {"en": 1}}
    lines = {line.gpu: line for line in preview(settings(tmp_path, **asks, count=1)).gpus}
    assert lines["H100"].batch == 1
    assert lines["H100"].tokens_per_s[1] == pytest.approx(0.8 * 3350 / 13.5, rel=0.05)
    assert lines["H100"].tokens_per_s[0] == pytest.approx(0.4 * 3350 / 13.5, rel=0.05)
    many = {line.gpu: line for line in preview(settings(tmp_path, **asks, count=300)).gpus}
    assert many["H100"].batch > many["L4"].batch > 1, "caches share the memory that the weights leave"
    assert 10 < many["H100"].tokens_per_s[1] / lines["H100"].tokens_per_s[1] < many["H100"].batch
    assert many["H100"].cost[0] == pytest.approx(many["H100"].gpu_hours[0] * many["H100"].price)


def test_the_command_and_a_corpus_of_that_name(tmp_path: Path, corpus: Path, model: Path, llmemb: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    chosen = settings(tmp_path, count=5, price_in=1.0, price_out=1.0)
    arguments = ["--out", chosen.out, "--llm", "someone", "--tasks", chosen.tasks[0], "--tasks-per-family", 0, "--seed", 3, "--count", 5]
    shown = llmemb("plan", "synthesize", *arguments, "--price-in", 1, "--price-out", 1, "--json")
    assert {**json.loads(shown.out), "created": 0} == {**preview(chosen).to_dict(), "created": 0}
    told = llmemb("plan", "synthesize", *arguments, "--price-in", 1, "--price-out", 1)
    assert told.code == 0
    assert "bound by concurrency" in told.out
    assert re.search(r"^all +5 ", told.out, re.MULTILINE)
    monkeypatch.chdir(tmp_path)
    os.rename(corpus, tmp_path / "synthesize")
    assert json.loads(llmemb("plan", "./synthesize", "out", "--model", model, "--json").out)["rows"] == 120
    assert "plan synthesize" in llmemb("plan", "--help").out
