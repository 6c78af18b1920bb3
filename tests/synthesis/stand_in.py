"""A seeded server that writes examples well, badly and repeatedly, and knows which.

Invariant: what becomes of a request follows from its own text and seed (``Rules``), so that a test can tell it without having asked. Knows nothing of how
answers are read: a prompt states family, languages and task in lines (``PROMPTS``), and each kind of answer is made to have its fault and no other.
"""

from __future__ import annotations

import hashlib
import json
import threading
import time
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from itertools import accumulate
from typing import Any

import yaml

from tests.generation.chat_server import Broken, ChatServer, Reply, completion, fault
from tests.synthesis.spoken import LETTERS_OF, SENTENCES, STRANGERS

TEXTS = {
    "short-long": ("user_query", "positive_document", "hard_negative_document"),
    "long-short": ("input_text", "label", "misleading_label"),
    "sts": ("S1", "S2", "S3"),
    "bitext": ("S1", "S2", "S3"),
    "long-long": ("input", "positive_document"),
    "short-short": ("input", "positive_document"),
}
"""Keys of an answer, query, positive and negative in this order."""

_STATED = {
    "short-long": "task language query_type query_length clarity num_words difficulty",
    "long-short": "task language num_words clarity difficulty",
    "sts": "language unit high_score low_score difficulty",
    "bitext": "src_lang tgt_lang unit high_score low_score difficulty",
    "long-long": "task language",
    "short-short": "task language",
}

PROMPTS = yaml.safe_dump(
    {
        "brainstorm": {family: f"tasks of: {family}" for family, stated in _STATED.items() if stated.startswith("task")},
        "generate": {family: "\n".join([f"family: {family}", *(f"{name}: {{{name}}}" for name in stated.split())]) for family, stated in _STATED.items()},
    }
)
"""A file for ``prompts``."""

LEAKED = "2 + 2 = 4; 3 + 3 = 6; 4 + 4 = 8"
"""The query of a ``leaked`` answer, of no language. Put it into a file for ``contamination``."""

KINDS: Mapping[str, tuple[int, str | None]] = {
    "good": (580, None),
    "fenced": (30, None),
    "repeated": (120, None),
    "nearly repeated": (50, None),
    "prose around it": (20, "not_json"),
    "half": (15, "not_json"),
    "a key twice": (10, "not_json"),
    "blank": (10, "not_json"),
    "another key": (15, "wrong_keys"),
    "a key too many": (20, "wrong_keys"),
    "in a list": (10, "wrong_keys"),
    "an empty text": (15, "empty"),
    "a number": (15, "not_text"),
    "half a character": (5, "not_text"),
    "foreign": (30, "language"),
    "twice the same": (15, "same_texts"),
    "label in the text": (10, "label_in_input"),
    "cut": (10, "cut"),
    "filtered": (8, "refused"),
    "refused": (4, "refused"),
    "silent": (3, "refused"),
    "leaked": (5, "contaminated"),
}
"""Kind of answer → how many of a thousand, and what it is rejected for. A label in the text is for long-short; other families get a good one."""

STOCK = 3
"""Different answers that are repeated, for each family and language."""

DIGITS = 60
"""Of each text, so that no two are alike that should not be."""

FAULTS = ("429", "500", "broken")
"""Those that can come often and cost little time; there are also ``half a body``, ``no body`` and ``hang``."""

BAD_LISTS = (
    ("not_json", "Sure! Some tasks:\n1. Find it"),
    ("not_text", '{"tasks": ["Find it"]}'),
    ("not_text", '["Find it", 7]'),
    ("empty", '["", " "]'),
    ("not_json", ""),
)
"""Answers to a brainstorming prompt that give no tasks, and why."""

Key = tuple[str, int]
"""Prompt and seed of a request."""


@dataclass(frozen=True, kw_only=True)
class Given:
    """What becomes of a request.

    reason: of the rejection by itself, None where the example is fine; texts: query, positive and negative where it is. alike: of answers that are
    equal or nearly so. faults: that come before. written: the answer, or None with ``finish``.
    """

    kind: str
    family: str
    language: str
    reason: str | None
    texts: tuple[str, ...]
    alike: str
    written: str | None
    finish: str = "stop"
    faults: tuple[str, ...] = ()
    tokens: tuple[int, int] = (0, 0)


@dataclass(frozen=True)
class Rules:
    """seed: of the server; kinds: kind → its share; faulty: how many of a thousand requests meet one of ``faults`` first, once or twice."""

    seed: int = 0
    kinds: Mapping[str, int] = field(default_factory=lambda: {kind: share for kind, (share, _) in KINDS.items()})
    faulty: int = 0
    faults: tuple[str, ...] = FAULTS

    def number(self, *of: object, below: int) -> int:
        return int.from_bytes(hashlib.blake2b(json.dumps([self.seed, *map(str, of)]).encode(), digest_size=32).digest(), "big") % below

    def given(self, key: Key) -> Given:
        stated = dict(line.split(": ", 1) for line in key[0].splitlines())
        family = stated["family"]
        kind = self._kind(key)
        if kind == "label in the text" and family != "long-short":
            kind = "good"
        languages = (stated["src_lang"], stated["tgt_lang"]) if family == "bitext" else (stated["language"], stated["language"])
        number = self.number("stock", key, below=STOCK)
        alike = f"{family} {languages} {number}" if "repeated" in kind else str(key)
        texts = self.texts(family, languages, alike)
        if kind == "nearly repeated":
            digit = self.number("digit", key, below=10)
            texts = (f"{texts[0][:-1]}{digit}", *texts[1:])
        reason = KINDS[kind][1]
        made = Given(kind=kind, family=family, language=languages[0], reason=reason, texts=texts, alike=alike, written=None)
        made = replace(made, **self._written(made, languages, key))
        meets = self.number("fault", key, below=1000) < self.faulty and kind != "refused"  # A refusal does not tell how often it was asked.
        faults = (self.faults[self.number("which", key, below=len(self.faults))],) * (1 + self.number("times", key, below=2)) if meets else ()
        tokens = (0, 0) if kind == "refused" else (len(key[0]) // 4, len(made.written or "") // 3)
        return replace(made, faults=faults, tokens=tokens)

    def _kind(self, key: Key) -> str:
        place = self.number("kind", key, below=sum(self.kinds.values()))
        return next(kind for kind, end in zip(self.kinds, accumulate(self.kinds.values()), strict=True) if place < end)

    def texts(self, family: str, languages: tuple[str, str], about: str) -> tuple[str, ...]:
        """Texts of the family, each its own by ``about``: plausible, different, and labels in other words than the text."""
        return tuple(self.text(languages[min(place, 1)], f"{about} {place}", label=family == "long-short" and place > 0) for place in range(len(TEXTS[family])))

    def text(self, language: str, about: str, *, label: bool = False) -> str:
        letters = LETTERS_OF.get(language, LETTERS_OF["Latin"])
        digits = str(self.number("digits", about, below=10**DIGITS)).zfill(DIGITS)
        if label:
            return f"{self._word(letters, about, 7)} {digits}"
        sentences = SENTENCES.get(language)
        if sentences and self.number("long", about, below=3) == 0:  # Not all: to tell the language takes most of a request's time.
            return f"{sentences[self.number('sentence', about, below=len(sentences))]} {digits}"
        return f"{self._word(letters, about, 5)} {self._word(letters, about, 6)} {digits}"

    def _word(self, letters: str, about: str, length: int) -> str:
        number = self.number("word", about, length, below=len(letters) ** length)
        return "".join(letters[number // len(letters) ** place % len(letters)] for place in range(length))

    def _written(self, made: Given, languages: tuple[str, str], key: Key) -> dict[str, Any]:
        """The answer's text with the fault of its kind; how it finishes."""
        keys, texts = TEXTS[made.family], list(made.texts)
        place = self.number("place", key, below=len(keys))
        last = len(keys) - 1
        values: dict[str, Any] = dict(zip(keys, texts, strict=True))
        good = json.dumps(values, ensure_ascii=bool(self.number("ascii", key, below=2)), indent=[None, 2][self.number("indent", key, below=2)])
        match made.kind:
            case "fenced":
                return {"written": f"```json\n{good}\n```"}
            case "repeated" | "nearly repeated":  # Laid out differently, the same nevertheless.
                shuffled = sorted(values.items(), key=lambda item: self.number("order", key, item[0], below=100))
                return {"written": json.dumps({name: f" {text}\n" for name, text in shuffled})}
            case "prose around it":
                return {"written": [f"Here is the example: {good}", f"{good}\nI hope that this helps!"][place % 2]}
            case "half":
                return {"written": good[: len(good) // 2]}
            case "a key twice":
                return {"written": f"{good.rstrip()[:-1]}, {json.dumps(keys[place])}: {json.dumps(texts[place])}}}"}
            case "blank":
                return {"written": ["", " \n"][place % 2]}
            case "another key":
                values[f"{keys[place]}_text"] = values.pop(keys[place])
            case "a key too many":
                values["explanation"] = texts[0]
            case "in a list":
                return {"written": f"[{good}]"}
            case "an empty text":
                values[keys[place]] = ["", " \n\t"][self.number("empty", key, below=2)]
            case "a number":
                values[keys[place]] = [3, None, [texts[place]], {"text": texts[place]}, True][self.number("value", key, below=5)]
            case "half a character":
                values[keys[place]] = f"{texts[place]}\ud83d"
            case "foreign":
                values[keys[place]] = self._foreign(languages[min(place, 1)], str(key), label=made.family == "long-short" and place > 0)
            case "twice the same":
                values[keys[last]] = f" {texts[last - 1].casefold().replace(' ', '  ')}"
            case "label in the text":
                values[keys[0]] = f"{texts[0]}, {texts[1 + place % 2].split()[0].upper()}!"
            case "cut":
                return {"written": [good, good[: len(good) // 2]][place % 2], "finish": "length"}
            case "filtered":
                return {"finish": "content_filter"}
            case "refused" | "silent":
                return {}
            case "leaked":
                values[keys[0]] = LEAKED.replace(" ", ["", "  ", " "][place])
        return {"written": good if made.kind == "good" else json.dumps(values)}

    def _foreign(self, language: str, about: str, *, label: bool) -> str:
        """In another language's sentences, or in another script's letters."""
        if language in STRANGERS and not label:
            return " ".join(SENTENCES[STRANGERS[language]])
        return self.text("Lao" if language == "Georgian" else "Georgian", about)

    def tasks(self, key: Key) -> tuple[str, list[str]]:
        """Of a brainstorming prompt: ok and the tasks of its answer, or why there are none."""
        if self.number("tasks", key, below=5) == 0:
            return BAD_LISTS[self.number("bad list", key, below=len(BAD_LISTS))][0], []
        family = key[0].partition(": ")[2]
        return "ok", [f"Of {family}: find what is said about matter number {self.number('task', key, place, below=400)}" for place in range(20)]

    def listed(self, key: Key) -> str:
        came, tasks = self.tasks(key)
        if came != "ok":
            return BAD_LISTS[self.number("bad list", key, below=len(BAD_LISTS))][1]
        spelt = [[task, f"{task}.", f"  {task.upper()}", f"{task.replace(' ', '  ')} ."][self.number("spelt", key, task, below=4)] for task in tasks]
        return json.dumps([*spelt, "", "--"])


@dataclass
class Asked:
    """What the server has seen and said, for accounts."""

    requests: Counter[Key] = field(default_factory=Counter)
    """For examples, those tried again included."""
    received: int = 0
    """The same in total."""
    lists: Counter[Key] = field(default_factory=Counter)
    """For tasks."""
    prompt_tokens: int = 0
    completion_tokens: int = 0
    """As told in whole answers."""


class StandIn(ChatServer):
    """rules: what it answers; stays: whether faults come however often a request is sent; dies_at: number of the request at which the server is killed;
    hang: seconds that a fault ``hang`` takes; seconds: that each answer takes.
    """

    def __init__(self, rules: Rules, *, stays: bool = False, dies_at: int = 0, hang: float = 1.0, seconds: float = 0.0, port: int = 0) -> None:
        self.rules, self.accounts = rules, Asked()
        self._stays, self._dies_at, self._hang = stays, dies_at, hang
        self._counting = threading.Lock()
        super().__init__(lambda *_: "", seconds, port)

    @property
    def port(self) -> int:
        return int(self.url.rpartition(":")[2].partition("/")[0])

    def answer(self, body: dict[str, Any], before: int) -> Reply:
        key = (body["messages"][-1]["content"], body["seed"])
        if key[0].startswith("tasks of"):
            return self._list(key)
        given = self.rules.given(key)
        with self._counting:
            times = self.accounts.requests[key]
            self.accounts.requests[key] += 1
            self.accounts.received += 1
            if self.accounts.received == self._dies_at:
                threading.Thread(target=self.kill).start()
        if given.faults and (self._stays or times < len(given.faults)):
            return self._fault(given.faults[0], given)
        if given.kind == "refused":
            return 400, fault("The response was filtered: content management policy", code="content_filter")
        self._told(given.tokens)
        return 200, completion(given.written, finish=given.finish, tokens=given.tokens)

    def _list(self, key: Key) -> Reply:
        with self._counting:
            self.accounts.lists[key] += 1
        written = self.rules.listed(key)
        self._told(tokens := (len(key[0]) // 4, len(written) // 3))
        return 200, completion(written, tokens=tokens)

    def _told(self, tokens: tuple[int, int]) -> None:
        with self._counting:
            self.accounts.prompt_tokens += tokens[0]
            self.accounts.completion_tokens += tokens[1]

    def _fault(self, which: str, given: Given) -> Reply:
        whole = json.dumps(completion(given.written or "", tokens=given.tokens))
        match which:
            case "429" | "500":
                return int(which), fault("too many requests" if which == "429" else "out of order")
            case "broken":
                return Broken(given.written or "")
            case "half a body":  # Its length as announced, but no JSON.
                return 200, whole[: len(whole) // 2].encode()
            case "no body":
                return 200, b""
            case "hang":
                time.sleep(self._hang)
                return 200, completion(given.written)
        raise AssertionError(f"no fault {which}")
