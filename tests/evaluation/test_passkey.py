"""Documents have the length they are named by in the model's own tokens, hold one fact each, and depend on the seed alone."""

from __future__ import annotations

import re
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from llmemb_ray.config import EvaluateSettings
from llmemb_ray.embedders import models, settle
from llmemb_ray.errors import ConfigError
from llmemb_ray.evaluation.data import DataPlace
from llmemb_ray.evaluation.passkey import SUITE, PasskeyTask
from llmemb_ray.evaluation.suite import Building, Task, Texts
from llmemb_ray.representation import Form, Prompter, Representation
from tests.small_models import make_model

FACT = re.compile(r"(?P<name>[A-Z]\w+ [A-Z]\w+)'s pass key is (?P<key>\d{4,5})\. Remember it\. (?P=key) is the pass key for (?P=name)\.")
FILLER = "The grass is green. The sky is blue. The sun is yellow. Here we go. There and back again. "


load_tokenizer = cache(models.load_tokenizer)


def task_of(tokenizer: Path, length: int, *, seed: int = 7, template: str = "{text}", eos: bool = False) -> PasskeyTask:
    source = load_tokenizer(tokenizer)
    representation = Representation(document=Form(template=template), append_eos=eos, max_tokens=length)
    prompter = Prompter(representation, "document", tokenizer_json=source.json, eos_id=source.eos_id)
    return PasskeyTask(name=str(length), length=length, seed=seed, prompter=prompter)


def texts_of(task: Task) -> tuple[list[str], list[str]]:
    documents, queries = task.needs()
    assert isinstance(documents, Texts)
    assert isinstance(queries, Texts)
    assert (documents.role, documents.instruction, queries.role) == ("document", None, "query")
    assert queries.instruction
    return list(documents.texts), list(queries.texts)


@pytest.mark.parametrize(
    ("kind", "length", "template", "eos"),
    [
        ("tinystories", 256, "{text}", False),
        ("gpt2", 1100, 'This sentence : "{text}" means in one word:"', False),
        ("opt", 333, "{text}", False),
        ("llama2", 512, "{text}", True),
        ("mistral", 2048, "About: {text}", True),
    ],
)
def test_a_prompt_has_the_tokens_that_its_length_says(kind: str, length: int, template: str, eos: bool, tokenizers: dict[str, Path]) -> None:
    from transformers import AutoTokenizer

    task = task_of(tokenizers[kind], length, template=template, eos=eos)
    documents, _ = texts_of(task)
    tokenizer = AutoTokenizer.from_pretrained(tokenizers[kind])
    tokens = [len(tokenizer(template.replace("{text}", text)).input_ids) + eos for text in documents]
    sentence = max(len(tokenizer(" " + text, add_special_tokens=False).input_ids) for text in FILLER.split(". "))
    assert max(tokens) <= length
    assert min(tokens) > length - sentence - 2
    parts = task.score([np.eye(100, dtype=np.float32), np.eye(100, dtype=np.float32)[:50]]).parts
    assert (parts["tokens_most"], parts["tokens_mean"]) == (max(tokens), pytest.approx(np.mean(tokens)))


def test_each_document_holds_one_fact_of_its_own_somewhere_in_filler(tokenizers: dict[str, Path]) -> None:
    documents, queries = texts_of(task_of(tokenizers["gpt2"], 512))
    facts = [FACT.findall(text) for text in documents]
    assert [len(found) for found in facts] == [1] * 100
    names, keys = zip(*(found[0] for found in facts), strict=True)
    assert len(set(names)) == len(set(keys)) == 100
    for text in documents:
        assert (FILLER * 100).startswith(FACT.sub("", text).replace("  ", " ").strip())
    places = np.array([text.index("pass key") / len(text) for text in documents])
    assert np.histogram(places, 4, (0, 1))[0].min() > 10, "anywhere in the document"
    asked = [re.fullmatch(r"what is the pass key for (.*)\?", query)[1] for query in queries]  # type: ignore[index]
    assert len(set(asked)) == 50
    assert set(asked) <= set(names)


def test_facts_depend_on_seed_and_length_and_not_on_the_model(tokenizers: dict[str, Path]) -> None:
    def facts(kind: str, length: int, **options: Any) -> tuple[list[Any], list[str]]:
        documents, queries = texts_of(task_of(tokenizers[kind], length, **options))
        return [FACT.findall(text) for text in documents], queries

    made = facts("gpt2", 300)
    assert facts("tinystories", 300) == made
    assert facts("gpt2", 300, seed=8)[0] != made[0]
    assert facts("gpt2", 301)[0] != made[0]


def test_the_score_is_the_share_of_queries_nearest_to_their_document(tokenizers: dict[str, Path]) -> None:
    task = task_of(tokenizers["gpt2"], 512)
    documents, queries = texts_of(task)
    names = [FACT.search(text)["name"] for text in documents]  # type: ignore[index]
    answers = [names.index(query.removeprefix("what is the pass key for ").removesuffix("?")) for query in queries]
    vectors = np.eye(100, dtype=np.float32) * np.arange(1, 101, dtype=np.float32)[:, None]
    assert task.score([vectors, vectors[answers] * 3]).main == 100
    early = [documents[row].index("pass key") < 0.15 * len(documents[row]) for row in answers]
    assert 0 < sum(early) < 50
    wrong = [row if found else (row + 1) % 100 for row, found in zip(answers, early, strict=True)]
    score = task.score([vectors, vectors[wrong]])
    assert score.main == 2 * sum(early)
    assert score.parts["by_depth"][0] > 50
    assert score.parts["by_depth"][2:] == [0, 0, 0]


def build_tasks(model: Path, *wanted: str, **settings: Any) -> list[Task]:
    made = EvaluateSettings.make({"model": str(model), "suite": ["passkey"], **settings})
    building = Building(settings=made, data=DataPlace(Path()), spec=settle(made), wanted=wanted, scratch="", on_cluster=False)
    tasks = SUITE.build(building)
    for task in tasks:
        task.needs()
    return tasks


def build(model: Path, *wanted: str, **settings: Any) -> list[str]:
    return [task.name for task in build_tasks(model, *wanted, **settings)]


def test_lengths_are_those_that_the_model_has_room_for(model: Path, tmp_path: Path) -> None:
    assert build(model) == ["256"]
    assert build(model, max_tokens=2100, rope_theta=1e5) == ["256", "512", "1k", "2k"]
    assert build(model, "1024", "256", max_tokens=2100, rope_theta=1e5) == ["256", "1k"]
    assert build(model, lengths=[200, 256]) == ["200", "256"]
    with pytest.raises(ConfigError, match=r"passkey:1k has prompts of 1024 tokens, max_tokens is 256; raise max_tokens .*rope_theta"):
        build(model, lengths=[256, 1024])
    with pytest.raises(ConfigError, match="passkey:8k"):
        build(model, "8k")
    with pytest.raises(ConfigError, match=r"passkey:300 is none of the lengths 256, .* --lengths 300"):
        build(model, "300")
    with pytest.raises(ConfigError, match="lengths: 40 is too short for a passkey"):
        build(model, lengths=[40])
    with pytest.raises(ConfigError, match="passkey:256"):
        build(make_model(tmp_path, max_position_embeddings=128))


def test_lengths_without_room_are_told_in_the_parts(model: Path) -> None:
    vectors = [np.eye(100, dtype=np.float32), np.eye(100, dtype=np.float32)[:50]]
    (task,) = build_tasks(model)
    told = task.score(vectors).parts["left_out"]
    assert told.startswith("512, 1k, 2k, 4k, 8k, 16k, 32k: longer than max_tokens 256; ")
    assert "--max-tokens" in told
    assert "--rope-theta" in told
    (task,) = build_tasks(model, "256")
    assert "left_out" not in task.score(vectors).parts


def test_documents_go_without_the_users_instruction(model: Path) -> None:
    """And have the length of their name in plain prompts."""
    (bare,) = build_tasks(model, "256", prompt="e5")
    (instructed,) = build_tasks(model, "256", prompt="e5", instruction="Find the document that states the pass key of a person")
    assert instructed.needs() == bare.needs()
    documents = instructed.needs()[0]
    assert isinstance(documents, Texts)
    assert documents.plain
