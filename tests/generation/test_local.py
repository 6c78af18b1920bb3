"""A model's own generation, against a loop of forward passes; and the same on actors."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from llmemb_ray.config import ClusterSettings
from llmemb_ray.embedders import models
from llmemb_ray.errors import ConfigError, ModelError
from llmemb_ray.generation.local import LocalGenerator, LocalSpec
from tests.small_models import SENTENCES, make_model, tokenizer_of

TEMPLATE = "{% for message in messages %}[{{ message.role }}]{{ message.content }}{% endfor %}{% if add_generation_prompt %}[assistant]{% endif %}"


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model(tmp_path_factory.mktemp("plain"), head=True)


@pytest.fixture(scope="module")
def chat(tmp_path_factory: pytest.TempPathFactory) -> Path:
    tokenizer = tokenizer_of()
    tokenizer.chat_template = TEMPLATE
    return make_model(tmp_path_factory.mktemp("chat"), tokenizer=tokenizer, head=True)


def spec(path: Path, **changes: Any) -> LocalSpec:
    values: dict[str, Any] = {"source": models.resolve(str(path)), "max_new_tokens": 6, "compute_dtype": "float32"}
    return LocalSpec(**values | changes)


def test_the_name_tells_the_precision_that_the_device_gives(plain: Path) -> None:
    import torch

    names = {dtype: spec(plain, compute_dtype=dtype).name for dtype in ("auto", "float32", "bfloat16")}
    assert names["float32"] != names["bfloat16"]
    assert names["auto"] == names["bfloat16" if torch.cuda.is_available() else "float32"]


def greedy(path: Path, text: str, new: int, *, special: bool) -> str:
    """The most likely token, again and again: one prompt, no cache, no padding."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer, model = AutoTokenizer.from_pretrained(path), AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
    ids = tokenizer(text, add_special_tokens=special)["input_ids"]
    made: list[int] = []
    while len(made) < new:
        token = int(model(torch.tensor([ids + made])).logits[0, -1].argmax())
        if token == tokenizer.eos_token_id:
            break
        made.append(token)
    return str(tokenizer.decode(made, skip_special_tokens=True))


def test_a_base_model_goes_on_greedily_whatever_it_is_batched_with(plain: Path) -> None:
    generator = LocalGenerator(spec(plain))
    answers = dict(generator.generate(SENTENCES))
    assert [answers[number].text for number in range(len(SENTENCES))] == [greedy(plain, text, 6, special=True) for text in SENTENCES]
    assert all(answer.continues and answer.completion_tokens <= 6 for answer in answers.values())
    assert len({answer.text for answer in answers.values()}) > 1


def test_a_chat_model_is_asked_through_its_template(chat: Path) -> None:
    [(_, answer)] = LocalGenerator(spec(chat)).generate([SENTENCES[0]])
    assert answer.text == greedy(chat, f"[user]{SENTENCES[0]}[assistant]", 6, special=False)
    assert not answer.continues
    [(_, continued)] = LocalGenerator(spec(chat, asking="plain")).generate([SENTENCES[0]])
    assert continued.continues
    assert continued.prompt_tokens < answer.prompt_tokens


def test_a_prompt_beyond_the_model_s_positions_is_refused_and_the_others_go_on(plain: Path) -> None:
    answers = dict(LocalGenerator(spec(plain)).generate(["x " * 300, "x"]))
    assert "256 positions" in str(answers[0].problem)
    assert not answers[0].passing
    assert answers[1].text is not None


def test_a_model_that_cannot_be_asked_is_refused(plain: Path, model: Path) -> None:
    with pytest.raises(ConfigError, match="no chat template"):
        LocalGenerator(spec(plain, asking="chat"))
    with pytest.raises(ModelError, match="lm_head"):
        LocalGenerator(spec(model))


def test_actors_give_the_same_answers(plain: Path) -> None:
    """What is wrong with loading, or kills an actor, is tried in tests/pipeline/test_pool.py."""
    from llmemb_ray.generation.actors import on_cluster

    prompts = SENTENCES * 3  # Three chunks.
    settings = ClusterSettings(model=str(plain), actors="1", cpus_per_actor=1, ray_address="local")
    with on_cluster(spec(plain), settings) as generator:
        answers = dict(generator.generate(prompts))
    assert [answers[number].text for number in range(len(prompts))] == [greedy(plain, text, 6, special=True) for text in SENTENCES] * 3
