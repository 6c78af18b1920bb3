"""What an actor does for the search: embed an exam's texts under some demonstrations, and score the vectors.

Invariant: every text is tokenised once, without demonstrations, before the search; a trial puts the tokens of its
demonstrations in front, and these are computed once for all texts. Equal texts are embedded once.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Protocol, TypeAlias

import numpy as np
import numpy.typing as npt

from llmemb_ray.embedders.embedder import Embedder, EmbedderSpec
from llmemb_ray.errors import ConfigError, InputError
from llmemb_ray.evaluation import sts
from llmemb_ray.evaluation.data import DataPlace
from llmemb_ray.evaluation.transfer import NOTHING, TransferTask
from llmemb_ray.representation import Demonstration, Form, Representation, TokenRows, templates
from llmemb_ray.representation.cleaning import Cleaning, clean
from llmemb_ray.representation.space import digest

Floats: TypeAlias = npt.NDArray[np.float32]
Places: TypeAlias = npt.NDArray[np.int64]


class Exam(Protocol):
    """What trials are scored on: items (pairs, labelled sentences) in a seeded order, over distinct texts."""

    @property
    def name(self) -> str: ...

    @property
    def texts(self) -> list[str]: ...

    @property
    def size(self) -> int:
        """Items in all."""

    @property
    def digest(self) -> str:
        """Of the data and of how they are scored."""

    def check(self, size: int) -> None:
        """Raises ConfigError where the first ``size`` items are too few to be scored."""

    def wanted(self, size: int) -> Places:
        """Positions in ``texts`` of what the first ``size`` items are made of."""

    def score(self, vectors: Floats, size: int) -> float:
        """The figure × 100 of the first ``size`` items; vectors: float32 [len(wanted(size)), D]."""


@dataclass(frozen=True, kw_only=True)
class PairExam:
    """Pairs of sentences with a gold score: Spearman's correlation of it with their cosines.

    left, right: int64 [P] positions in ``texts``; gold: float64 [P]; all three in the seeded order
    """

    name: str
    texts: list[str]
    left: Places
    right: Places
    gold: npt.NDArray[np.float64]

    @property
    def size(self) -> int:
        return len(self.gold)

    @property
    def digest(self) -> str:
        pairs = sorted(zip((self.texts[i] for i in self.left), (self.texts[i] for i in self.right), self.gold.tolist(), strict=True))
        return digest(pairs)[:16]

    def check(self, size: int) -> None:
        if np.ptp(self.gold[:size]) == 0:
            raise ConfigError(f"the gold scores of the {size} pairs of {self.name} are all the same, which ranks nothing")

    def wanted(self, size: int) -> Places:
        return np.unique(np.concatenate([self.left[:size], self.right[:size]]))

    def score(self, vectors: Floats, size: int) -> float:
        wanted = self.wanted(size)
        left, right = (vectors[np.searchsorted(wanted, side[:size])] for side in (self.left, self.right))
        return 100 * sts.spearman(sts.cosine(left, right), self.gold[:size])


def sts_exam(data: DataPlace, *, raw: bool, seed: int) -> PairExam:
    """STS-B dev; seed: of the order in which samples grow. Raises InputError."""
    pairs = sts.read(data, sts.DEV, "raw" if raw else "tokenized").subsets["all"]
    texts = list(dict.fromkeys([*pairs.left, *pairs.right]))
    places = {text: place for place, text in enumerate(texts)}
    order = np.random.default_rng(seed).permutation(len(pairs.gold))
    left, right = (np.array([places[text] for text in side], np.int64)[order] for side in (pairs.left, pairs.right))
    return PairExam(name=f"STS-B dev ({'raw' if raw else 'tokenized'})", texts=texts, left=left, right=right, gold=pairs.gold[order])


@dataclass(frozen=True, kw_only=True)
class LabelledExam:
    """The development data of a transfer task: accuracy of a linear classifier on the vectors.

    size counts training rows; a sample holds each label in its share.
    """

    name: str
    texts: list[str]
    task: TransferTask
    size: int

    @property
    def digest(self) -> str:
        task = self.task.development(self.size).task
        protocol = [task.classifier, task.folds, task.seed, task.kind.protocol]
        return digest([[[row.text, row.label] for row in task.rows], protocol])[:16]

    def check(self, size: int) -> None:
        self.task.development(size).check()

    def wanted(self, size: int) -> Places:
        places = {text: place for place, text in enumerate(self.texts)}
        return np.unique([places[row.text] for row in self.task.development(size).task.rows])

    def score(self, vectors: Floats, size: int) -> float:
        part = self.task.development(size)
        places = {self.texts[place]: row for row, place in enumerate(self.wanted(size))}
        return part.score([vectors[[places[row.text] for row in part.task.rows]]]).main


def transfer_exam(task: TransferTask, *, examples: int | None) -> LabelledExam:
    """examples: score on so many of the task's training rows; None for all."""
    part = task.development(examples).task
    texts = list(dict.fromkeys(row.text for row in part.rows))
    return LabelledExam(name=f"{task.name} dev", texts=texts, task=task, size=part.splits["train"])


def drawn(task: TransferTask, *, count: int, each: int, cleaning: Cleaning, seed: int) -> list[tuple[Demonstration, ...]]:
    """``count`` different prompts of ``each`` labelled training examples of the task, in a seeded order, cleaned as the texts are.

    One of each label where there are as many labels as examples. Raises ConfigError for a task that labels pairs.
    """
    examples = [Demonstration(clean(text, cleaning), word) for text, word in task.development().examples() if text != NOTHING]
    by_word = {word: [example for example in examples if example.word == word] for word in task.kind.words}
    random = np.random.default_rng(seed)
    found: dict[tuple[Demonstration, ...], None] = {}
    for _ in range(10 * count):
        if len(found) == count:
            break
        if each == len(by_word):
            one = [among[random.integers(len(among))] for among in by_word.values()]
            chosen = tuple(one[place] for place in random.permutation(each))
        else:
            chosen = tuple(examples[place] for place in random.choice(len(examples), size=min(each, len(examples)), replace=False))
        found[chosen] = None
    return list(found)


@dataclass(frozen=True)
class Trial:
    """One prompt to be scored on the first ``size`` items; without demonstrations it is the zero-shot prompt."""

    demonstrations: tuple[Demonstration, ...]
    size: int


@dataclass(frozen=True, kw_only=True)
class Outcome:
    score: float | None
    """× 100; None where the prompt cannot be scored."""
    problem: str = ""
    """Why not."""
    seconds: float = 0.0
    """Tokenising, embedding and scoring."""
    cpu_seconds: float = 0.0
    """Processor time of the process meanwhile, over all threads: what is to be compared on a machine that does other work too."""
    tokens: int = 0
    """Of all prompts, as if each were computed whole."""
    computed: int = 0
    """Tokens that went through the model."""
    retokenized: int = 0
    """Texts that were tokenised with their whole prompt."""


def representation(base: Representation, demonstrations: Sequence[Demonstration]) -> Representation:
    """``base``, of prompt prompteol, with these demonstrations."""
    form = Form(template=templates.prompteol(tuple(demonstrations)), clean=base.document.clean)
    return replace(base, document=form, query=form)


def tokenize(spec: EmbedderSpec, texts: list[str]) -> TokenRows:
    """The texts in the prompt of the spec. Raises InputError for one that cannot be embedded."""
    rows, unfit = spec.prompter("document").tokenize(texts)
    for text, problem in zip(texts, unfit, strict=True):
        if problem is not None:
            raise InputError(f"{text[:80]!r} cannot be embedded: {problem.detail}")
    return rows


@dataclass(frozen=True, kw_only=True)
class Examiner:
    """What the pool calls; travels to each actor once.

    base: the zero-shot representation; rows: the exam's texts in its prompt
    share: compute the demonstrations once for all texts; without it, with each text, to measure what sharing saves
    """

    exam: Exam
    base: Representation
    rows: TokenRows
    share: bool = True

    def __call__(self, embedder: Embedder, trial: Trial) -> Outcome:
        started, worked = time.perf_counter(), time.process_time()
        try:
            under = embedder.under(representation(self.base, trial.demonstrations))
            prompter = under.prompter("document")
        except ConfigError as error:  # The demonstrations leave no room for a text.
            return Outcome(score=None, problem=str(error))
        wanted = self.exam.wanted(trial.size)
        texts = [self.exam.texts[place] for place in wanted]
        rows, unfit, retokenized = prompter.extend(embedder.under(self.base).prompter("document"), self.rows.take(wanted), texts)
        problem = next((problem for problem in unfit if problem is not None), None)
        if problem is not None:
            return Outcome(score=None, problem=problem.detail)
        embedded = under.embed_tokens(rows, share=self.share)
        under.forget()  # Else each trial's prefix would stay in the accelerator's memory.
        if embedded.failed:
            return Outcome(score=None, problem=embedded.failed[min(embedded.failed)])
        score = self.exam.score(embedded.vectors, trial.size)
        return Outcome(
            score=score,
            seconds=time.perf_counter() - started,
            cpu_seconds=time.process_time() - worked,
            tokens=embedded.work.tokens,
            computed=embedded.work.computed,
            retokenized=retokenized,
        )
