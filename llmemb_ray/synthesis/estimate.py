"""What a synthesis will ask and cost, estimated before anything is asked: nobody is asked, no weights, no Ray, nothing written.

Invariant: an estimate is plain data and carries every assumption it rests on. Requests are drawn as the run draws them; tokens of prompts are counted
on a sample, those of answers assumed. Where OUT holds a part of the same run, its tokens and its rate take the place of assumptions.
"""

from __future__ import annotations

import json
import math
import statistics
import time
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from llmemb_ray.config import SynthesizeSettings, parse_actors
from llmemb_ray.embedders import models
from llmemb_ray.errors import ModelError
from llmemb_ray.generation.generator import Prompt
from llmemb_ray.generation.tokens import ModelSpec, PromptTokens
from llmemb_ray.pipeline.estimates.estimate import SMALL_MODEL, UTILIZATION
from llmemb_ray.storage import Storage, absolute
from llmemb_ray.synthesis import lengths, times
from llmemb_ray.synthesis.brainstorming import TASKS_AN_ANSWER
from llmemb_ray.synthesis.drawing import Request
from llmemb_ray.synthesis.families import FAMILIES
from llmemb_ray.synthesis.job import Asked
from llmemb_ray.synthesis.lengths import Span
from llmemb_ray.synthesis.spending import CHARACTERS_PER_TOKEN, MILLION
from llmemb_ray.synthesis.standing import Standing
from llmemb_ray.synthesis.tasks import MOST_TASKS, TASK_CHARACTERS, Pool, Task
from llmemb_ray.synthesis.times import Elapsed, GpuTime

SAMPLE = 4000
"""Requests that are drawn and counted at most: two standard errors of their mean are then about 2% of it."""

STAND_IN = "Given a question on a subject of everyday life or of a science, find documents that answer it in detail."
"""Taken for a task that is not brainstormed yet: as long as one usually is."""

NOTABLE = 0.01
"""Share of answers that are cut from which it is said."""

SPREAD = 1.0
"""Standard deviation of the tokens of an answer over their mean, for the margin of a pilot's mean."""


@dataclass(frozen=True, kw_only=True)
class Part:
    """Some of the requests that are left. Tokens are of all of them together."""

    requests: int
    prompt_tokens: float
    answer_tokens: Span


@dataclass(frozen=True, kw_only=True)
class Estimate:
    out: str
    generator: str
    examples: int
    """Asked for in all; a request each."""
    done: int
    """Of them, with an answer already."""
    left: Part
    """All that is left to ask: brainstorming and examples."""
    tasks: dict[str, Part]
    """Brainstorming by family, if no task came twice."""
    families: dict[str, Part]
    """Examples by family."""
    sample: int
    """Requests drawn and counted; exact where these are all."""
    prompt_tokens_margin: float
    """Two standard errors of the prompt tokens of ``families``."""
    counted_by: str
    """What counted the tokens of the prompts."""
    measured: int
    """Requests already answered that the means are taken from; 0 where they are assumed."""
    spent_tokens: tuple[int, int]
    """(prompts, answers) by earlier commands."""
    spent: float | None
    """What they cost at the prices; None without prices, as cost is."""
    cost: Span | None
    """Of what is left."""
    budget: float | None
    enough: bool | None
    """Whether the budget is expected to do; None without one."""
    affordable: Span | None
    """Of the examples left, those that the budget pays: where answers are longest, as expected, shortest."""
    time: Elapsed | None
    """Of what is left; of a loaded model only from a pilot."""
    gpus: list[GpuTime]
    """Of what is left, for a loaded model without a pilot."""
    notes: list[str]
    assumptions: list[str]
    created: float

    def to_dict(self) -> dict[str, Any]:
        """Ranges of three as {least, expected, most}."""
        data: dict[str, Any] = json.loads(json.dumps(asdict(self, dict_factory=_named)))
        return data

    def lines(self) -> list[str]:
        """For a terminal."""
        from llmemb_ray.synthesis.estimate_text import lines

        return lines(self)


def _named(items: list[tuple[str, Any]]) -> dict[str, Any]:
    return {name: value._asdict() if isinstance(value, Span) else value for name, value in items}


def preview(settings: SynthesizeSettings) -> Estimate:
    """Estimates what ``synthesize`` has left to do with these settings. Raises what it would raise before it asks."""
    output = Storage(absolute(settings.out.rstrip("/")), settings.access)
    asked, count, notes = _asked(settings)
    there = Standing.of(settings, asked, output, known=not notes)
    missing = [family for family in asked.brief.families if not there.pool.of(family)] if there.brainstorms and asked.brief.each else []
    draw = asked.draw(Pool([*there.pool, *(Task(family=family, task=STAND_IN, source="plan") for family in missing)]), asked.names[0])
    seen = [_Seen.of(draw.request(row), count, settings) for row in there.sample(settings.seed, SAMPLE)]
    families, margin = _families(seen, there)
    tasks = _tasks(asked, there, count, settings)
    left = _sum([*tasks.values(), *families.values()])
    money = _money(settings, there, tasks, families)
    asks = {"requests": left.requests, "prompt_tokens": left.prompt_tokens, "answer_tokens": left.answer_tokens.expected}
    on_gpu = settings.gpus_per_actor != 0 and (parse_actors(settings.actors) != (0, 0) or models.default_device() == "cuda")
    loads = settings.model is not None and there.rate is None
    return Estimate(
        out=settings.out,
        generator=asked.names[0],
        examples=there.examples,
        done=there.examples - there.left,
        left=left,
        tasks=tasks,
        families=families,
        sample=len(seen),
        prompt_tokens_margin=margin,
        counted_by=count.name,
        measured=there.answered if there.tokens else 0,
        **money,
        spent_tokens=there.spent,
        budget=settings.budget,
        time=None if loads or not left.requests else times.elapsed(settings, **asks, rate=there.rate),
        gpus=times.on_gpus(settings, count.config, **asks, utilization=UTILIZATION) if loads and on_gpu and count.config and left.requests else [],
        notes=[*notes, *_notes(settings, there, seen, count, on_gpu)],
        assumptions=_assumptions(
            settings, asked, there, tasks, missing, count, len(seen), margin / max(1.0, left.prompt_tokens), not loads or (on_gpu and count.config is not None)
        ),
        created=time.time(),
    )


@dataclass(frozen=True)
class _Count:
    """What counts tokens. config, positions: of a model whose files are here."""

    name: str
    prompt: Callable[[str], float]
    text: Callable[[str], float]
    config: Any = None
    positions: int | None = None


def _asked(settings: SynthesizeSettings) -> tuple[Asked, _Count, list[str]]:
    """(what is asked for, what counts its tokens, notes)."""
    by_characters = _Count(
        f"characters over {CHARACTERS_PER_TOKEN}", prompt=lambda text: len(text) / CHARACTERS_PER_TOKEN, text=lambda text: len(text) / CHARACTERS_PER_TOKEN
    )
    if settings.model is None:
        return Asked.of(settings), by_characters, []
    try:
        asked = Asked.of(settings)
        assert asked.specs is not None
        spec = next(iter(asked.specs.values()))
        path = models.fetch(spec.source, spec.access, weights=False)
        return asked, _tokenizer(path, spec), []
    except ModelError as error:
        asked = Asked.of(settings.model_copy(update={"model": None, "llm": settings.model}))
        return asked, by_characters, [f"the model cannot be read here, so its tokens are not counted and what OUT holds is taken for its own: {error}"]


def _tokenizer(path: Path, spec: ModelSpec) -> _Count:
    config = models.load_config(path, trust_remote_code=spec.trust_remote_code)
    tokens = PromptTokens(path, spec, config)
    return _Count(
        "the model's tokenizer" + (" and chat template" if tokens.chats else ""),
        lambda text: len(tokens.ids(Prompt(text=text))),
        lambda text: len(tokens.tokenizer(text, add_special_tokens=False)["input_ids"]),
        config,
        tokens.positions,
    )


@dataclass(frozen=True)
class _Seen:
    """A request of the sample. uncut: tokens that its answer is expected to have if nothing ends it."""

    family: str
    prompt: float
    answer: Span
    uncut: float

    @classmethod
    def of(cls, request: Request, count: _Count, settings: SynthesizeSettings) -> _Seen:
        skeleton = count.text(json.dumps(dict.fromkeys(FAMILIES[request.family].keys, "")))
        answer = lengths.answer_tokens(request, skeleton=skeleton, max_characters=settings.max_characters)
        return cls(request.family, count.prompt(request.prompt), answer.up_to(settings.max_new_tokens), answer.expected)


def _families(seen: list[_Seen], there: Standing) -> tuple[dict[str, Part], float]:
    """(examples left by family, two standard errors of their prompt tokens)."""
    if not seen:
        return {}, 0.0
    scale = there.left / len(seen)
    prompts, answers = [one.prompt for one in seen], [one.answer for one in seen]
    prompt_scale, spread = scale, statistics.pstdev(prompts) / statistics.fmean(prompts)
    margin = 2 * spread / math.sqrt(len(seen)) * math.sqrt(max(0.0, 1 - len(seen) / there.left))
    if there.tokens:
        wide, usual = 2 * SPREAD / math.sqrt(there.answered), statistics.fmean(answer.expected for answer in answers)
        ends = Span(max(0.0, 1 - wide), 1.0, 1 + wide).times(there.tokens[1] / usual)
        answers = [ends.times(answer.expected) for answer in answers]
        prompt_scale, margin = scale * there.tokens[0] / statistics.fmean(prompts), 2 * spread / math.sqrt(there.answered)
    parts = {}
    for family in FAMILIES:
        of = [place for place, one in enumerate(seen) if one.family == family]
        if of:
            parts[family] = Part(
                requests=round(len(of) * scale),
                prompt_tokens=sum(prompts[place] for place in of) * prompt_scale,
                answer_tokens=_total(answers[place] for place in of).times(scale),
            )
    return parts, margin * sum(part.prompt_tokens for part in parts.values())


def _tasks(asked: Asked, there: Standing, count: _Count, settings: SynthesizeSettings) -> dict[str, Part]:
    expected = TASKS_AN_ANSWER * (lengths.TASK_WORDS * lengths.ENGLISH + 3)
    most = MOST_TASKS * TASK_CHARACTERS / CHARACTERS_PER_TOKEN
    answer = Span(expected / 2, expected, most).up_to(settings.max_new_tokens)
    parts = {}
    for family in asked.brief.families if there.brainstorms else ():
        calls = max(0, math.ceil(asked.brief.each / TASKS_AN_ANSWER) - there.calls.get(family, 0))
        if calls:
            prompt = count.prompt(asked.brief.prompts.brainstorm[family])
            parts[family] = Part(requests=calls, prompt_tokens=calls * prompt, answer_tokens=answer.times(calls))
    return parts


def _sum(parts: list[Part]) -> Part:
    answers = _total(part.answer_tokens for part in parts)
    return Part(requests=sum(part.requests for part in parts), prompt_tokens=sum(part.prompt_tokens for part in parts), answer_tokens=answers)


def _total(spans: Iterable[Span]) -> Span:
    total = Span()
    for span in spans:
        total = total.plus(span)
    return total


def _money(settings: SynthesizeSettings, there: Standing, tasks: dict[str, Part], families: dict[str, Part]) -> dict[str, Any]:
    """The fields spent, cost, enough and affordable."""
    if settings.price_in is None and settings.price_out is None:
        return dict.fromkeys(("spent", "cost", "enough", "affordable"))
    price_in, price_out = ((price or 0.0) / MILLION for price in (settings.price_in, settings.price_out))

    def cost(parts: dict[str, Part]) -> Span:
        part = _sum(list(parts.values()))
        return Span(*(part.prompt_tokens * price_in + tokens * price_out for tokens in part.answer_tokens))

    spent = there.spent[0] * price_in + there.spent[1] * price_out
    of_tasks, of_examples = cost(tasks), cost(families)
    found: dict[str, Any] = {"spent": spent, "cost": of_tasks.plus(of_examples), "enough": None, "affordable": None}
    if settings.budget is None:
        return found
    rests = of_tasks.times(-1).plus(Span(*[settings.budget - spent] * 3))
    paid = [there.left if one <= max(0.0, rest) else there.left * max(0.0, rest) / one for one, rest in zip(of_examples, rests, strict=True)]
    return found | {"enough": of_examples.expected <= rests.expected, "affordable": Span(*(float(math.floor(count)) for count in reversed(paid)))}


def _notes(settings: SynthesizeSettings, there: Standing, seen: list[_Seen], count: _Count, on_gpu: bool) -> list[str]:
    notes = []
    if there.answered and not there.tokens:
        notes.append("the answers in OUT do not tell their tokens, so that these are assumed")
    if there.accepted and there.left:
        of_all = there.examples * there.accepted / there.committed
        notes.append(
            f"{there.accepted:,} of the {there.committed:,} examples committed were accepted; at that rate {of_all:,.0f} of {there.examples:,} will be"
        )
    cut = sum(one.uncut > settings.max_new_tokens for one in seen) / max(1, len(seen))
    if cut > NOTABLE and not there.tokens:
        notes.append(f"{cut:.0%} of the answers are expected to be longer than max_new_tokens={settings.max_new_tokens:,}: they would be cut and rejected")
    long = sum(one.prompt + settings.max_new_tokens > (count.positions or math.inf) for one in seen)
    if long:
        notes.append(f"{long / len(seen):.0%} of the prompts and max_new_tokens exceed the model's {count.positions:,} positions together: no answer to these")
    if settings.tasks_only:
        notes.append("tasks_only stops when the tasks are there; the examples here are what the same command without it would make")
    if settings.overwrite:
        notes.append("overwrite begins anew: what OUT holds is not reckoned with")
    if settings.model is not None and there.rate is None and not on_gpu:
        notes.append("how long a model takes without a GPU is not known here: make some first (--count 200) and plan again")
    if settings.model is not None and there.rate is None and on_gpu and count.config and models.parameters(count.config) < SMALL_MODEL:
        notes.append(f"with {models.parameters(count.config) / 1e6:,.1f} M parameters the model is too small to keep a GPU busy: expect more hours")
    if any(getattr(count.config, name, None) for name in ("num_local_experts", "num_experts")):
        notes.append("a mixture of experts is reckoned as if it had one expert a layer: weights and times are too low")
    return notes


def _assumptions(
    settings: SynthesizeSettings,
    asked: Asked,
    there: Standing,
    tasks: dict[str, Part],
    missing: list[str],
    count: _Count,
    sample: int,
    margin: float,
    timed: bool,
) -> list[str]:
    drawn = "" if sample == there.left else f" on {sample:,} requests drawn from those left, ± {margin:.1%}"
    lines = [f"prompt tokens are counted by {count.name}{drawn}" if not there.tokens else ""]
    if tasks:
        lines.append(
            f"an answer to brainstorming has {TASKS_AN_ANSWER} tasks of {lengths.TASK_WORDS} words, none of which came before; where tasks repeat, "
            f"up to {asked.brief.most_calls:,} calls are made for a family"
        )
    if missing:
        lines.append(f"there are no tasks of {', '.join(missing)} yet: a sentence of {len(STAND_IN)} characters stands in for each")
    if there.tokens:
        lines.append(
            f"what is left has the mean tokens of the {there.answered:,} answers that are there ({there.tokens[0]:,.1f} of prompts, {there.tokens[1]:,.1f} of "
            f"answers), ± {2 * SPREAD / math.sqrt(there.answered):.0%}; how the families share them is assumed"
        )
    else:
        lines += [
            f"a text has {lengths.MORE:g} times the words where at least so many are asked for, the middle of two bounds, and without a rule a quarter of "
            "what it may have (a sentence 15 words, a passage 62)",
            f"a word has {lengths.ENGLISH:g} tokens in English, and elsewhere the geometric mean of that and what a vocabulary of 32,000 takes "
            f"({lengths.SMALL_VOCABULARY['LATIN']:g} in Latin script, {lengths.SMALL_VOCABULARY['DEVANAGARI']:g} in Devanagari)",
            "least: the fewest words that the rules allow; most: what schema and max_new_tokens let through",
            "what a model thinks before it answers is not counted; make some first (--count 200) and plan again: their tokens and speed then take the "
            "place of these assumptions",
        ]
    if timed:
        lines += times.assumptions(settings, rate=there.rate)
    lines.append("no request fails or is asked again; what is rejected, or a duplicate, is paid as well and not asked anew")
    return [line for line in lines if line]
