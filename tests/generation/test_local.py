"""A model's own generation, against a loop of forward passes; and the same on actors."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from llmemb_ray.config import ClusterSettings
from llmemb_ray.embedders import models
from llmemb_ray.errors import ConfigError, ModelError
from llmemb_ray.generation.generator import Prompt
from llmemb_ray.generation.local import LocalGenerator, LocalSpec
from tests.small_models import SENTENCES, make_model, tokenizer_of


def bytewise_tokenizer() -> Any:
    from tokenizers import decoders

    tokenizer = tokenizer_of()
    tokenizer.backend_tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


TEMPLATE = "{% for message in messages %}[{{ message.role }}]{{ message.content }}{% endfor %}{% if add_generation_prompt %}[assistant]{% endif %}"


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model(tmp_path_factory.mktemp("plain"), head=True)


@pytest.fixture(scope="module")
def chat(tmp_path_factory: pytest.TempPathFactory) -> Path:
    tokenizer = tokenizer_of()
    tokenizer.chat_template = TEMPLATE
    return make_model(tmp_path_factory.mktemp("chat"), tokenizer=tokenizer, head=True)


def asked(texts: list[str]) -> list[Prompt]:
    return [Prompt(text=text) for text in texts]


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
    answers = dict(generator.generate(asked(SENTENCES)))
    assert [answers[number].text for number in range(len(SENTENCES))] == [greedy(plain, text, 6, special=True) for text in SENTENCES]
    assert all(answer.continues and answer.completion_tokens <= 6 for answer in answers.values())
    assert len({answer.text for answer in answers.values()}) > 1


def test_a_chat_model_is_asked_through_its_template(chat: Path) -> None:
    [(_, answer)] = LocalGenerator(spec(chat)).generate(asked([SENTENCES[0]]))
    assert answer.text == greedy(chat, f"[user]{SENTENCES[0]}[assistant]", 6, special=False)
    assert not answer.continues
    [(_, continued)] = LocalGenerator(spec(chat, asking="plain")).generate(asked([SENTENCES[0]]))
    assert continued.continues
    assert continued.prompt_tokens < answer.prompt_tokens


def test_a_prompt_beyond_the_model_s_positions_is_refused_and_the_others_go_on(plain: Path) -> None:
    answers = dict(LocalGenerator(spec(plain)).generate(asked(["x " * 300, "x"])))
    assert "256 positions" in str(answers[0].problem)
    assert not answers[0].passing
    assert answers[1].text is not None


def test_a_model_that_cannot_be_asked_is_refused(plain: Path, model: Path) -> None:
    with pytest.raises(ConfigError, match="no chat template"):
        LocalGenerator(spec(plain, asking="chat"))
    with pytest.raises(ModelError, match="lm_head"):
        LocalGenerator(spec(model))


SCHEMA = {
    "type": "object",
    "properties": {"text": {"type": "string", "minLength": 1, "maxLength": 12}, "label": {"enum": ["yes", "no"]}},
    "required": ["text", "label"],
    "additionalProperties": False,
}


@pytest.fixture(scope="module")
def bytewise(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model whose tokenizer says that its tokens are of bytes, which a grammar must know."""
    return make_model(tmp_path_factory.mktemp("bytewise"), tokenizer=bytewise_tokenizer(), head=True)


def test_a_sampled_answer_depends_on_its_own_seed_and_schema_and_not_on_the_batch(bytewise: Path) -> None:
    generator = LocalGenerator(spec(bytewise, temperature=0.7, top_p=0.95, max_new_tokens=40, structured="json_schema"))
    prompts = [Prompt(text=text, schema=SCHEMA if number % 2 else None, seed=number // 2) for number, text in enumerate(SENTENCES)]
    prompts.append(Prompt(text=SENTENCES[1], schema=SCHEMA, seed=99, max_new_tokens=3))
    together = dict(generator.generate(prompts))
    for number in (0, 1, 5, 8):
        assert dict(generator.generate([prompts[number]]))[0] == together[number]
    made = [json.loads(str(together[number].text)) for number in range(1, len(SENTENCES), 2)]
    assert all(set(one) == {"text", "label"} and 1 <= len(one["text"]) <= 12 and one["label"] in ("yes", "no") for one in made)
    assert len({one["text"] for one in made}) == len(made)
    assert not any(together[number].cut for number in range(1, len(SENTENCES), 2))
    assert (together[len(SENTENCES)].completion_tokens, together[len(SENTENCES)].cut) == (3, True)
    unseeded = [answer.text for _, answer in generator.generate([Prompt(text="x")] * 4)]
    assert len(set(unseeded)) == 4


def test_json_object_holds_an_answer_to_some_object_and_none_to_nothing(bytewise: Path) -> None:
    prompt = Prompt(text=SENTENCES[0], schema=SCHEMA, seed=3)
    [(_, some)] = LocalGenerator(spec(bytewise, temperature=1.0, structured="json_object")).generate([prompt])
    [(_, free)] = LocalGenerator(spec(bytewise, temperature=1.0, structured="none")).generate([prompt])
    assert str(some.text).startswith("{")
    assert not str(free.text).startswith("{")


def test_what_cannot_be_held_to_a_schema_is_refused(plain: Path, bytewise: Path, real_models: Path) -> None:
    with pytest.raises(ConfigError, match="structured: the model's tokenizer"):
        list(LocalGenerator(spec(plain, structured="json_schema")).generate([Prompt(text="x", schema=SCHEMA)]))
    with pytest.raises(ConfigError, match="structured: the JSON schema"):
        list(LocalGenerator(spec(bytewise, structured="json_schema")).generate([Prompt(text="x", schema={"type": "sentence"})]))
    with pytest.raises(ConfigError, match="no token that its JSON could begin with"):  # Its vocabulary has no brace.
        list(LocalGenerator(spec(real_models / "TinyStories-656K", structured="json_object")).generate([Prompt(text="x", schema=SCHEMA)]))


def test_tokens_are_drawn_with_the_probabilities_of_temperature_and_nucleus() -> None:
    """Logits log 8, log 4, log 2, log 1 at temperature 1/2 are odds 64 : 16 : 4 : 1; the first two hold 80/85 of them."""
    import torch

    from llmemb_ray.generation.sampling import RowSampling

    draws = 4000
    logits = torch.tensor([8.0, 4.0, 2.0, 1.0]).log().expand(draws, 4)
    prompts = [Prompt(text="", seed=seed) for seed in range(draws)]
    for top_p, odds in ((1.0, [64, 16, 4, 1]), (0.9, [64, 16, 0, 0]), (0.7, [1, 0, 0, 0])):
        sampling = RowSampling(prompts, [], prompt_length=1, temperature=0.5, top_p=top_p)
        drawn = torch.bincount(sampling(torch.zeros(draws, 1), logits).argmax(-1), minlength=4) / draws
        expected = torch.tensor(odds) / sum(odds)
        assert ((drawn - expected).abs() <= 4 * (expected * (1 - expected) / draws).sqrt()).all(), (top_p, drawn)


def test_actors_give_the_same_answers(plain: Path) -> None:
    """What is wrong with loading, or kills an actor, is tried in tests/pipeline/test_pool.py."""
    from llmemb_ray.generation.actors import on_cluster

    prompts = SENTENCES * 3  # Three chunks.
    settings = ClusterSettings(model=str(plain), actors="1", cpus_per_actor=1, ray_address="local")
    with on_cluster(spec(plain), settings) as generator:
        answers = dict(generator.generate(asked(prompts)))
    assert [answers[number].text for number in range(len(prompts))] == [greedy(plain, text, 6, special=True) for text in SENTENCES] * 3
