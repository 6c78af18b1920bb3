"""Prompts to a real HTTP server that errs as endpoints do."""

from __future__ import annotations

import itertools
import time
from collections.abc import Iterable, Iterator
from typing import Any

import pytest

from llmemb_ray.errors import ConfigError, RunFailed
from llmemb_ray.generation.endpoint import ALONE, FAILURES_IN_A_ROW, Endpoint
from llmemb_ray.generation.generator import Answer, Prompt
from llmemb_ray.generation.pace import Pace
from tests.generation.chat_server import Broken, ChatServer, Reply, completion, fault
from tests.ray_cluster import free_port

SECRET = "sk-very-secret"


@pytest.fixture(autouse=True)
def key(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", SECRET)
    monkeypatch.delenv("OPENAI_BASE_URL", raising=False)


def asked(texts: Iterable[str]) -> Iterator[Prompt]:
    return (Prompt(text=text) for text in texts)


def test_each_prompt_is_answered_once_under_its_number_several_at_a_time() -> None:
    with ChatServer(lambda prompt, _: prompt.upper(), seconds=0.05) as server:
        prompts = [f"prompt {number}" for number in range(13)]
        answers = dict(Endpoint("tiny", base_url=server.url, concurrency=4).generate(asked(prompts)))
    assert [answers[number].text for number in range(13)] == [prompt.upper() for prompt in prompts]
    assert set(server.asked.values()) == {1}
    assert server.busiest == 4
    assert sum(answer.prompt_tokens for answer in answers.values()) == 13 * 11


def test_a_request_holds_model_message_and_settings_and_the_key_only_in_its_header() -> None:
    with ChatServer(lambda *_: "Word") as server:
        endpoint = Endpoint("tiny", base_url=server.url, temperature=0.5, max_new_tokens=7)
        list(endpoint.generate(asked(["hello"])))
        list(Endpoint("tiny", base_url=server.url, temperature=None).generate(asked(["hello"])))
    (headers, body), (_, second) = server.requests
    assert body == {"path": "/v1/chat/completions", "model": "tiny", "messages": [{"role": "user", "content": "hello"}], "temperature": 0.5, "max_tokens": 7}
    assert headers["authorization"] == f"Bearer {SECRET}"
    assert "temperature" not in second
    assert SECRET not in endpoint.name


def test_overload_is_tried_again_and_counted() -> None:
    with ChatServer(lambda _, before: "Word" if before == 2 else (429 if before else 503, fault("busy"))) as server:
        [(_, answer)] = Endpoint("tiny", base_url=server.url).generate(asked(["hello"]))
    assert (answer.text, answer.retries) == ("Word", 2)


def test_what_stays_is_told_apart_from_what_passes() -> None:
    replies: dict[str, Reply] = {
        "refused": (400, fault("content management policy")),
        "coded": (400, fault("not answered", code="content_filter")),
        "flagged": (403, fault("the model requires moderation, and your input was flagged")),
        "overloaded": (503, fault(f"no room for {SECRET}")),
        "page": (200, b"<html>a proxy's page</html>"),
        "hollow": (200, {"object": "chat.completion", "choices": []}),
        "null": (200, completion(None, finish="content_filter")),
        "long": (200, completion("Wor", finish="length")),
    }
    with ChatServer(lambda prompt, _: replies.get(prompt, "Word")) as server:
        prompts = ["first", *replies]
        answers = {prompts[number]: answer for number, answer in Endpoint("tiny", base_url=server.url, retries=1).generate(asked(prompts))}
    assert {name for name, answer in answers.items() if answer.passing} == {"overloaded", "page", "hollow"}
    assert {name for name, answer in answers.items() if answer.text is None} == {"overloaded", "page", "hollow", "refused", "coded", "flagged", "null"}
    assert "content management policy" in str(answers["refused"].problem)
    assert server.asked["refused"] == 1
    assert server.asked["overloaded"] == 2
    assert "no room for ***" in str(answers["overloaded"].problem)
    assert (answers["long"].text, answers["long"].cut) == ("Wor", True)


@pytest.mark.parametrize(
    ("reply", "named"),
    [
        ((401, fault(f"bad key {SECRET}")), "OPENAI_API_KEY"),
        ((404, fault("no such model")), "name of llm"),
        ((400, fault("Unsupported value: 'temperature'", code="unsupported_value", param="temperature")), "temperature=null"),
        ((400, fault("temperature does not support 0.0 with this model")), "temperature=null"),
        ((402, fault("Insufficient balance")), "balance of the account"),
        ((405, fault("Method Not Allowed")), "path of base_url"),
    ],
)
def test_what_is_wrong_for_every_prompt_stops_at_the_first(reply: Reply, named: str) -> None:
    with ChatServer(lambda *_: reply) as server, pytest.raises(ConfigError, match=named) as caught:
        list(Endpoint("tiny", base_url=server.url).generate(asked(["one", "two", "three"])))
    assert sum(server.asked.values()) == 1
    assert SECRET not in str(caught.value)


def handed_on(endpoint: Endpoint, count: int) -> tuple[dict[int, Answer], str]:
    """(answers by number of the prompt, what the endpoint said when it gave up)"""
    answers: dict[int, Answer] = {}
    try:
        for number, answer in endpoint.generate(asked(map(str, range(count)))):
            answers[number] = answer
    except (ConfigError, RunFailed) as error:
        return answers, str(error)
    return answers, ""


@pytest.mark.parametrize(
    ("reply", "count", "requests", "named"),
    [
        ((400, fault("top_logprobs must be given")), 50, ALONE, "top_logprobs must be given"),
        ((413, fault("too large")), 50, ALONE, "too large"),
        ((422, fault("too long")), 1, 1, "too long"),
        ((200, completion(None, finish="length")), 50, ALONE, "no text: length; check the settings, max_new_tokens"),
    ],
)
def test_an_endpoint_that_answers_none_of_the_first_prompts_is_at_fault_not_they(reply: Reply, count: int, requests: int, named: str) -> None:
    with ChatServer(lambda *_: reply) as server:
        answers, said = handed_on(Endpoint("tiny", base_url=server.url), count)
    assert (answers, sum(server.asked.values())) == ({}, requests)
    assert named in said


def test_content_filters_are_believed_at_once_even_in_a_row() -> None:
    with ChatServer(lambda *_: (400, fault("not answered", code="content_filter"))) as server:
        answers, said = handed_on(Endpoint("tiny", base_url=server.url, concurrency=1), 50)
    assert set(answers) == set(range(FAILURES_IN_A_ROW))
    assert not any(answer.passing for answer in answers.values())
    assert "in a row failed" in said


def test_a_refusal_stays_with_its_prompt_where_others_are_answered() -> None:
    refused = {"0", "1", "7", "28", "29"}
    with ChatServer(lambda prompt, _: (422, fault("too long")) if prompt in refused else "Word") as server:
        answers, said = handed_on(Endpoint("tiny", base_url=server.url), 30)
    assert (len(answers), said) == (30, "")
    assert {str(number) for number, answer in answers.items() if answer.text is None and not answer.passing} == refused


def test_refusals_of_a_row_that_ends_the_whole_are_not_handed_on() -> None:
    with ChatServer(lambda prompt, _: "Word" if int(prompt) < 5 else (400, fault("the free tier is used up"))) as server:
        answers, said = handed_on(Endpoint("tiny", base_url=server.url), 100)
    assert {number: answer.text for number, answer in answers.items()} == dict.fromkeys(range(5), "Word")
    assert "the free tier is used up" in said


def test_an_address_where_nothing_listens_is_named() -> None:
    url = f"http://127.0.0.1:{free_port()}/v1"
    with pytest.raises(ConfigError, match=f"base_url: {url} does not answer"):
        list(Endpoint("tiny", base_url=url, retries=0).generate(asked(["hello"])))


def test_models_that_want_the_newer_name_of_the_limit_get_it() -> None:
    refusal = fault("Unsupported parameter: 'max_tokens'. Use 'max_completion_tokens' instead.", code="unsupported_parameter", param="max_tokens")
    with ChatServer(lambda *_: "Word" if "max_completion_tokens" in server.requests[-1][1] else (400, refusal)) as server:
        answers = dict(Endpoint("tiny", base_url=server.url, concurrency=1).generate(asked(["one", "two"])))
    assert [answers[number].text for number in (0, 1)] == ["Word", "Word"]
    assert server.asked == {"one": 2, "two": 1}


def test_an_endpoint_that_goes_on_failing_is_given_up() -> None:
    with (
        ChatServer(lambda prompt, _: "Word" if prompt == "0" else (500, fault("broken"))) as server,
        pytest.raises(RunFailed, match=r"in a row failed.*broken"),
    ):
        list(Endpoint("tiny", base_url=server.url, retries=0).generate(asked(str(number) for number in range(1000))))
    assert sum(server.asked.values()) < 3 * FAILURES_IN_A_ROW


def test_prompts_without_end_are_read_only_as_answers_are_taken() -> None:
    taken = itertools.count()

    def prompts() -> Iterator[str]:
        for number in taken:
            yield str(number)

    with ChatServer(lambda *_: "Word") as server:
        answers = Endpoint("tiny", base_url=server.url, concurrency=2).generate(asked(prompts()))
        assert len(list(itertools.islice(answers, 5))) == 5
        time.sleep(0.3)
        answers.close()
    assert next(taken) <= 5 + 3 * 2


def test_a_key_or_an_address_is_needed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("OPENAI_API_KEY")
    with pytest.raises(ConfigError, match="OPENAI_API_KEY"):
        Endpoint("tiny")
    with ChatServer(lambda *_: "Word") as server:
        assert next(iter(Endpoint("tiny", base_url=server.url).generate(asked(["hello"]))))[1].text == "Word"


SCHEMA = {"title": "a word!", "type": "object", "properties": {"word": {"type": "string", "maxLength": 9}}, "required": ["word"]}


@pytest.mark.parametrize(
    ("structured", "format_"),
    [
        ("json_schema", {"type": "json_schema", "json_schema": {"name": "a_word_", "strict": True, "schema": SCHEMA}}),
        ("json_object", {"type": "json_object"}),
        ("none", None),
    ],
)
def test_what_a_prompt_asks_for_is_in_its_request_alone(structured: Any, format_: Any) -> None:
    with ChatServer(lambda *_: "{}") as server:
        endpoint = Endpoint("tiny", base_url=server.url, top_p=0.9, structured=structured, concurrency=1)
        list(endpoint.generate([Prompt(text="one", schema=SCHEMA, seed=2**62, max_new_tokens=7), Prompt(text="two")]))
    first, second = (body for _, body in server.requests)
    basic = {"path": "/v1/chat/completions", "model": "tiny", "temperature": 0.0, "top_p": 0.9}
    own = {"messages": [{"role": "user", "content": "one"}], "max_tokens": 7, "seed": 2**62}
    assert first == basic | own | ({"response_format": format_} if format_ else {})
    assert second == basic | {"messages": [{"role": "user", "content": "two"}], "max_tokens": 24}


@pytest.mark.parametrize(
    ("structured", "refusal", "named"),
    [
        ("json_schema", fault("Invalid parameter", param="response_format"), "set structured json_object, or none"),
        ("json_object", fault("This model does not support response_format of type json_object"), "set structured none"),
    ],
)
def test_an_endpoint_that_refuses_the_form_of_answers_is_named_with_the_way_out(structured: Any, refusal: dict[str, Any], named: str) -> None:
    with ChatServer(lambda *_: (400, refusal)) as server, pytest.raises(ConfigError, match=f"^structured: .*{named}"):
        list(Endpoint("tiny", base_url=server.url, structured=structured).generate([Prompt(text="one", schema=SCHEMA)]))
    assert sum(server.asked.values()) == 1


def test_an_endpoint_without_seeds_is_asked_without() -> None:
    refusal = {"detail": [{"type": "extra_forbidden", "loc": ["body", "seed"], "msg": "Extra inputs are not permitted"}]}
    with ChatServer(lambda *_: (422, refusal) if "seed" in server.requests[-1][1] else "Word") as server:
        answers = dict(Endpoint("tiny", base_url=server.url, concurrency=1).generate(Prompt(text=text, seed=1) for text in ("one", "two")))
    assert [answers[number].text for number in (0, 1)] == ["Word", "Word"]
    assert server.asked == {"one": 2, "two": 1}


@pytest.mark.parametrize(("limits", "most"), [({"requests": 4}, 4), ({"tokens": 60}, 3)])
def test_requests_beyond_a_limit_wait_those_sent_again_included(limits: dict[str, int], most: int) -> None:
    """Each request is of 20 tokens: 72 characters, and 2 of an answer (at first half of the 4 that it may have)."""
    times: list[float] = []

    def reply(prompt: str, before: int) -> Reply:
        times.append(time.monotonic())
        return "Word" if before or prompt[0] != "0" else (429, fault("busy"))

    with ChatServer(reply) as server:
        endpoint = Endpoint("tiny", base_url=server.url, max_new_tokens=4, pace=Pace(**limits, minute=0.4))
        answers = dict(endpoint.generate(asked(str(number) * 72 for number in range(6))))
    assert [answers[number].text for number in range(6)] == ["Word"] * 6
    assert len(times) == 7
    assert all(after - before > 0.3 for before, after in zip(times, times[most:], strict=False))
    assert times[-1] - times[0] < 1.4


def test_nobody_waits_for_a_turn_whose_answer_is_not_wanted() -> None:
    with ChatServer(lambda *_: "Word") as server:
        answers = Endpoint("tiny", base_url=server.url, pace=Pace(2, minute=0.5)).generate(asked(map(str, range(50))))
        next(answers)
        answers.close()
        time.sleep(0.7)
        assert sum(server.asked.values()) <= 2


def test_a_prompt_that_hangs_or_whose_answer_comes_in_half_may_be_asked_again_and_the_others_are_answered() -> None:
    def reply(prompt: str, before: int) -> Reply:
        if prompt == "hang":
            time.sleep(1.0)
        return {"half": (200, b'{"choices": [{"message": {"content": "Wo'), "lost": Broken("Word"), "empty": ""}.get(prompt, "Word")

    prompts = ["first", "hang", "half", "lost", "empty", "last"]
    began = time.monotonic()
    with ChatServer(reply) as server:
        endpoint = Endpoint("tiny", base_url=server.url, timeout=0.3, retries=0)
        answers = {prompts[number]: answer for number, answer in endpoint.generate(asked(prompts))}
    assert time.monotonic() - began < 0.9
    assert {prompt for prompt, answer in answers.items() if answer.passing} == {"hang", "half", "lost"}
    assert "timed out" in str(answers["hang"].problem)
    assert (answers["empty"].text, answers["last"].text) == ("", "Word")


def test_a_server_that_dies_in_the_middle_ends_the_run_with_what_was_answered() -> None:
    with ChatServer(lambda *_: "Word") as server:
        answers = Endpoint("tiny", base_url=server.url, retries=0, concurrency=2).generate(asked(map(str, range(200))))
        answered = [next(answers) for _ in range(5)]
        server.kill()
        with pytest.raises(RunFailed, match=f"{FAILURES_IN_A_ROW} prompts in a row failed"):
            answered += [item for item in answers if item[1].text is not None]
    assert len(answered) < 200
