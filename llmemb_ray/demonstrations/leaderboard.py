"""Scores on disk: one small object a score, written as it comes.

Invariant: a directory holds scores of one model, one exam and one way of computing; a search of another is refused
before it writes. A score that is there is not computed again. Knows no model and no Ray.

    DIR/search.json             what was scored on what: model, tokenizer, representation, exam, engine
    DIR/scores/<name>.json      one score each
    DIR/leaderboard.jsonl       made at the end of a search: the candidates scored on the whole exam, best first
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from typing import Any

from llmemb_ray.demonstrations.scoring import Outcome, Trial
from llmemb_ray.errors import InputError, NotFound, RunMismatch
from llmemb_ray.representation import Demonstration
from llmemb_ray.representation.space import differences, digest
from llmemb_ray.storage import Storage, is_temporary

IDENTITY, SCORES, TABLE = "search.json", "scores", "leaderboard.jsonl"


@dataclass(frozen=True, kw_only=True)
class Place:
    """A row of the leaderboard. rank: from 1, of the candidates that have a score; None without one."""

    rank: int | None
    demonstrations: tuple[Demonstration, ...]
    outcome: Outcome
    gain: float | None
    """Over the zero-shot score."""

    def to_dict(self) -> dict[str, Any]:
        return {
            "rank": self.rank,
            "score": self.outcome.score,
            "gain": self.gain,
            "demonstrations": [asdict(demonstration) for demonstration in self.demonstrations],
            "problem": self.outcome.problem,
        }


class Leaderboard:
    """The scores in one directory.

    size: items of the whole exam; seed: of the order in which samples of it grow, which marks scores on samples.
    """

    def __init__(self, storage: Storage, *, size: int, seed: int) -> None:
        self.storage, self._size, self._seed = storage, size, seed
        self._outcomes: dict[Trial, Outcome] = {}
        names = [entry.path for entry in storage.list(SCORES) if not is_temporary(entry.path)]
        for trial, outcome in storage.map(self._read, names):
            if trial is not None:
                self._outcomes[trial] = outcome

    def check(self, identity: dict[str, Any], engine: dict[str, Any]) -> bool:
        """Whether anything is there already. Raises RunMismatch with each field that differs.

        engine: as far as it is known; fields that are not in it are not compared
        """
        try:
            theirs = json.loads(self.storage.read(IDENTITY))
        except NotFound:
            return False
        except ValueError as error:
            raise InputError(f"{self.storage.display(IDENTITY)} is not JSON: {error}; name another directory with out") from error
        computed = theirs.get("engine") or {}
        there = {name: theirs.get(name) for name in identity} | {"engine": {name: computed.get(name) for name in engine}}
        found = list(differences(identity | {"engine": engine}, there))
        if found:
            lines = "\n".join(f"  {name}: this search {ours!r}, the directory {other!r}" for name, ours, other in found)
            raise RunMismatch(f"{self.storage.url} holds the scores of another search; name another directory with out. What differs:\n{lines}")
        return True

    def claim(self, identity: dict[str, Any], engine: dict[str, Any]) -> None:
        """Compares as ``check`` does, and writes what is scored on what if nothing is there."""
        if not self.check(identity, engine):
            self.storage.put(IDENTITY, (json.dumps(identity | {"engine": engine}, indent=2, ensure_ascii=False) + "\n").encode())

    def __len__(self) -> int:
        return len(self._outcomes)

    def get(self, trial: Trial) -> Outcome | None:
        return self._outcomes.get(trial)

    def outcome(self, demonstrations: tuple[Demonstration, ...], size: int) -> Outcome:
        """Raises KeyError where there is none."""
        return self._outcomes[Trial(demonstrations, size)]

    def find(self, demonstrations: tuple[Demonstration, ...]) -> Outcome | None:
        """On the whole exam, else on the largest sample."""
        found = [trial for trial in self._outcomes if trial.demonstrations == demonstrations]
        return self._outcomes[max(found, key=lambda trial: trial.size)] if found else None

    def smallest(self) -> int:
        """Items of the smallest sample that something was scored on."""
        return min((trial.size for trial in self._outcomes), default=self._size)

    def best(self, size: int) -> float | None:
        """Of the scores of prompts with demonstrations on so many items."""
        scores = [outcome.score for trial, outcome in self._outcomes.items() if trial.size == size and trial.demonstrations and outcome.score is not None]
        return max(scores, default=None)

    def add(self, trial: Trial, outcome: Outcome) -> None:
        """Durable when it returns."""
        value = {"demonstrations": [asdict(demonstration) for demonstration in trial.demonstrations], "size": trial.size, "seed": self._seed, **asdict(outcome)}
        self.storage.put(f"{SCORES}/{self._name(trial)}.json", json.dumps(value, ensure_ascii=False).encode())
        self._outcomes[trial] = outcome

    def _name(self, trial: Trial) -> str:
        whole = trial.size == self._size
        return digest([asdict(demonstration) for demonstration in trial.demonstrations])[:16] + ("" if whole else f"-{trial.size}-{self._seed}")

    def _read(self, path: str) -> tuple[Trial | None, Outcome]:
        try:
            value = json.loads(self.storage.read(path))
            demonstrations = tuple(Demonstration(**demonstration) for demonstration in value.pop("demonstrations"))
            trial, seed, outcome = Trial(demonstrations, value.pop("size")), value.pop("seed"), Outcome(**value)
        except (ValueError, TypeError, KeyError) as error:
            raise InputError(f"{self.storage.display(path)} is no score that this version wrote ({error}); delete it and search again") from error
        return (trial if trial.size == self._size or seed == self._seed else None), outcome

    def ranking(self, among: Iterable[tuple[Demonstration, ...]]) -> list[Place]:
        """Those of these candidates that were scored on the whole exam, best first (equal scores as given); what cannot be scored comes last."""
        zero = self._outcomes.get(Trial((), self._size))
        baseline = zero.score if zero else None
        rows = [(shown, outcome) for shown in dict.fromkeys(among) if (outcome := self._outcomes.get(Trial(shown, self._size))) is not None]
        rows.sort(key=lambda row: (row[1].score is None, -(row[1].score or 0.0)))
        return [
            Place(
                rank=number if outcome.score is not None else None,
                demonstrations=shown,
                outcome=outcome,
                gain=outcome.score - baseline if outcome.score is not None and baseline is not None else None,
            )
            for number, (shown, outcome) in enumerate(rows, 1)
        ]

    def write(self, ranking: list[Place]) -> None:
        self.storage.put(TABLE, "".join(json.dumps(place.to_dict(), ensure_ascii=False) + "\n" for place in ranking).encode())
