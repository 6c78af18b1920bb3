"""Making candidates of demonstrations: samples sentences, asks for their words, samples dictionaries, writes one file.

Invariant: OUT is written once, at the end, whole. Answers are kept in OUT.answers.jsonl as they come, so that a killed build
goes on, and what was dropped stands in OUT.rejects.jsonl with its reason, for as long as OUT has no word for the sentence.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from typing import Any

from llmemb_ray.config.demonstrations import DemosBuildSettings
from llmemb_ray.demonstrations import summaries, words
from llmemb_ray.demonstrations.candidates import Candidate, json_object, numbered_lines, read_candidates, unique, write_candidates
from llmemb_ray.demonstrations.dictionary import read_dictionary
from llmemb_ray.demonstrations.sentences import Sentences, read_sentences, sample
from llmemb_ray.errors import InputError, OutputError, RunFailed
from llmemb_ray.generation.answers import Answers
from llmemb_ray.generation.generator import Answer, Generator
from llmemb_ray.generation.opening import opened, specs_of
from llmemb_ray.storage import absolute, locate, redact
from llmemb_ray.written import json_lines

Say = Callable[[str], None]


@dataclass(frozen=True, kw_only=True)
class Built:
    """The accounts of a build: candidates = earlier + summed_up + definitions − duplicates, and sentences = summed_up + all dropped."""

    out: str
    candidates: int
    earlier: int = 0
    """Candidates that were in OUT before."""
    sentences: int = 0
    summed_up: int = 0
    definitions: int = 0
    duplicates: int = 0
    asked_now: int = 0
    """Sentences that this command asked about; the answers for the others were kept."""
    prompt_tokens: int = 0
    completion_tokens: int = 0
    retries: int = 0
    repairs: dict[str, int] = field(default_factory=dict)
    """Answers by what was done to them; one may count under several."""
    dropped: dict[str, int] = field(default_factory=dict)
    """Answers by why they were dropped."""
    passed_over: int = 0
    """Entries of the dictionaries that are several words or have no definition."""
    rejects: str | None = None
    """The file of dropped answers, with those of earlier builds that ``append`` adds to."""

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    def lines(self) -> list[str]:
        """As the command prints it."""
        shown = []
        if self.sentences:
            dropped = f", {sum(self.dropped.values()):,} dropped ({_counts(self.dropped)})" if self.dropped else ", none dropped"
            shown.append(f"{self.sentences:,} sentences asked about: {self.summed_up:,} words{dropped}")
            if self.repairs:
                shown.append(f"repaired: {_counts(self.repairs)}")
            used = f", {self.prompt_tokens:,} prompt tokens, {self.completion_tokens:,} new ones" if self.prompt_tokens else ""
            again = f", {self.retries:,} requests tried again" if self.retries else ""
            shown.append(f"{self.asked_now:,} asked now, {self.sentences - self.asked_now:,} answers kept from before{used}{again}")
        if self.definitions or self.passed_over:
            shown.append(f"{self.definitions:,} definitions sampled; {self.passed_over:,} entries of several words or without definition passed over")
        earlier = f"{self.earlier:,} from before, " if self.earlier else ""
        shown.append(f"{self.out} holds {self.candidates:,} candidates ({earlier}{self.duplicates:,} duplicates left out)")
        if self.rejects:
            shown.append(f"{self.rejects} holds what was dropped")
        return shown


def build(settings: DemosBuildSettings, say: Say = lambda _: None) -> Built:
    """Makes the candidates that the settings describe and writes them to OUT.

    say: told of the progress. Raises ConfigError, InputError, ModelError, OutputError or StorageError, and RunFailed where
    sentences stay unanswered (the same command then goes on), or where no answer is a word: what came from elsewhere is then written.
    """
    out = absolute(settings.out)
    earlier = _earlier(settings, out)
    rejected = _earlier_rejects(settings, _beside(out, "rejects"))
    pooled = [read_sentences(name, data=settings.data, column=settings.sentence_column, access=settings.access) for name in settings.sentences]
    read = [read_dictionary(name, settings.access) for name in settings.dictionary]
    sources: dict[str, str] = {}
    for source in pooled:
        for sentence in _sampled(source, settings, say):
            sources.setdefault(sentence, source.source)
    defined = [candidate for one in read for candidate in sample(one.candidates, settings.dictionary_count, settings.seed)]
    for name, one in zip(settings.dictionary, read, strict=True):
        if not one.candidates:
            raise InputError(f"dictionary: {name} has no entry that is one word with a definition; {one.passed_over:,} are not")
        if len(one.candidates) < settings.dictionary_count:
            say(f"note: {name} has {len(one.candidates):,} entries that can be demonstrations; all are taken")
    facts: dict[str, Any] = {}
    summed_up, rejects = _summed_up(list(sources.items()), settings, out, say, facts) if sources else ([], [])
    made = [*earlier, *summed_up, *defined]
    candidates = unique(made)
    with_word = {candidate.sentence for candidate in candidates}
    rejected = {sentence: reject for sentence, reject in rejected.items() if sentence not in with_word} | {reject["sentence"]: reject for reject in rejects}
    rejects_url = _beside(out, "rejects")
    storage, name = locate(rejects_url, settings.access)
    if rejected:
        storage.put(name, json_lines(rejected.values()))
    else:
        storage.delete([name])
    dropped = dict(Counter(str(reject["reason"]).split(":")[0] for reject in rejects).most_common())
    if candidates:
        write_candidates(out, candidates, settings.access)
    if sources and not summed_up:
        written = f"{redact(out)} holds its other {len(candidates):,} candidates" if candidates else f"{redact(out)} is not written"
        way_out = "raise max_new_tokens" if "cut off" in dropped else "ask another model"
        raise RunFailed(f"none of {len(sources):,} answers is one word ({_counts(dropped)}), see {redact(rejects_url)}; {written}; {way_out}")
    return Built(
        out=out,
        candidates=len(candidates),
        earlier=len(earlier),
        sentences=len(sources),
        summed_up=len(summed_up),
        definitions=len(defined),
        duplicates=len(made) - len(candidates),
        dropped=dropped,
        passed_over=sum(one.passed_over for one in read),
        rejects=rejects_url if rejected else None,
        **facts,
    )


def _beside(out: str, kind: str) -> str:
    return f"{out}.{kind}.jsonl"


def _earlier(settings: DemosBuildSettings, out: str) -> list[Candidate]:
    storage, name = locate(out, settings.access)
    if storage.is_directory(name):
        raise OutputError(f"out: {storage.display(name)} is a directory; name a file, such as {settings.out.rstrip('/')}/candidates.jsonl")
    if not storage.exists(name) or settings.overwrite:
        return []
    if not settings.append:
        raise OutputError(f"out: {storage.display(name)} is there already; add to it with append, replace it with overwrite, or name another file")
    return read_candidates(out, settings.access)


def _earlier_rejects(settings: DemosBuildSettings, url: str) -> dict[str, dict[str, Any]]:
    """Sentence -> record of what was dropped before, where OUT is added to. Raises InputError."""
    storage, name = locate(url, settings.access)
    if not settings.append or not storage.exists(name):
        return {}
    records = {}
    for number, line in numbered_lines(url, settings.access):
        where = f"{redact(url)} line {number}"
        record = json_object(line, where)
        if not isinstance(record.get("sentence"), str):
            raise InputError(f"{where} has no sentence; delete the line")
        records[record["sentence"]] = record
    return records


def _sampled(source: Sentences, settings: DemosBuildSettings, say: Say) -> list[str]:
    if source.empty:
        say(f"note: {source.empty:,} empty rows of {source.source} are passed over")
    if len(source.sentences) < settings.count:
        say(f"note: {source.source} has {len(source.sentences):,} distinct sentences; all are taken")
    return sample(source.sentences, settings.count, settings.seed)


def _summed_up(
    chosen: Sequence[tuple[str, str]], settings: DemosBuildSettings, out: str, say: Say, facts: dict[str, Any]
) -> tuple[list[Candidate], list[dict[str, Any]]]:
    """(candidates, records of dropped answers) of (sentence, source) pairs; what it took is put into ``facts``."""
    sentences = [sentence for sentence, _ in chosen]
    answers = Answers(_beside(out, "answers"), settings.access)
    try:
        with _generator(settings, sentences, answers) as generator:
            left = len(summaries.unanswered(sentences, generator.name, answers))
            say(f"asking {generator.name} about {left:,} sentences" + (f"; {len(sentences) - left:,} were answered before" if left < len(sentences) else ""))
            asked = summaries.ask(sentences, generator, answers, say)
    finally:
        answers.close()
    candidates, rejects = [], []
    repairs: Counter[str] = Counter()
    for (sentence, source), answer in zip(chosen, asked.answers, strict=True):
        reading = words.read(answer.text, continues=answer.continues, cut=answer.cut) if answer.text is not None else None
        if reading is not None and reading.word is not None:
            candidates.append(Candidate(sentence=sentence, word=reading.word, source=source))
            repairs.update(reading.repairs)
        else:
            rejects.append({"sentence": sentence, "source": source, "answer": answer.text, "reason": _reason(answer, reading)})
    facts |= {"asked_now": asked.asked, "prompt_tokens": asked.prompt_tokens, "completion_tokens": asked.completion_tokens}
    facts |= {"retries": asked.retries, "repairs": dict(repairs.most_common())}
    return candidates, rejects


def _reason(answer: Answer, reading: words.Reading | None) -> str:
    return f"refused: {answer.problem}" if reading is None else str(reading.reason)


@contextmanager
def _generator(settings: DemosBuildSettings, sentences: Sequence[str], answers: Answers) -> Iterator[Generator]:
    """Whom the settings ask; a model is not loaded where all is answered. Raises ConfigError or ModelError."""
    specs = None if settings.model is None else specs_of(settings)
    for spec in (specs or {}).values():
        if not summaries.unanswered(sentences, spec.name, answers):
            yield _Answered(spec.name)
            return
    with opened(settings, specs) as generator:
        yield generator


@dataclass(frozen=True)
class _Answered:
    """A generator of which nothing is asked."""

    name: str

    def generate(self, prompts: Any) -> Iterator[tuple[int, Answer]]:
        raise AssertionError("all prompts have answers")


def _counts(counts: dict[str, int]) -> str:
    return ", ".join(f"{count:,} {name}" for name, count in counts.items())
