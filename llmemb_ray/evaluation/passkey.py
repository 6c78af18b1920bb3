"""Passkey: how long a prompt may be before a vector loses one fact in it (personalised passkey retrieval, paper 2, section 5.2).

Invariant: a length means tokens of the whole prompt of a document, as the model's own tokenizer and template make it: never more,
and less by no more than one sentence of filler. Names, keys and places depend on the seed and the length alone, so that every model
gets the same facts; only how much filler stands around them is fitted to its tokenizer.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property

import numpy as np
import numpy.typing as npt

from llmemb_ray.config.evaluation import PASSKEY_LENGTHS, EvaluateSettings
from llmemb_ray.embedders.beside import representation_of
from llmemb_ray.embedders.embedder import EmbedderSpec
from llmemb_ray.errors import ConfigError
from llmemb_ray.evaluation.bitext import unit
from llmemb_ray.evaluation.suite import Building, Floats, Need, Score, Suite, Task, Texts, choose
from llmemb_ray.representation import Prompter

CANDIDATES, QUERIES = 100, 50
"""Documents, and questions, of each length (paper 2)."""

KEYS = range(1000, 100000)
"""Numbers of four or five digits."""

FILLER = ("The grass is green.", "The sky is blue.", "The sun is yellow.", "Here we go.", "There and back again.")
"""Paper 2's; repeated in turn."""

INSTRUCTION = "Given a question about a person's pass key, retrieve the document that states this person's pass key"
"""Ours: paper 2 prints none for this task."""

DEPTHS = 5
"""Parts of a document, from its beginning to its end, for which the share of facts found is told apart."""

FIRST_NAMES = (
    *("Ada", "Amir", "Anna", "Boris", "Carla", "Chen", "Clara", "David", "Diego", "Elena", "Emil", "Fatima", "Felix", "Grace", "Hana", "Hugo"),
    *("Ines", "Ivan", "Jonas", "Julia", "Karim", "Laura", "Leila", "Lucas", "Maria", "Marta", "Milan", "Nadia", "Noah", "Olga", "Omar", "Paula"),
    *("Peter", "Rosa", "Samuel", "Sofia", "Tomas", "Vera", "Victor", "Yuki"),
)
LAST_NAMES = (
    *("Adams", "Baker", "Berg", "Castro", "Clark", "Cohen", "Costa", "Dubois", "Fischer", "Garcia", "Gupta", "Haas", "Hansen", "Ito", "Jensen"),
    *("Keller", "Khan", "Kim", "Kovacs", "Lang", "Lopez", "Marino", "Meyer", "Moore", "Nguyen", "Novak", "Olsen", "Park", "Petrov", "Reyes"),
    *("Rossi", "Sato", "Silva", "Singh", "Smith", "Taylor", "Visser", "Wagner", "Walker", "Young"),
)

REFITS = 4
"""Times at most that filler is added to documents that came out short; taken away it is until they fit."""


@dataclass(frozen=True, kw_only=True)
class PasskeyTask:
    """One length in tokens."""

    name: str
    length: int
    seed: int
    prompter: Prompter = field(repr=False)
    """Of documents, which have no instruction."""
    left_out: str = ""
    """Lengths that were not run for want of room, with the way out."""

    def needs(self) -> list[Need]:
        asked = Texts(texts=[question(self._names[row]) for row in self._asked], role="query", instruction=INSTRUCTION)
        return [Texts(texts=self.documents[0], plain=True), asked]

    def score(self, embedded: list[Floats]) -> Score:
        documents, queries = embedded
        right = (unit(queries) @ unit(documents).T).argmax(axis=1) == self._asked
        depths = (self._depths[self._asked] * DEPTHS).astype(int).clip(max=DEPTHS - 1)
        by_depth = [100 * float(right[depths == depth].mean()) if (depths == depth).any() else None for depth in range(DEPTHS)]
        tokens = self.documents[1]
        counts = {"tokens_mean": float(tokens.mean()), "tokens_most": int(tokens.max()), "queries": QUERIES, "candidates": CANDIDATES}
        return Score(main=100 * float(right.mean()), parts=counts | {"by_depth": by_depth} | ({"left_out": self.left_out} if self.left_out else {}))

    @cached_property
    def documents(self) -> tuple[list[str], npt.NDArray[np.int64]]:
        """The candidates, and int64 [CANDIDATES] the tokens of their prompts."""
        return fitted([fact(name, key) for name, key in zip(self._names, self._keys, strict=True)], self._depths, self.length, self.prompter)

    @cached_property
    def _drawn(self) -> tuple[list[str], list[int], npt.NDArray[np.float64], npt.NDArray[np.int64]]:
        random = np.random.default_rng([self.seed, self.length])
        pairs = random.choice(len(FIRST_NAMES) * len(LAST_NAMES), CANDIDATES, replace=False)
        names = [f"{FIRST_NAMES[pair // len(LAST_NAMES)]} {LAST_NAMES[pair % len(LAST_NAMES)]}" for pair in pairs.tolist()]
        keys = [KEYS[number] for number in random.choice(len(KEYS), CANDIDATES, replace=False).tolist()]
        return names, keys, random.random(CANDIDATES), random.choice(CANDIDATES, QUERIES, replace=False)

    @property
    def _names(self) -> list[str]:
        return self._drawn[0]

    @property
    def _keys(self) -> list[int]:
        return self._drawn[1]

    @property
    def _depths(self) -> npt.NDArray[np.float64]:
        """float64 [CANDIDATES]: share of the filler that stands before the fact."""
        return self._drawn[2]

    @property
    def _asked(self) -> npt.NDArray[np.int64]:
        """int64 [QUERIES]: the documents that are asked for."""
        return self._drawn[3]


def fact(name: str, key: int) -> str:
    return f"{name}'s pass key is {key}. Remember it. {key} is the pass key for {name}."


def question(name: str) -> str:
    return f"what is the pass key for {name}?"


def filler(sentences: int) -> list[str]:
    return [FILLER[number % len(FILLER)] for number in range(sentences)]


def document(said: str, sentences: int, depth: float) -> str:
    """A fact among so many sentences of filler. depth: share of them that stands before it."""
    before, around = round(sentences * depth), filler(sentences)
    return " ".join([*around[:before], said, *around[before:]])


def fitted(facts: Sequence[str], depths: npt.NDArray[np.float64], length: int, prompter: Prompter) -> tuple[list[str], npt.NDArray[np.int64]]:
    """A document around each fact, and int64 [N] the tokens of their prompts: at most ``length``, and short of it by less than a sentence or two.

    What filler takes is measured on a few sentences, so that long documents are tokenised once, and again only where that was not exact.
    Raises ConfigError if a fact alone is longer.
    """

    def tokens(texts: list[str]) -> npt.NDArray[np.int64]:
        rows, _ = prompter.tokenize(texts)
        return rows.lengths + rows.truncated  # What was cut was longer.

    bare = tokens(list(facts))
    if bare.max() > length:
        raise ConfigError(f"lengths: {length} is too short for a passkey: with this template a fact alone takes {bare.max()} tokens or more")
    growing = [" ".join(filler(sentences)) for sentences in range(len(FILLER), 2 * len(FILLER) + 1)]
    steps = np.diff([len(offsets) for offsets in prompter.text_offsets(growing)])
    longest = max(1, int(steps.max()))
    taken = np.cumsum(np.resize(steps, (length // max(1, int(steps.sum())) + 1) * len(FILLER)))
    counts = np.searchsorted(taken, length - bare, side="right")
    texts, lengths = list(facts), bare.copy()
    stale, refits = np.arange(len(facts)), 0
    while len(stale):
        for row in stale.tolist():
            texts[row] = document(facts[row], int(counts[row]), float(depths[row]))
        lengths[stale] = tokens([texts[row] for row in stale.tolist()])
        excess = lengths - length
        fewer = np.where(excess > 0, -(-excess // longest), 0)
        more = np.where(excess < 0, -excess // longest, 0) if refits < REFITS else np.zeros_like(counts)
        refits += 1
        changed = np.clip(counts - fewer + more, 0, None)
        stale, counts = np.flatnonzero(changed != counts), changed
    return texts, lengths


def name_of(length: int) -> str:
    """1k for 1024."""
    return f"{length // 1024}k" if length % 1024 == 0 else str(length)


def build(building: Building) -> list[Task]:
    """The wanted lengths; of those of paper 2 the ones that ``max_tokens`` has room for, unless some are named.

    No tasks without an embedder: the texts are made for its tokenizer, no training data can hold them. Raises ConfigError.
    """
    if building.spec is None:
        return []
    settings, longest = building.settings, building.spec.representation.max_tokens
    assert longest is not None
    lengths = {name_of(length): length for length in settings.lengths or PASSKEY_LENGTHS}
    wanted = [name_of(int(name)) if name.isdecimal() else name for name in building.wanted]
    for name in wanted:
        if name.lower() not in lengths and name.lower().removesuffix("k").isdecimal():
            tokens = int(name[:-1]) * 1024 if name.lower().endswith("k") else int(name)
            raise ConfigError(f"suite: passkey:{name} is none of the lengths {', '.join(lengths)}; other lengths are set with --lengths {tokens}")
    chosen = {name: lengths[name] for name in choose(wanted, lengths, "passkey")}
    left_out = ""
    if not wanted and not settings.lengths:
        room = {name: length for name, length in chosen.items() if length <= longest}
        if room and room != chosen:
            names = ", ".join(name for name in chosen if name not in room)
            left_out = f"{names}: longer than max_tokens {longest}; raise it with --max-tokens (beyond the model's positions together with --rope-theta)"
        chosen = room or chosen
    way_out = "raise max_tokens (beyond the model's positions together with rope_theta), or name shorter lengths"
    for name, length in chosen.items():
        if length < 1:
            raise ConfigError(f"lengths: {length} is no number of tokens")
        if length > longest:
            raise ConfigError(f"lengths: passkey:{name} has prompts of {length} tokens, max_tokens is {longest}; {way_out}")
    prompter = _plain(building.spec, settings).prompter("document")
    tasks = [PasskeyTask(name=name, length=length, seed=settings.seed, prompter=prompter, left_out=left_out) for name, length in chosen.items()]
    return list(tasks)


def _plain(spec: EmbedderSpec, settings: EvaluateSettings) -> EmbedderSpec:
    """The embedder of documents: without the user's instruction, which is for queries."""
    if settings.instruction is None:
        return spec
    plain = representation_of(settings.model_copy(update={"instruction": None}))
    return replace(spec, representation=replace(plain, max_tokens=spec.representation.max_tokens))


SUITE = Suite(name="passkey", title="Personalised passkeys: the document with one person's pass key among 100 of a given length", build=build)
