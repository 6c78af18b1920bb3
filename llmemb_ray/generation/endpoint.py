"""Prompts to an OpenAI-compatible endpoint, several at once.

Invariant: a prompt is sent until it is answered, refused, or ``retries`` times in vain; what passes (overload, time-outs)
is told apart from what stays (a refusal). The key goes into the request's header and nowhere else. The first prompt goes
alone, so that a wrong address, key or model name costs one request.
"""

from __future__ import annotations

import contextlib
import os
import queue
import threading
from collections.abc import Iterable, Iterator
from typing import Any

from llmemb_ray.errors import ConfigError, RunFailed
from llmemb_ray.generation.generator import Answer
from llmemb_ray.storage import redact

KEY = "OPENAI_API_KEY"
BASE_URL = "OPENAI_BASE_URL"

NO_KEY = "none"
"""Sent to an endpoint of one's own where no key is set: the client sends some key always."""

FAILURES_IN_A_ROW = 20
"""Prompts that fail one after another, each retried, before the whole is given up."""

WRONG_FOR_ALL = (401, 403, 404)
"""HTTP status codes that mean key or model name, not the prompt."""


class Endpoint:
    """Chat completions of one model.

    llm: name of the model as the endpoint knows it; base_url: such as http://host:8000/v1, None for OPENAI_BASE_URL or OpenAI's own
    concurrency: requests at once; retries: after the first request of a prompt; timeout: seconds of one request
    temperature: None leaves it to the endpoint; max_new_tokens: of an answer
    Raises ConfigError where neither a key nor an address is there.
    """

    def __init__(
        self,
        llm: str,
        *,
        base_url: str | None = None,
        concurrency: int = 8,
        retries: int = 5,
        timeout: float = 60.0,
        temperature: float | None = 0.0,
        max_new_tokens: int = 24,
    ) -> None:
        from openai import OpenAI

        self._key = os.environ.get(KEY, "").strip()
        self._url = base_url or os.environ.get(BASE_URL) or "https://api.openai.com/v1"
        if not self._key and not (base_url or os.environ.get(BASE_URL)):
            raise ConfigError(f"llm: no key is set; put it into the environment variable {KEY}, or name an endpoint of your own with base_url")
        if not self._url.startswith(("http://", "https://")):
            raise ConfigError(f"base_url: {redact(self._url)} is no http:// or https:// address, such as http://127.0.0.1:8000/v1")
        self._client = OpenAI(api_key=self._key or NO_KEY, base_url=self._url, max_retries=retries, timeout=timeout)
        self._llm, self._concurrency, self._max_new_tokens, self._temperature = llm, concurrency, max_new_tokens, temperature
        self._limit_name = "max_tokens"

    @property
    def name(self) -> str:
        return f"{self._llm} at {redact(self._url).rstrip('/')}, temperature {self._temperature}, at most {self._max_new_tokens} tokens"

    def generate(self, prompts: Iterable[str]) -> Iterator[tuple[int, Answer]]:
        """See Generator. Leaving the iteration begins no more requests."""
        numbered = iter(enumerate(prompts))
        first = next(numbered, None)
        if first is None:
            return
        answer = self._ask(first[1], alone=True)
        yield first[0], answer
        failures = int(answer.text is None)
        for number, answer in self._spread(numbered):
            failures = failures + 1 if answer.text is None else 0
            yield number, answer
            if failures >= FAILURES_IN_A_ROW:
                raise RunFailed(f"{self._where}: {failures} prompts in a row failed, the last with: {answer.problem}; the same command asks again")

    def _spread(self, numbered: Iterator[tuple[int, str]]) -> Iterator[tuple[int, Answer]]:
        """Answers by ``concurrency`` threads, which wait while nobody takes what they have."""
        results: queue.Queue[tuple[int, Answer] | BaseException | None] = queue.Queue(maxsize=self._concurrency)
        taking, stop = threading.Lock(), threading.Event()

        def work() -> None:
            end: BaseException | None = None
            try:
                while not stop.is_set():
                    with taking:
                        item = next(numbered, None)
                    if item is None:
                        break
                    _put(results, (item[0], self._ask(item[1])), stop)
            except BaseException as error:  # noqa: BLE001 - raised again by the thread that iterates
                end = error
            _put(results, end, stop)

        threads = [threading.Thread(target=work, name="llmemb-endpoint", daemon=True) for _ in range(self._concurrency)]
        for thread in threads:
            thread.start()
        try:
            left = len(threads)
            while left:
                result = results.get()
                if isinstance(result, BaseException):
                    raise result
                if result is None:
                    left -= 1
                else:
                    yield result
        finally:
            stop.set()

    def _ask(self, prompt: str, *, alone: bool = False) -> Answer:
        """One prompt. alone: nothing was answered yet, so that an endpoint that cannot be reached is an error."""
        import openai

        limit_name = self._limit_name
        options: dict[str, Any] = {limit_name: self._max_new_tokens}
        if self._temperature is not None:
            options["temperature"] = self._temperature
        try:
            response = self._client.chat.completions.with_raw_response.create(model=self._llm, messages=[{"role": "user", "content": prompt}], **options)
            return _answer(response.parse(), response.retries_taken)
        except openai.APIStatusError as error:
            if limit_name == "max_tokens" and error.status_code == 400 and "max_completion_tokens' instead" in str(error):
                self._limit_name = "max_completion_tokens"  # OpenAI's newer models want it so; other servers know only the older name.
                return self._ask(prompt, alone=alone)
            return self._failed(error)
        except openai.APIConnectionError as error:
            problem = self._masked(f"{error.message} ({error.__cause__})" if error.__cause__ else error.message)
            if alone:
                raise ConfigError(f"base_url: {self._where} does not answer: {problem}; is it up, and is the address right?") from None
            return Answer(problem=problem, passing=True, retries=self._client.max_retries)
        except (openai.APIError, ValueError) as error:  # A body that is no JSON.
            return Answer(problem=f"answered with something that is no chat completion: {self._masked(str(error))}", passing=True)

    def _failed(self, error: Any) -> Answer:
        status, said = error.status_code, self._masked(str(error))
        if status in WRONG_FOR_ALL:
            way_out = "check the name of llm and the path of base_url (most end in /v1)" if status == 404 else f"check {KEY}"
            raise ConfigError(f"llm: {self._where} refuses {self._llm}: {said}; {way_out}") from None
        if status == 400 and error.param == "temperature":
            raise ConfigError(f"temperature: {self._where} refuses it: {said}; leave it to the endpoint with --set temperature=null") from None
        passing = status in (408, 409, 429) or status >= 500
        return Answer(problem=said, passing=passing, retries=self._client.max_retries if passing else 0)

    @property
    def _where(self) -> str:
        return redact(self._url)

    def _masked(self, text: str) -> str:
        """One line of an endpoint's own words, without the key that some repeat."""
        text = " ".join(text.split())[:300]
        return text.replace(self._key, "***") if self._key else text


def _put(results: queue.Queue[Any], item: Any, stop: threading.Event) -> None:
    """Waits for room, but not where nobody reads any more."""
    while not stop.is_set():
        with contextlib.suppress(queue.Full):
            results.put(item, timeout=0.2)
            return


def _answer(completion: Any, retries: int) -> Answer:
    """Of a chat completion as the client parsed it, which checks no types."""
    choices = getattr(completion, "choices", None)
    choice = choices[0] if isinstance(choices, list) and choices else None
    message = getattr(choice, "message", None)
    if message is None:
        return Answer(problem="answered with something that is no chat completion (no choices)", passing=True, retries=retries)
    usage = getattr(completion, "usage", None)
    prompt_tokens, completion_tokens = (int(getattr(usage, name, None) or 0) for name in ("prompt_tokens", "completion_tokens"))
    text, finish, problem = getattr(message, "content", None), getattr(choice, "finish_reason", None), None
    if not isinstance(text, str):
        text, problem = None, f"no text: {getattr(message, 'refusal', None) or finish or 'content is null'}"
    return Answer(text=text, problem=problem, cut=finish == "length", retries=retries, prompt_tokens=prompt_tokens, completion_tokens=completion_tokens)
