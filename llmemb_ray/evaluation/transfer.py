"""SentEval's transfer tasks: a linear classifier on fixed vectors, by the protocol of its test setting.

Invariant: no row that a task is tested on takes part in choosing the strength of regularisation or in stopping early; the test rows of MR, CR,
SUBJ and MPQA are those of ten outer folds in turn. Rows stand in SentEval's order (number of words, then label), on which its folds depend.

Sources: ``senteval/tools/validation.py``, ``binary.py``, ``sst.py``, ``trec.py``, ``mrpc.py``. ``folds`` changes the number of folds alone: the classifier
keeps the parameters of the test setting, where SentEval's quick setting also trains less carefully.
"""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal, TypeAlias

import numpy as np
import numpy.typing as npt

from llmemb_ray.config import EvaluateSettings
from llmemb_ray.errors import ConfigError, InputError
from llmemb_ray.evaluation.classifier import L2_GRID, Fit, Fitted, Floats, Rows, fit_senteval, fit_sklearn
from llmemb_ray.evaluation.data import SENTEVAL, DataPlace, read_lines
from llmemb_ray.evaluation.suite import Building, Need, Score, Suite, Texts, choose

NOTHING = "."
"""Stands for a line without words (CR has four, MPQA three), which is no text to embed."""

Protocol: TypeAlias = Literal["nested", "cross", "split"]
"""nested: each outer fold is tested by a classifier whose strength the inner folds of the others chose; cross: the folds of train choose, test is
given; split: train, dev and test are given."""

C_GRIDS: dict[Protocol, tuple[float, ...]] = {
    "nested": tuple(2.0**power for power in range(-2, 4)),
    "cross": tuple(2.0**power for power in range(-1, 6)),
    "split": tuple(2.0**power for power in range(-2, 4)),
}


@dataclass(frozen=True, kw_only=True)
class Row:
    """One example. pair: the second text, of MRPC alone."""

    text: str
    label: int
    pair: str | None = None


@dataclass(frozen=True, kw_only=True)
class Split:
    """Rows in SentEval's order, and how many of their texts had no words."""

    rows: list[Row]
    empty: int = 0


def _ordered(rows: Iterable[Row]) -> Split:
    """As SentEval sorts: by number of words, of the second text too, then by label; equal ones as they stand in the files. Blanks become single spaces."""
    cleaned, empty = [], 0
    for row in rows:
        words, others = row.text.split(), (row.pair or "").split()
        empty += (not words) + (row.pair is not None and not others)
        pair = None if row.pair is None else " ".join(others) or NOTHING
        cleaned.append((len(words), len(others), row.label, Row(text=" ".join(words) or NOTHING, label=row.label, pair=pair)))
    return Split(rows=[row for *_, row in sorted(cleaned, key=lambda item: item[:3])], empty=empty)


def _some(rows: list[Row], path: Path) -> list[Row]:
    if not rows:
        raise InputError(f"{path} holds no example; get it from {SENTEVAL}")
    return rows


def _binary(one: str, zero: str) -> Callable[[Path], dict[str, Split]]:
    """Files with a text a line: those of label 1, those of label 0."""

    def read(directory: Path) -> dict[str, Split]:
        rows: list[Row] = []
        for name, label in ((one, 1), (zero, 0)):
            path = directory / name
            rows += _some([Row(text=line, label=label) for line in read_lines(path, encoding="latin-1", source=SENTEVAL)], path)
        return {"all": _ordered(rows)}

    return read


def _sst(directory: Path) -> dict[str, Split]:
    """A text, a tab and 0 or 1 a line."""
    splits = {}
    for split in ("train", "dev", "test"):
        path, rows = directory / f"sentiment-{split}", []
        for number, line in enumerate(read_lines(path, source=SENTEVAL), 1):
            text, tab, label = line.strip().rpartition("\t")
            if not tab or label.strip() not in ("0", "1"):
                raise InputError(f"{path} line {number}: expected a text, a tab and 0 or 1, got {line[-60:]!r}; get it from {SENTEVAL}")
            rows.append(Row(text=text, label=int(label)))
        splits[split] = _ordered(_some(rows, path))
    return splits


TREC_LABELS = ("ABBR", "DESC", "ENTY", "HUM", "LOC", "NUM")


def _trec(directory: Path) -> dict[str, Split]:
    """'LABEL:finer question' a line."""
    splits = {}
    for split, name in (("train", "train_5500.label"), ("test", "TREC_10.label")):
        path, rows = directory / name, []
        for number, line in enumerate(read_lines(path, encoding="latin-1", source=SENTEVAL), 1):
            label, colon, rest = line.strip().partition(":")
            _, blank, text = rest.partition(" ")
            if not colon or not blank or label not in TREC_LABELS:
                raise InputError(
                    f"{path} line {number}: expected 'LABEL:finer question', LABEL one of {', '.join(TREC_LABELS)}, got {line[:60]!r}; get it from {SENTEVAL}"
                )
            rows.append(Row(text=text, label=TREC_LABELS.index(label)))
        splits[split] = _ordered(_some(rows, path))
    return splits


def _mrpc(directory: Path) -> dict[str, Split]:
    """A line of titles, then five columns between tabs: label, two ids, two sentences."""
    splits = {}
    for split in ("train", "test"):
        path, rows = directory / f"msr_paraphrase_{split}.txt", []
        for number, line in enumerate(read_lines(path, source=SENTEVAL)[1:], 2):
            cells = line.strip().split("\t")
            if len(cells) != 5 or cells[0] not in ("0", "1"):
                raise InputError(f"{path} line {number}: expected 0 or 1, two ids and two sentences between tabs, got {line[:60]!r}; get it from {SENTEVAL}")
            rows.append(Row(text=cells[3], pair=cells[4], label=int(cells[0])))
        splits[split] = _ordered(_some(rows, path))
    return splits


@dataclass(frozen=True, kw_only=True)
class Kind:
    """What SentEval knows of a task. words: of the labels from 0 on, as a demonstration says them."""

    name: str
    directory: str
    protocol: Protocol
    words: tuple[str, ...]
    read: Callable[[Path], dict[str, Split]]

    def splits(self, data: DataPlace) -> dict[str, Split]:
        """Rows by split: "all", or "train", perhaps "dev", and "test". Raises InputError with the file and the line."""
        places = [f"senteval/downstream/{self.directory}", f"downstream/{self.directory}", self.directory]
        return self.read(data.find(places, what=f"transfer:{self.name}", source=SENTEVAL))


KINDS = {
    kind.name: kind
    for kind in (
        Kind(name="MR", directory="MR", protocol="nested", words=("negative", "positive"), read=_binary("rt-polarity.pos", "rt-polarity.neg")),
        Kind(name="CR", directory="CR", protocol="nested", words=("negative", "positive"), read=_binary("custrev.pos", "custrev.neg")),
        Kind(name="SUBJ", directory="SUBJ", protocol="nested", words=("subjective", "objective"), read=_binary("subj.objective", "subj.subjective")),
        Kind(name="MPQA", directory="MPQA", protocol="nested", words=("negative", "positive"), read=_binary("mpqa.pos", "mpqa.neg")),
        Kind(name="SST2", directory="SST/binary", protocol="split", words=("negative", "positive"), read=_sst),
        Kind(
            name="TREC",
            directory="TREC",
            protocol="cross",
            words=("abbreviation", "description", "entity", "human", "location", "number"),
            read=_trec,
        ),
        Kind(name="MRPC", directory="MRPC", protocol="cross", words=("different", "paraphrase"), read=_mrpc),
    )
}
"""In the order of the papers' tables."""


@dataclass(frozen=True, kw_only=True)
class TransferTask:
    """One task with its rows, in the order train, dev, test as far as there are such; ``splits`` counts them."""

    kind: Kind
    rows: list[Row] = field(repr=False)
    splits: dict[str, int]
    empty: int
    classifier: Literal["senteval", "sklearn"]
    folds: int
    seed: int

    @property
    def name(self) -> str:
        return self.kind.name

    def needs(self) -> list[Need]:
        """The texts of all splits; for MRPC those of both sides."""
        return _needs(self.rows)

    def score(self, embedded: list[Any]) -> Score:
        """Accuracy on test × 100, to two decimals as SentEval gives it; for nested folds the mean over the outer ones."""
        began = time.perf_counter()
        features, labels = _features(embedded), _labels(self.rows)
        main, parts = getattr(self, f"_{self.kind.protocol}")(features, labels)
        if self.empty:
            parts["empty"] = self.empty
        parts |= {"classifier": self.classifier, "folds": self.folds, "rows": self.splits, "seconds": round(time.perf_counter() - began, 2)}
        return Score(main=main, parts=parts)

    @property
    def grid(self) -> tuple[float, ...]:
        return L2_GRID if self.classifier == "senteval" else C_GRIDS[self.kind.protocol]

    def fit(self, features: Floats, labels: Rows, fits: Sequence[Fit]) -> list[Fitted]:
        """By the classifier of the settings."""
        function = fit_senteval if self.classifier == "senteval" else fit_sklearn
        return function(features, labels, fits, classes=len(self.kind.words), seed=self.seed)

    def folded(self, labels: Rows, rows: Rows) -> list[tuple[Rows, Rows]]:
        """Stratified folds of some rows, as (train, held out). A label with fewer rows than there are folds is missing in some, as in SentEval.

        Raises ConfigError where that is so of every label.
        """
        from sklearn.model_selection import StratifiedKFold

        most = int(np.bincount(labels[rows]).max(initial=0))
        if most < self.folds:
            raise ConfigError(
                f"folds: {self.folds} are too many for the {len(rows)} rows of transfer:{self.name} that are to be folded: "
                f"its most frequent label has {most} of them; give fewer folds or more rows"
            )
        splitter = StratifiedKFold(n_splits=self.folds, shuffle=True, random_state=self.seed)
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "The least populated class", UserWarning)
            return [(rows[train], rows[held]) for train, held in splitter.split(np.zeros(len(rows)), labels[rows])]

    def check(self) -> None:
        """Raises ConfigError, before anything is embedded, where the rows are too few for the folds."""
        labels = _labels(self.rows)
        if self.kind.protocol == "nested":
            self.folded(labels, self.folded(labels, np.arange(len(labels)))[0][0])
        elif self.kind.protocol == "cross":
            self.folded(labels, self._range("train"))

    def choose(self, fitted: Sequence[Fitted]) -> tuple[int, float]:
        """Index of the strength with the best mean accuracy × 100, to two decimals; of equal ones the first. And that accuracy."""
        means = [round(100 * float(mean), 2) for mean in np.mean([one.accuracy for one in fitted], axis=0)]
        return int(np.argmax(means)), max(means)

    def _range(self, split: str) -> Rows:
        names = list(self.splits)
        begin = sum(self.splits[name] for name in names[: names.index(split)])
        return np.arange(begin, begin + self.splits[split])

    @property
    def _strength(self) -> str:
        return "l2" if self.classifier == "senteval" else "C"

    def _nested(self, features: Floats, labels: Rows) -> tuple[float, dict[str, Any]]:
        outer = self.folded(labels, np.arange(len(labels)))
        search = [Fit(train=train, dev=dev, strengths=self.grid) for rows, _ in outer for train, dev in self.folded(labels, rows)]
        found = self.fit(features, labels, search)
        chosen = [self.choose(found[at : at + self.folds]) for at in range(0, len(found), self.folds)]
        finals = [Fit(train=rows, dev=None, strengths=(self.grid[best],)) for (rows, _), (best, _) in zip(outer, chosen, strict=True)]
        fitted = self.fit(features, labels, finals)
        tests = [_accuracy(model.predict(features[held]), labels[held]) for model, (_, held) in zip(fitted, outer, strict=True)]
        parts = {
            "dev": round(float(np.mean([accuracy for _, accuracy in chosen])), 2),
            self._strength: [self.grid[best] for best, _ in chosen],
            "test_folds": tests,
        }
        return round(float(np.mean(tests)), 2), parts | _unconverged([*found, *fitted])

    def _cross(self, features: Floats, labels: Rows) -> tuple[float, dict[str, Any]]:
        train, test = self._range("train"), self._range("test")
        found = self.fit(features, labels, [Fit(train=rows, dev=dev, strengths=self.grid) for rows, dev in self.folded(labels, train)])
        best, dev_accuracy = self.choose(found)
        fitted = self.fit(features, labels, [Fit(train=train, dev=None, strengths=(self.grid[best],))])
        predicted = fitted[0].predict(features[test])
        parts: dict[str, Any] = {"dev": dev_accuracy, self._strength: self.grid[best]}
        if self.name == "MRPC":
            from sklearn.metrics import f1_score

            parts["f1"] = round(100 * float(f1_score(labels[test], predicted)), 2)
        return _accuracy(predicted, labels[test]), parts | _unconverged([*found, *fitted])

    def _split(self, features: Floats, labels: Rows) -> tuple[float, dict[str, Any]]:
        """The final classifier is the one that the search fitted: same rows, same seed."""
        test = self._range("test")
        found = self.fit(features, labels, [Fit(train=self._range("train"), dev=self._range("dev"), strengths=self.grid)])
        best, dev_accuracy = self.choose(found)
        parts = {"dev": dev_accuracy, self._strength: self.grid[best]}
        return _accuracy(found[0].predict(features[test], best), labels[test]), parts | _unconverged(found)

    def development(self, rows: int | None = None) -> DevelopmentTask:
        """The task on data for choosing a representation, which hold no row of the test split of SST2, TREC and MRPC.

        Its score is the accuracy × 100 of the best strength: on dev for SST2, else the mean over the folds of train. A nested task has no rows that are
        never tested: its train is that of the first of this task's ``folds`` outer folds, and every row of it is a test row of another fold, here and in
        a task with another number of folds. What was chosen on it has seen most rows that the task is tested on. rows: so many training rows (and at
        most so many of dev), drawn with the seed, each label in its share; None for all. Raises ConfigError as ``folded``.
        """
        labels = _labels(self.rows)
        train = self.folded(labels, np.arange(len(labels)))[0][0] if self.kind.protocol == "nested" else self._range("train")
        dev = self._range("dev") if self.kind.protocol == "split" else np.arange(0)
        train, dev = (_drawn(part, labels, rows, self.seed) for part in (train, dev))
        kept = [self.rows[row] for row in (*train, *dev)]
        splits = {"train": len(train)} | ({"dev": len(dev)} if len(dev) else {})
        return DevelopmentTask(task=replace(self, rows=kept, splits=splits))


@dataclass(frozen=True, kw_only=True)
class DevelopmentTask:
    """What ``TransferTask.development`` gives: its splits are train and, for SST2, dev."""

    task: TransferTask

    @property
    def name(self) -> str:
        return f"{self.task.name}-dev"

    def needs(self) -> list[Need]:
        return _needs(self.task.rows)

    def score(self, embedded: list[Any]) -> Score:
        """Dev accuracy × 100 of the best strength."""
        task, began = self.task, time.perf_counter()
        features, labels = _features(embedded), _labels(task.rows)
        folds = self._folds(labels)
        found = task.fit(features, labels, [Fit(train=rows, dev=dev, strengths=task.grid) for rows, dev in folds])
        best, accuracy = task.choose(found)
        parts = {task._strength: task.grid[best], "classifier": task.classifier, "folds": len(folds), "rows": task.splits}
        return Score(main=accuracy, parts=parts | _unconverged(found) | {"seconds": round(time.perf_counter() - began, 2)})

    def check(self) -> None:
        """Raises ConfigError where the rows are too few for the folds, or a classifier would see one label alone."""
        labels = _labels(self.task.rows)
        for train, _ in self._folds(labels):
            if len(np.unique(labels[train])) < 2:
                raise ConfigError(f"a classifier of transfer:{self.task.name} would be trained on {len(train)} rows of one label; give more rows")

    def _folds(self, labels: Rows) -> list[tuple[Rows, Rows]]:
        train = self.task._range("train")
        return [(train, self.task._range("dev"))] if "dev" in self.task.splits else self.task.folded(labels, train)

    def examples(self) -> list[tuple[str, str]]:
        """(text, word of its label) of the training rows, in SentEval's order: candidates for demonstrations.

        Raises ConfigError for MRPC, whose labels are of pairs.
        """
        if self.task.rows[0].pair is not None:
            labelled = ", ".join(kind.name for kind in KINDS.values() if kind.name != self.task.name)
            raise ConfigError(f"for: transfer:{self.task.name} labels pairs of texts, which make no demonstrations; choose one of {labelled}")
        return [(row.text, self.task.kind.words[row.label]) for row in self.task.rows[: self.task.splits["train"]]]


def load(name: str, data: DataPlace, *, classifier: Literal["senteval", "sklearn"] = "senteval", folds: int = 10, seed: int = 1111) -> TransferTask:
    """One task with its data read; any case of its name will do.

    Raises ConfigError for another name and for more folds than its rows allow, InputError for data that are missing or malformed."""
    kind = KINDS[choose([name], KINDS, "transfer")[0]]
    splits = kind.splits(data)
    task = TransferTask(
        kind=kind,
        rows=[row for split in splits.values() for row in split.rows],
        splits={split: len(read.rows) for split, read in splits.items()},
        empty=sum(read.empty for read in splits.values()),
        classifier=classifier,
        folds=folds,
        seed=seed,
    )
    task.check()
    return task


def _build(building: Building) -> list[Any]:
    settings: EvaluateSettings = building.settings
    names = choose(building.wanted, KINDS, "transfer")
    return [load(name, building.data, classifier=settings.classifier, folds=settings.folds, seed=settings.seed) for name in names]


SUITE = Suite(name="transfer", title="Transfer tasks of SentEval (accuracy)", build=_build)


def _needs(rows: Sequence[Row]) -> list[Need]:
    pairs = [row.pair for row in rows if row.pair is not None]
    return [Texts(texts=[row.text for row in rows]), *([Texts(texts=pairs)] if pairs else [])]


def _labels(rows: Sequence[Row]) -> Rows:
    return np.array([row.label for row in rows], np.int64)


def _features(embedded: list[npt.NDArray[np.float32]]) -> Floats:
    """The vectors themselves; of pairs [|u - v|, u * v]."""
    if len(embedded) == 1:
        return np.ascontiguousarray(embedded[0], np.float32)
    one, other = embedded
    return np.concatenate([np.abs(one - other), one * other], axis=1, dtype=np.float32)


def _accuracy(predicted: Rows, labels: Rows) -> float:
    return round(100 * float(np.mean(predicted == labels)), 2)


def _unconverged(fitted: Sequence[Fitted]) -> dict[str, Any]:
    total = sum(one.unconverged for one in fitted)
    return {"unconverged": total} if total else {}


def _drawn(part: Rows, labels: Rows, rows: int | None, seed: int) -> Rows:
    """So many of the rows, each label in its share, in their order."""
    if rows is None or rows >= len(part):
        return part
    random = np.random.default_rng(seed)
    keys = np.empty(len(part))
    for label in np.unique(labels[part]):
        among = np.flatnonzero(labels[part] == label)
        keys[random.permutation(among)] = (np.arange(len(among)) + 0.5) / len(among)
    return part[np.sort(np.argsort(keys, kind="stable")[:rows])]
