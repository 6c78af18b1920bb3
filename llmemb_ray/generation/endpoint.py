"""Prompts to an OpenAI-compatible endpoint, several at once.

Invariant: a prompt is sent until it is answered, refused, or ``retries`` times in vain; what passes (overload, time-outs)
is told apart from what stays (a refusal), and a refusal is handed on only once it is known to be the prompt's own and not
the account's or the settings'. The key goes into the request's header and nowhere else. The first prompt goes alone, so
that a wrong address, key or model name costs one request. Every request keeps to the limits of ``pace``, those sent again included.
"""

from __future__ import annotations

import contextlib
import itertools
import logging
import os
import queue
import re
import threading
import time
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from llmemb_ray.errors import ConfigError, RunFailed
from llmemb_ray.generation.generator import Answer, Prompt, Structured
from llmemb_ray.generation.pace import Pace
from llmemb_ray.storage import redact

logger = logging.getLogger(__name__)

KEY = "OPENAI_API_KEY"
BASE_URL = "OPENAI_BASE_URL"

NO_KEY = "none"
"""Sent to an endpoint of one's own where no key is set: the client sends some key always."""

FAILURES_IN_A_ROW = 20
"""Prompts that fail one after another, each retried, before the whole is given up."""

ALONE = 3
"""Prompts that may be refused one after another, with no answer before, until the settings are taken to be at fault and not the prompts."""

WAYS_OUT = {
    401: f"check {KEY}",
    402: "check the balance of the account",
    403: f"check {KEY}",
    404: "check the name of llm and the path of base_url (most end in /v1)",
    405: "check the path of base_url (most end in /v1)",
}
"""HTTP status codes that mean key, account, model name or address, not the prompt."""

FILTERED = re.compile(
    r"content[ _-]?(filter|policy|management)|requires moderation|rejected .{0,20}\bsafety system|(input|prompt|content|request) (was |has been )?flagged",
    re.IGNORECASE,
)
"""How the content filters of OpenAI, Azure and OpenRouter say that a prompt is not answered."""

FILTER_STATUS = (400, 403, 422, 451)

ABOUT_FORMAT = re.compile(r"response_?format|grammar error|json[ _]?(schema|object)|structured[ _]outputs?|guided", re.IGNORECASE)
"""How servers name what they cannot do where they refuse the form of the answer."""

CHARACTERS_PER_TOKEN = 4
"""The usual rule of thumb for English, with which a prompt is charged to the limit of tokens; other scripts take more tokens than it says."""


class _Left(BaseException):
    """Nobody waits for the answer any more. No Exception, so that the client does not take it for a lost connection and tries again."""


class _Mine(threading.local):
    """What the hook of a request must know, which runs in the thread that sends it."""

    tokens: int = 0
    stop: threading.Event | None = None


@dataclass(frozen=True, kw_only=True)
class _Doubtful(Answer):
    """No text for a reason that may lie in the prompt, or in the settings: other prompts tell."""


@dataclass(frozen=True)
class _Reply:
    """number: of the prompt; began, ended: of asking it, in seconds of time.monotonic"""

    number: int
    answer: Answer
    began: float
    ended: float


class Endpoint:
    """Chat completions of one model.

    llm: name of the model as the endpoint knows it; base_url: such as http://host:8000/v1, None for OPENAI_BASE_URL or OpenAI's own
    concurrency: requests at once; retries: after the first request of a prompt; timeout: seconds of one request
    temperature, top_p: None leaves it to the endpoint; max_new_tokens: of an answer
    structured: how the schema of a prompt is asked for; pace: limits of requests, shared by all threads
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
        top_p: float | None = None,
        max_new_tokens: int = 24,
        structured: Structured = "json_schema",
        pace: Pace | None = None,
    ) -> None:
        from openai import DefaultHttpxClient, OpenAI

        self._key = os.environ.get(KEY, "").strip()
        self._url = address(base_url)
        if not self._key and not (base_url or os.environ.get(BASE_URL)):
            raise ConfigError(f"llm: no key is set; put it into the environment variable {KEY}, or name an endpoint of your own with base_url")
        if not self._url.startswith(("http://", "https://")):
            raise ConfigError(f"base_url: {redact(self._url)} is no http:// or https:// address, such as http://127.0.0.1:8000/v1")
        http = DefaultHttpxClient(event_hooks={"request": [self._wait]})
        self._client = OpenAI(api_key=self._key or NO_KEY, base_url=self._url, max_retries=retries, timeout=timeout, http_client=http)
        self._llm, self._concurrency, self._max_new_tokens = llm, concurrency, max_new_tokens
        self._sampling = {name: value for name, value in (("temperature", temperature), ("top_p", top_p)) if value is not None}
        self._structured, self._pace = structured, pace or Pace()
        self._how = sampling_name(temperature, top_p, max_new_tokens, structured)
        self._limit_name, self._seeds = "max_tokens", True
        self._mine, self._counting = _Mine(), threading.Lock()
        self._completed, self._completion_tokens = 0, 0

    @property
    def name(self) -> str:
        return f"{self._llm} at {redact(self._url).rstrip('/')}, {self._how}"

    def generate(self, prompts: Iterable[Prompt]) -> Iterator[tuple[int, Answer]]:
        """See Generator. Leaving the iteration begins no more requests.

        What may be a refusal waits until a prompt that was asked after it is answered, or all were asked; those of a row that ends the
        whole are never handed on.
        """
        numbered = iter(enumerate(prompts))
        waiting: list[_Reply] = []
        failures, answered = 0, False
        for reply in itertools.chain(self._first(numbered), self._spread(numbered)):
            answer = reply.answer
            if answer.text is not None:
                failures, answered = 0, True
                yield from ((one.number, one.answer) for one in waiting if one.ended <= reply.began)
                waiting = [one for one in waiting if one.ended > reply.began]
                yield reply.number, answer
                continue
            failures += 1
            if isinstance(answer, _Doubtful):
                waiting.append(reply)
            else:
                yield reply.number, answer
            if failures >= FAILURES_IN_A_ROW:
                raise RunFailed(
                    f"{self._where}: {failures} prompts in a row failed, the last with: {answer.problem}; the same command asks about those without an answer"
                )
        if waiting and not answered:
            raise RunFailed(f"{self._where}: no prompt was answered, the last failed with: {waiting[-1].answer.problem}; the same command asks again")
        yield from ((one.number, one.answer) for one in waiting)

    def _first(self, numbered: Iterator[tuple[int, Prompt]]) -> Iterator[_Reply]:
        """The first prompt, and others while the endpoint refuses them. Raises ConfigError where it answers none of ``ALONE``, or of all."""
        reply: _Reply | None = None
        for item in itertools.islice(numbered, ALONE):
            reply = self._timed(item, alone=True)
            yield reply
            if not isinstance(reply.answer, _Doubtful):
                return
        if reply is not None:
            way_out = "check the settings, max_new_tokens among them; what is refused for its own sake must be left out"
            raise ConfigError(f"llm: {self._llm} at {self._where} answers no prompt, the last with: {reply.answer.problem}; {way_out}")

    def _spread(self, numbered: Iterator[tuple[int, Prompt]]) -> Iterator[_Reply]:
        """Answers by ``concurrency`` threads, which wait while nobody takes what they have."""
        results: queue.Queue[_Reply | BaseException | None] = queue.Queue(maxsize=self._concurrency)
        taking, stop = threading.Lock(), threading.Event()

        def work() -> None:
            end: BaseException | None = None
            self._mine.stop = stop
            try:
                while not stop.is_set():
                    with taking:
                        item = next(numbered, None)
                    if item is None:
                        break
                    _put(results, self._timed(item), stop)
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

    def _timed(self, item: tuple[int, Prompt], *, alone: bool = False) -> _Reply:
        began = time.monotonic()
        answer = self._ask(item[1], alone=alone)
        return _Reply(item[0], answer, began, time.monotonic())

    def _wait(self, request: Any) -> None:
        """Called by the client before each request that it sends."""
        stop = self._mine.stop
        if not self._pace.wait(self._mine.tokens, stop.is_set if stop is not None else lambda: False):
            raise _Left

    def _options(self, prompt: Prompt) -> dict[str, Any]:
        """Of the request, besides model and message. The format goes as it is: the client would walk through each schema, a fifth of its time."""
        options: dict[str, Any] = {self._limit_name: prompt.max_new_tokens or self._max_new_tokens, **self._sampling}
        if prompt.seed is not None and self._seeds:
            options["seed"] = prompt.seed
        if prompt.schema is not None and self._structured == "json_schema":
            named = {"name": schema_name(prompt.schema), "strict": True, "schema": dict(prompt.schema)}
            options["extra_body"] = {"response_format": {"type": "json_schema", "json_schema": named}}
        elif prompt.schema is not None and self._structured == "json_object":
            options["extra_body"] = {"response_format": {"type": "json_object"}}
        return options

    def _ask(self, prompt: Prompt, *, alone: bool = False) -> Answer:
        """One prompt. alone: nothing was answered yet, so that an endpoint that cannot be reached is an error."""
        import openai

        limit_name, seeds, options = self._limit_name, self._seeds, self._options(prompt)
        with self._counting:
            completion = self._completion_tokens / self._completed if self._completed else options[limit_name] / 2
        self._mine.tokens = round(len(prompt.text) / CHARACTERS_PER_TOKEN + completion)
        try:
            response = self._client.chat.completions.with_raw_response.create(model=self._llm, messages=[{"role": "user", "content": prompt.text}], **options)
            answer = _answer(response.parse(), response.retries_taken)
            with self._counting:
                self._completed += 1
                self._completion_tokens += answer.completion_tokens or len(answer.text or "") // CHARACTERS_PER_TOKEN
            return answer
        except openai.APIStatusError as error:
            if seeds and "seed" in options and error.status_code in (400, 422) and _is_about_seed(error):
                if self._seeds:
                    logger.warning("%s takes no seeds: what it answers cannot be made again from them", self._where)
                self._seeds = False
                return self._ask(prompt, alone=alone)
            if limit_name == "max_tokens" and error.status_code == 400 and "max_completion_tokens' instead" in str(error):
                self._limit_name = "max_completion_tokens"  # OpenAI's newer models want it so; other servers know only the older name.
                return self._ask(prompt, alone=alone)
            return self._failed(error, alone, options)
        except openai.APIConnectionError as error:
            problem = self._masked(f"{error.message} ({error.__cause__})" if error.__cause__ else error.message)
            if alone:
                raise ConfigError(f"base_url: {self._where} does not answer: {problem}; is it up, and is the address right?") from None
            return Answer(problem=problem, passing=True, retries=self._client.max_retries)
        except (openai.APIError, ValueError) as error:  # A body that is no JSON.
            return Answer(problem=f"answered with something that is no chat completion: {self._masked(str(error))}", passing=True)

    def _failed(self, error: Any, alone: bool, options: dict[str, Any]) -> Answer:
        status, text = error.status_code, _told(error)
        said = self._masked(text)
        if status in FILTER_STATUS and FILTERED.search(f"{error.code} {text}"):
            return Answer(problem=said)
        if status in WAYS_OUT:
            raise ConfigError(f"llm: {self._where} refuses {self._llm}: {said}; {WAYS_OUT[status]}") from None
        if status in (400, 422):
            for name in self._sampling:
                if error.param == name or (alone and name in text.lower()):
                    raise ConfigError(f"{name}: {self._where} refuses it: {said}; leave it to the endpoint with --set {name}=null") from None
            about_format = str(error.param or "").startswith("response_format") or (alone and ABOUT_FORMAT.search(text))
            if "extra_body" in options and about_format:
                way_out = "none" if self._structured == "json_object" else "json_object, or none"
                raise ConfigError(f"structured: {self._where} refuses {self._structured}: {said}; set structured {way_out}") from None
        if status in (408, 409, 429) or status >= 500:
            return Answer(problem=said, passing=True, retries=self._client.max_retries)
        return _Doubtful(problem=said)

    @property
    def _where(self) -> str:
        return redact(self._url)

    def _masked(self, text: str) -> str:
        """One line of an endpoint's own words, without the key that some repeat."""
        text = " ".join(text.split())[:300]
        return text.replace(self._key, "***") if self._key else text


def address(base_url: str | None) -> str:
    """Where requests go."""
    return base_url or os.environ.get(BASE_URL) or "https://api.openai.com/v1"


def sampling_name(temperature: float | None, top_p: float | None, max_new_tokens: int, structured: Structured) -> str:
    """The settings that decide an endpoint's answers, besides the model."""
    nucleus = "" if top_p is None else f", top_p {top_p}"
    form = "" if structured == "none" else f", {structured}"
    return f"temperature {temperature}{nucleus}, at most {max_new_tokens} tokens{form}"


def schema_name(schema: Mapping[str, Any]) -> str:
    """What an endpoint is told that a schema is called: its title, in the characters that OpenAI allows."""
    return re.sub(r"[^A-Za-z0-9_-]", "_", str(schema.get("title", "")))[:64] or "answer"


def _is_about_seed(error: Any) -> bool:
    """Whether a refusal names the field ``seed``, as OpenAI does (param) or as pydantic does (loc); the word alone may stand in a prompt."""
    return error.param == "seed" or re.search(r"['\"]body['\"], ?['\"]seed['\"]|['\"`]seed['\"`] ?(is|was|:)", _told(error)) is not None


def _told(error: Any) -> str:
    """What an endpoint says of its refusal; the whole body where the client finds no message in it."""
    return f"{error} - {error.response.text}" if str(error) == f"Error code: {error.status_code}" else str(error)


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
    kind = Answer
    if not isinstance(text, str):
        refusal = getattr(message, "refusal", None)
        text, problem = None, f"no text: {refusal or finish or 'content is null'}"
        kind = Answer if refusal or finish == "content_filter" else _Doubtful
    return kind(text=text, problem=problem, cut=finish == "length", retries=retries, prompt_tokens=prompt_tokens, completion_tokens=completion_tokens)
