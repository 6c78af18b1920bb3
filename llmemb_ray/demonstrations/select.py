"""The search for the demonstrations that serve a model best (paper 1, section 3.2), from settings to a representation file.

Invariant: each score is on disk before the next step builds on it, so that the same command continues a search that
was stopped; what is on disk is not computed again. The texts are tokenised once for all candidates.
"""

from __future__ import annotations

import contextlib
import json
import posixpath
import shlex
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field, replace
from typing import Any, TypeAlias

from llmemb_ray.config import DemosSelectSettings
from llmemb_ray.config.demonstrations import TRANSFER
from llmemb_ray.demonstrations import chart
from llmemb_ray.demonstrations.candidates import read_candidates
from llmemb_ray.demonstrations.halving import Agreement, Round, agreement, halve, rank, sizes
from llmemb_ray.demonstrations.leaderboard import Leaderboard, Place
from llmemb_ray.demonstrations.scoring import Exam, Examiner, Trial, drawn, representation, sts_exam, tokenize, transfer_exam
from llmemb_ray.embedders.beside import representation_of
from llmemb_ray.embedders.embedder import EmbedderSpec, settle
from llmemb_ray.errors import ConfigError, InputError, ItemsFailed, RunFailed
from llmemb_ray.evaluation import transfer
from llmemb_ray.evaluation.data import DataPlace
from llmemb_ray.pipeline.pool import Pool, pool
from llmemb_ray.representation import Demonstration, Representation
from llmemb_ray.representation.representation import FILE_NAME
from llmemb_ray.storage import Storage, absolute, redact

Prompt: TypeAlias = tuple[Demonstration, ...]

PAGE, SUMMARY = "leaderboard.html", "selection.json"

TELL_SECONDS = 10.0
"""Between two lines of progress."""

MODEL_OPTIONS = (
    *("model", "revision", "adapter", "backend", "compute_dtype", "quantization", "tensor_parallel", "engine_arg", "trust_remote_code", "allow_pickle"),
    *("rope_theta", "sliding_window", "endpoint_url"),
)
"""Settings that a representation file does not hold, and that embedding with it must be given as the search was."""

SHOWN = 60
"""Characters of a sentence in a row of the table."""


@dataclass(frozen=True, kw_only=True)
class Selection:
    """What a search found.

    ranking: prompts scored on the whole exam, best first; zero_shot: score × 100 without demonstrations
    winner: the best prompt, () where none is better than zero-shot
    """

    exam: str
    out: str
    zero_shot: float
    ranking: list[Place]
    winner: Prompt
    candidates: int
    scored: int
    """Trials scored by this command."""
    found: int
    """Trials that were on disk before."""
    retokenized: int
    """Prompts that were tokenised whole, of this command's."""
    tokens: int
    computed: int
    seconds: float
    embed: str
    """The command that embeds with the winner and the search's model."""
    agreement: Agreement | None = None
    rounds: list[dict[str, int]] = field(default_factory=list)
    """Of halving: candidates and items of each round."""

    def to_dict(self) -> dict[str, Any]:
        return asdict(self) | {"ranking": [place.to_dict() for place in self.ranking], "winner": [asdict(shown) for shown in self.winner]}

    def lines(self, top: int) -> list[str]:
        """The table and what must be known of it."""
        shown = [f"{self.exam}, zero-shot {self.zero_shot:.2f}", f"{'rank':>4}  {'score':>6}  {'gain':>6}  demonstration"]
        for place in self.ranking[:top]:
            text = _shown(place.demonstrations)
            if place.outcome.score is None:
                shown.append(f"   –       –       –  {text}: {place.outcome.problem}")
            else:
                shown.append(f"{place.rank:>4}  {place.outcome.score:6.2f}  {place.gain or 0:+6.2f}  {text}")
        gains = [place.gain for place in self.ranking if place.gain is not None]
        shown.append(f"{sum(gain > 0 for gain in gains):,} of {len(gains):,} prompts scored on everything are better than zero-shot")
        if self.rounds:
            shown.append("halving: " + ", ".join(f"{one['candidates']} on {one['items']}" for one in self.rounds))
        if self.agreement is not None:
            shown += _agreement_lines(self.agreement)
        if not self.winner:
            shown.append("no candidate is better than the zero-shot prompt, which is what was written")
        return [*shown, f"embed with it: {self.embed}"]


def select(settings: DemosSelectSettings, *, say: Callable[[str], None] = lambda line: None) -> Selection:
    """Scores the candidates, keeps the leaderboard in ``settings.out`` and writes the best prompt there as ``llmemb.json``.

    Raises ConfigError, InputError, ModelError, RunMismatch, StorageError or RunFailed.
    """
    started = time.perf_counter()
    data = DataPlace.of(settings.data)
    exam, candidates = _exam_and_candidates(settings, data)
    spec = settle(settings)
    board = Leaderboard(Storage(absolute(settings.out), settings.access), size=exam.size, seed=settings.seed)
    board.check(_identity(spec, exam), _engine(spec))
    found = len(board)
    with ExitStack() as stack:
        scorer = Scorer(settings, spec, exam, board, stack, longest=_longest(spec, candidates, settings.demos_per_prompt), say=say)
        search = Search(settings, exam, scorer)
        prompts = search.run(candidates)
    zero = scorer.zero_shot()
    assert zero is not None
    ranking = board.ranking(prompts)
    if not ranking or ranking[0].outcome.score is None:
        problem = next((outcome.problem for prompt in prompts if (outcome := board.find(prompt)) and outcome.problem), "none was scored")
        raise InputError(f"none of the {len(candidates):,} candidates can be scored: {problem}")
    winner = ranking[0].demonstrations if ranking[0].outcome.score > zero else ()
    selection = Selection(
        exam=exam.name,
        out=settings.out,
        zero_shot=zero,
        ranking=ranking,
        winner=winner,
        candidates=len(candidates),
        scored=scorer.scored,
        found=found,
        retokenized=scorer.retokenized,
        tokens=scorer.tokens,
        computed=scorer.computed,
        seconds=time.perf_counter() - started,
        embed=_embed_command(settings),
        agreement=_agreement(settings, board, candidates, exam.size),
        rounds=[{"candidates": len(step.ranked), "items": step.size} for step in search.rounds],
    )
    _write(selection, board, representation(representation_of(settings), winner), spec.model.name)
    return selection


def _exam_and_candidates(settings: DemosSelectSettings, data: DataPlace) -> tuple[Exam, list[Prompt]]:
    if settings.transfer_task is None:
        assert settings.candidates is not None
        singles = [(candidate.demonstration,) for candidate in read_candidates(settings.candidates, settings.access)]
        pairs = sts_exam(data, raw=settings.raw, seed=settings.seed)
        _check_samples(settings, pairs)
        return pairs, list(dict.fromkeys(singles))
    if settings.transfer_task.casefold() not in map(str.casefold, transfer.KINDS):
        raise ConfigError(
            f"for: {settings.for_!r} names no task to choose for; give one of {', '.join(TRANSFER + name for name in transfer.KINDS if name != 'MRPC')}"
        )
    task = transfer.load(settings.transfer_task, data, classifier=settings.classifier, folds=settings.folds, seed=settings.seed)
    prompts = drawn(task, count=settings.draws, each=settings.demos_per_prompt, cleaning=settings.clean, seed=settings.seed)
    labelled = transfer_exam(task, examples=settings.examples)
    _check_samples(settings, labelled)
    return labelled, prompts


def _check_samples(settings: DemosSelectSettings, exam: Exam) -> None:
    """Raises ConfigError, before a model is loaded, where the smallest sample is too small to be scored."""
    smallest = sizes(exam.size, settings.halving_first)[0] if settings.halving else exam.size
    try:
        exam.check(smallest)
    except ConfigError as error:
        if smallest == exam.size:
            raise
        more = " or more --examples" if settings.examples else ""
        raise ConfigError(f"halving_first: the first sample is {smallest} of {exam.size} items: {error}. Set a smaller --halving-first{more}") from error


def _identity(spec: EmbedderSpec, exam: Exam) -> dict[str, Any]:
    """What scores must have in common to be compared, as far as it is known before a model is loaded."""
    return {"exam": {"name": exam.name, "size": exam.size, "digest": exam.digest}, "space": spec.space.to_dict()}


def _engine(spec: EmbedderSpec) -> dict[str, Any]:
    """What is settled of it: all once a model is loaded, before that what the settings name."""
    found = {"backend": spec.backend, "compute_dtype": spec.compute_dtype, "quantization": spec.quantization}
    return {name: value for name, value in found.items() if value != "auto"}


def _longest(spec: EmbedderSpec, candidates: list[Prompt], each: int) -> Representation:
    """With about as long a beginning as any prompt will have that fits."""
    candidates = sorted(candidates, key=lambda prompt: sum(len(shown.sentence) + len(shown.word) for shown in prompt), reverse=True)
    for start in range(len(candidates)):
        shown = candidates[start] if len(candidates[start]) > 1 else sum(candidates[start : start + each], ())
        found = representation(spec.representation, shown)
        with contextlib.suppress(ConfigError):
            replace(spec, representation=found).prompter("document")
            return found
    return spec.representation


class Scorer:
    """Scores prompts that are not on disk yet, beside the actors; the model is loaded when the first one is wanted.

    The zero-shot prompt is scored on everything beside the first of them.
    """

    def __init__(
        self,
        settings: DemosSelectSettings,
        spec: EmbedderSpec,
        exam: Exam,
        board: Leaderboard,
        stack: ExitStack,
        *,
        longest: Representation,
        say: Callable[[str], None],
    ) -> None:
        """longest: what the model is loaded with, since vLLM settles by it whether and how much it caches."""
        self._longest = longest
        self._settings, self._spec, self._exam, self._board, self._stack, self._say = settings, spec, exam, board, stack, say
        self._workers: Pool | None = None
        self._examiner: Examiner | None = None
        self.scored = self.retokenized = self.tokens = self.computed = 0

    def __call__(self, prompts: Sequence[Prompt], size: int) -> dict[Prompt, float | None]:
        """Score × 100 of each prompt on the first ``size`` items."""
        wanted = dict.fromkeys([Trial((), self._exam.size), *(Trial(prompt, size) for prompt in prompts)])
        trials = [trial for trial in wanted if self._board.get(trial) is None]
        self.zero_shot()
        if trials:
            try:
                self._score(trials, size)
            except RunFailed as error:
                raise self._told(error, trials) from error
        return {prompt: self._board.outcome(prompt, size).score for prompt in prompts}

    def zero_shot(self) -> float | None:
        """Score × 100 without demonstrations on everything; None before it is known. Raises InputError where there can be none."""
        outcome = self._board.get(Trial((), self._exam.size))
        if outcome is not None and outcome.score is None:
            raise InputError(f"{self._exam.name} cannot be scored with the zero-shot prompt: {outcome.problem}")
        return None if outcome is None else outcome.score

    def _told(self, error: RunFailed, trials: list[Trial]) -> RunFailed:
        """The error with the prompts that it came at, which the pool knows by their numbers."""
        prompts = [trials[number].demonstrations for number in error.items] if isinstance(error, ItemsFailed) else []
        at = f"That was scoring {' or '.join(_shown(prompt) or 'the zero-shot prompt' for prompt in prompts)}. " if prompts else ""
        past = (
            f"; if it fails there again, leave the candidate out of {redact(self._settings.candidates)}" if any(prompts) and self._settings.candidates else ""
        )
        stands = f"The {self.scored:,} scores that this command made stand in {redact(self._settings.out)}, the same command goes on from them{past}."
        return RunFailed(f"{error}\n{at}{stands}")

    def _score(self, trials: list[Trial], size: int) -> None:
        workers, examiner = self._open()
        started = told = time.perf_counter()
        best = self._board.best(size)
        for done, (number, outcome) in enumerate(workers.run(examiner, trials), 1):
            self._board.add(trials[number], outcome)
            self.zero_shot()
            self.scored += 1
            self.retokenized += outcome.retokenized
            self.tokens += outcome.tokens
            self.computed += outcome.computed
            if outcome.score is not None and trials[number].demonstrations:
                best = outcome.score if best is None else max(best, outcome.score)
            now = time.perf_counter()
            if now - told >= TELL_SECONDS and done < len(trials):
                told, left = now, (now - started) / done * (len(trials) - done)
                shown = "" if best is None else f", best {best:.2f}"
                self._say(f"{done:,} of {len(trials):,} prompts scored on {size:,} of {self._exam.name}{shown}; about {left:,.0f} s to go")

    def _open(self) -> tuple[Pool, Examiner]:
        if self._workers is None or self._examiner is None:
            self._workers = self._stack.enter_context(pool(self._settings, replace(self._spec, representation=self._longest)))
            self._board.claim(_identity(self._spec, self._exam), _engine(self._workers.spec))
            self._examiner = Examiner(exam=self._exam, base=self._spec.representation, rows=tokenize(self._spec, self._exam.texts))
        return self._workers, self._examiner


class Search:
    """Which prompts are scored, and on how much."""

    def __init__(self, settings: DemosSelectSettings, exam: Exam, score: Scorer) -> None:
        self._settings, self._size, self._score = settings, exam.size, score
        self.rounds: list[Round[Prompt]] = []
        """Of halving over single candidates."""

    def run(self, candidates: list[Prompt]) -> list[Prompt]:
        """All prompts that were considered. Transfer's candidates have all their demonstrations; others grow by one at a time."""
        considered = list(candidates)
        best = self._best(candidates)
        more = 0 if self._settings.transfer_task else self._settings.demos_per_prompt - 1
        for _ in range(more):
            longer = [(*head, *one) for head in best[: self._settings.beam] for one in candidates if one[0] not in head]
            if not longer:
                break
            considered += longer
            best = self._best(longer)
        return considered

    def _best(self, prompts: list[Prompt]) -> list[Prompt]:
        """Best first, by the score on everything."""
        if not self._settings.halving:
            return rank(prompts, self._score(prompts, self._size))
        rounds = halve(prompts, self._size, first=self._settings.halving_first, score=self._score)
        self.rounds = self.rounds or rounds
        return rounds[-1].ranked


def _agreement(settings: DemosSelectSettings, board: Leaderboard, candidates: list[Prompt], size: int) -> Agreement | None:
    """Halving against the full search, where all that both need is on disk, whichever command put it there."""

    def recorded(prompts: Sequence[Prompt], items: int) -> dict[Prompt, float | None]:
        return {prompt: board.outcome(prompt, items).score for prompt in prompts}

    first = settings.halving_first if settings.halving else -(-size // board.smallest())
    if first == 1:  # Nothing was scored on a sample.
        return None
    try:
        rounds = halve(candidates, size, first=first, score=recorded)
        return agreement(rounds, recorded(candidates, size))
    except KeyError:
        return None


def _write(selection: Selection, board: Leaderboard, winner: Representation, model: str) -> None:
    board.write(selection.ranking)
    board.storage.put(SUMMARY, (json.dumps(selection.to_dict(), indent=1, ensure_ascii=False) + "\n").encode())
    board.storage.put(FILE_NAME, (json.dumps(winner.to_dict(), indent=2, ensure_ascii=False) + "\n").encode())
    page = chart.page(selection.ranking, zero_shot=selection.zero_shot, title=f"Demonstrations for {posixpath.basename(model)}", axis=selection.exam)
    board.storage.put(PAGE, page.encode())


def _agreement_lines(found: Agreement) -> list[str]:
    winner = "finds the same best" if found.same_winner else f"ends with number {found.winner_rank}, {found.difference:.2f} below the best"
    lines = [f"halving against the full search: {winner}; {found.kept_of_best} of its best {found.best} were kept; {found.work:.0%} of the work"]
    return lines + [
        f"  {one['candidates']:.0f} candidates on {one['items']:.0f} items against on all: Spearman {one['spearman']:.2f}, Kendall {one['kendall']:.2f}"
        for one in found.correlations[:-1]
        if "spearman" in one
    ]


def _embed_command(settings: DemosSelectSettings) -> str:
    """Of the settings that were given; values of storage options, which may be secret, are left out."""
    words = ["llmemb", "embed", "INPUT", "OUTPUT"]
    for name in MODEL_OPTIONS:
        value, flag = getattr(settings, name), "--" + name.replace("_", "-")
        if name in settings.model_fields_set and value not in (None, False):
            for one in value if isinstance(value, list) else [value]:
                words += [flag] if one is True else [flag, redact(str(one))]
    return shlex.join([*words, "--representation", redact(settings.out)])


def _shown(prompt: Prompt) -> str:
    return "; ".join(f"{_shortened(one.sentence)} ⇒ {one.word}" for one in prompt)


def _shortened(text: str) -> str:
    text = " ".join(text.split())
    return text if len(text) <= SHOWN else text[: SHOWN - 1] + "…"
