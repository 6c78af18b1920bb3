"""SentEval's tasks: what is read, in which order, and the protocols against plain loops."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import StratifiedKFold
from threadpoolctl import threadpool_limits

from llmemb_ray.errors import ConfigError, InputError
from llmemb_ray.evaluation.classifier import Floats
from llmemb_ray.evaluation.data import DataPlace
from llmemb_ray.evaluation.transfer import KINDS, TransferTask, load
from tests.evaluation.test_classifier import fit_alone


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    """Steps this small are slower on several threads, and slower by far beside other work."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    with threadpool_limits(1):
        yield
    torch.set_num_threads(threads)


SIZES = {
    "MR": ({"all": 10662}, [5331, 5331], 0),
    "CR": ({"all": 3775}, [1368, 2407], 4),
    "SUBJ": ({"all": 10000}, [5000, 5000], 0),
    "MPQA": ({"all": 10606}, [7294, 3312], 3),
    "SST2": ({"train": 67349, "dev": 872, "test": 1821}, [29780 + 428 + 912, 37569 + 444 + 909], 0),
    "TREC": ({"train": 5452, "test": 500}, [86 + 9, 1162 + 138, 1250 + 94, 1223 + 65, 835 + 81, 896 + 113], 0),
    "MRPC": ({"train": 4076, "test": 1725}, [1323 + 578, 2753 + 1147], 0),
}
"""Rows of each split, rows of each label, lines without words: as the data sets' authors give them and as grep counts them."""


@pytest.mark.parametrize("name", KINDS)
def test_every_row_of_the_real_files_is_read(name: str, data: Path) -> None:
    task = load(name, DataPlace(data))
    splits, labels, empty = SIZES[name]
    assert task.splits == splits
    assert np.bincount([row.label for row in task.rows]).tolist() == labels
    assert task.empty == empty
    assert all(text == " ".join(text.split()) != "" for need in task.needs() for text in need.texts)  # type: ignore[union-attr]


def write(path: Path, text: str, encoding: str = "utf-8") -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(text.encode(encoding))


def words(random: np.random.Generator, count: int) -> list[str]:
    return [" ".join(random.choice(["good", "bad", "film", "plot", "é"], random.integers(1, 6))) for _ in range(count)]


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Every task in little, its rows drawn; MR right under the root, the rest as SentEval lays them out."""
    root, random = tmp_path_factory.mktemp("transfer"), np.random.default_rng(4)
    write(root / "MR/rt-polarity.pos", "\n".join(words(random, 70)) + "\n", "latin-1")
    write(root / "MR/rt-polarity.neg", "\n".join(words(random, 60)) + "\n", "latin-1")
    for split, count in (("train", 150), ("dev", 40), ("test", 50)):
        write(root / f"downstream/SST/binary/sentiment-{split}", "".join(f"{text} \t{random.integers(2)}\n" for text in words(random, count)))
    names = ("ABBR", "DESC", "ENTY", "HUM", "LOC", "NUM")
    for file, count in (("train_5500.label", 120), ("TREC_10.label", 60)):
        write(root / "senteval/downstream/TREC" / file, "".join(f"{names[row % 6]}:x {text}\n" for row, text in enumerate(words(random, count))), "latin-1")
    for split, count in (("train", 100), ("test", 60)):
        lines = [f"{random.integers(2)}\t1\t2\t{one}\t{other}\n" for one, other in zip(words(random, count), words(random, count), strict=True)]
        write(root / f"senteval/downstream/MRPC/msr_paraphrase_{split}.txt", "\ufeffQuality\t#1 ID\t#2 ID\t#1 String\t#2 String\n" + "".join(lines))
    return root


def test_rows_stand_in_the_order_of_senteval_with_single_spaces(tmp_path: Path) -> None:
    write(tmp_path / "CR/custrev.pos", "three  words\there\none\n\ntwo words\n", "latin-1")
    write(tmp_path / "CR/custrev.neg", "caf\xe9\nnot two\n", "latin-1")
    task = load("cr", DataPlace(tmp_path), folds=2)
    assert [(row.text, row.label) for row in task.rows] == [(".", 1), ("café", 0), ("one", 1), ("not two", 0), ("two words", 1), ("three words here", 1)]
    assert task.empty == 1


def test_pairs_stand_in_the_order_of_both_lengths_and_the_label(tmp_path: Path) -> None:
    rows = ["1\t1\t2\ta b\tc", "1\t1\t2\ta\tb c", "0\t1\t2\ta\td e", '1\t1\t2\t"x\tz"']
    for split in ("train", "test"):
        write(tmp_path / f"MRPC/msr_paraphrase_{split}.txt", "titles\n" + "".join(f"{row}\n" for row in rows))
    task = load("MRPC", DataPlace(tmp_path), folds=2)
    assert [(row.text, row.pair, row.label) for row in task.rows[:4]] == [('"x', 'z"', 1), ("a", "d e", 0), ("a", "b c", 1), ("a b", "c", 1)]
    one, other = task.needs()
    assert (one.texts[3], other.texts[3]) == ("a b", "c")  # type: ignore[union-attr]


@pytest.mark.parametrize(
    ("name", "file", "content", "message"),
    [
        (
            "SST2",
            "downstream/SST/binary/sentiment-dev",
            "fine \t1\nno label\n",
            r"sentiment-dev line 2: expected a text, a tab and 0 or 1, got 'no label'.*SentEval",
        ),
        ("SST2", "downstream/SST/binary/sentiment-train", "fine \t2\n", "sentiment-train line 1"),
        ("TREC", "senteval/downstream/TREC/TREC_10.label", "NUM:x How far ?\nHUM:desc\n", r"TREC_10\.label line 2: expected 'LABEL:finer question'"),
        ("TREC", "senteval/downstream/TREC/train_5500.label", "WHO:x Who ?\n", "train_5500.label line 1.*ABBR, DESC"),
        ("MRPC", "senteval/downstream/MRPC/msr_paraphrase_test.txt", "titles\n1\t2\t3\tone\ttwo\n1\t2\t3\tone\n", r"msr_paraphrase_test\.txt line 3"),
        ("MR", "MR/rt-polarity.neg", "", r"rt-polarity\.neg holds no example"),
        ("MR", "MR/rt-polarity.pos", None, r"rt-polarity\.pos is not there; get it from SentEval"),
        ("SST2", "downstream/SST/binary/sentiment-test", b"caf\xc3\xa9\t1\ncaf\xe9\t1\n", "sentiment-test line 2 is not utf-8"),
    ],
)
def test_a_bad_file_is_named_with_its_line_and_its_source(name: str, file: str, content: str | bytes | None, message: str, small: Path, tmp_path: Path) -> None:
    for source in small.rglob("*"):
        if source.is_file():
            write(tmp_path / source.relative_to(small), source.read_text("latin-1"), "latin-1")
    if content is None:
        (tmp_path / file).unlink()
    else:
        (tmp_path / file).write_bytes(content.encode() if isinstance(content, str) else content)
    with pytest.raises(InputError, match=message):
        load(name, DataPlace(tmp_path))


def test_data_that_are_not_there_and_tasks_that_do_not_exist(tmp_path: Path, small: Path) -> None:
    with pytest.raises(InputError, match=r"transfer:SUBJ is not there: looked for .*senteval/downstream/SUBJ.*SentEval"):
        load("SUBJ", DataPlace(tmp_path))
    with pytest.raises(ConfigError, match="no task 'MRP'; nearest: MR"):
        load("MRP", DataPlace(small))
    with pytest.raises(ConfigError, match="folds: 21 are too many for the 120 rows of transfer:TREC that are to be folded: its most frequent label has 20"):
        load("TREC", DataPlace(small), folds=21)
    with pytest.raises(ConfigError, match=r"folds: 70 are too many for the 128 rows of transfer:MR .* label has 69"):
        load("MR", DataPlace(small), folds=70)


def vectors(task: TransferTask, seed: int = 0) -> Floats:
    """Noise that knows a little of the labels."""
    random = np.random.default_rng(seed)
    labels = np.array([row.label for row in task.rows])
    return (random.standard_normal((len(labels), 8)) + 0.6 * random.standard_normal((6, 8))[labels]).astype(np.float32)


Predict = Callable[[Floats, Any, Any, Any, float, Floats], tuple[float, Any]]
"""Features, labels, training rows, dev rows or None, strength, features to classify: accuracy on dev, classes."""


def by_senteval(features: Floats, labels: Any, train: Any, dev: Any, strength: float, unseen: Floats) -> tuple[float, Any]:
    fitted = fit_alone(features, labels, train, dev, strength, classes=int(labels.max()) + 1, seed=1111)
    return fitted.accuracy, (unseen @ fitted.weights[:, :-1].T + fitted.weights[:, -1]).argmax(axis=1)


def by_sklearn(features: Floats, labels: Any, train: Any, dev: Any, strength: float, unseen: Floats) -> tuple[float, Any]:
    model = LogisticRegression(C=strength).fit(features[train], labels[train])
    return (0.0 if dev is None else float(model.score(features[dev], labels[dev]))), model.predict(unseen)


WAYS: list[Any] = [("senteval", by_senteval, [1e-5, 1e-4, 1e-3, 1e-2]), ("sklearn", by_sklearn, None)]


def folds(labels: Any, rows: Any) -> list[tuple[Any, Any]]:
    return [(rows[train], rows[held]) for train, held in StratifiedKFold(3, shuffle=True, random_state=1111).split(rows, labels[rows])]


def best(features: Floats, labels: Any, splits: list[tuple[Any, Any]], grid: list[float], fit: Predict) -> tuple[float, float]:
    """(accuracy × 100, strength): the highest mean over the splits, of equal ones that of the first strength."""
    means = [round(100 * float(np.mean([fit(features, labels, train, dev, value, features[:1])[0] for train, dev in splits])), 2) for value in grid]
    return max(means), grid[means.index(max(means))]


@pytest.mark.parametrize(("classifier", "fit", "grid"), WAYS)
def test_nested_folds_against_a_plain_loop(classifier: Any, fit: Predict, grid: list[float] | None, small: Path) -> None:
    task = load("MR", DataPlace(small), classifier=classifier, folds=3)
    features, labels = vectors(task), np.array([row.label for row in task.rows])
    devs, strengths, tests = [], [], []
    for rows, held in folds(labels, np.arange(len(labels))):
        dev, strength = best(features, labels, folds(labels, rows), grid or [0.25, 0.5, 1, 2, 4, 8], fit)
        _, classes = fit(features, labels, rows, None, strength, features[held])
        devs.append(dev)
        strengths.append(strength)
        tests.append(round(100 * float(np.mean(classes == labels[held])), 2))
    score = task.score([features])
    assert score.main == round(float(np.mean(tests)), 2)
    assert score.parts["test_folds"] == tests
    assert score.parts["dev"] == round(float(np.mean(devs)), 2)
    assert score.parts["l2" if classifier == "senteval" else "C"] == strengths
    assert score.parts["rows"] == {"all": 130}


@pytest.mark.parametrize(("classifier", "fit", "grid"), WAYS)
def test_folds_of_train_against_a_plain_loop(classifier: Any, fit: Predict, grid: list[float] | None, small: Path) -> None:
    """MRPC: on |u - v| and u * v, with F1 of the paraphrases; its dev score is that of the development task."""
    task = load("MRPC", DataPlace(small), classifier=classifier, folds=3)
    one, other, labels = vectors(task), vectors(task, 1), np.array([row.label for row in task.rows])
    features, train = np.hstack([np.abs(one - other), one * other]), np.arange(100)
    dev, strength = best(features, labels, folds(labels, train), grid or [0.5, 1, 2, 4, 8, 16, 32], fit)
    _, classes = fit(features, labels, train, None, strength, features[100:])
    right = classes == labels[100:]
    hits = int((right & (classes == 1)).sum())
    score = task.score([one, other])
    assert score.main == round(100 * float(right.mean()), 2)
    assert (score.parts["dev"], score.parts["l2" if classifier == "senteval" else "C"]) == (dev, strength)
    assert score.parts["f1"] == round(100 * 2 * hits / int((classes == 1).sum() + labels[100:].sum()), 2)
    assert task.development().score([one[:100], other[:100]]).main == dev


@pytest.mark.parametrize(("classifier", "fit", "grid"), WAYS)
def test_given_splits_against_a_plain_loop(classifier: Any, fit: Predict, grid: list[float] | None, small: Path) -> None:
    task = load("SST2", DataPlace(small), classifier=classifier)
    features, labels = vectors(task), np.array([row.label for row in task.rows])
    train, held = np.arange(150), np.arange(150, 190)
    dev, strength = best(features, labels, [(train, held)], grid or [0.25, 0.5, 1, 2, 4, 8], fit)
    _, classes = fit(features, labels, train, held, strength, features[190:])
    score = task.score([features])
    assert score.main == round(100 * float(np.mean(classes == labels[190:])), 2)
    assert (score.parts["dev"], score.parts["l2" if classifier == "senteval" else "C"]) == (dev, strength)
    assert task.development().score([features[:190]]).main == dev


def test_development_data_are_train_or_for_want_of_it_all_but_the_first_outer_fold(small: Path) -> None:
    with pytest.raises(ConfigError, match="a classifier of transfer:SST2 would be trained on 1 rows of one label"):
        load("SST2", DataPlace(small)).development(1).check()
    trec = load("TREC", DataPlace(small))
    (need,) = trec.development().needs()
    assert need.texts == [row.text for row in trec.rows[:120]]  # type: ignore[union-attr]
    mr = load("MR", DataPlace(small), folds=3)
    labels = np.array([row.label for row in mr.rows])
    train, _ = folds(labels, np.arange(130))[0]
    development = mr.development()
    assert development.task.rows == [mr.rows[row] for row in train]
    features = vectors(mr)[train]
    assert (
        development.score([features]).main
        == best(features, labels[train], folds(labels[train], np.arange(len(train))), [1e-5, 1e-4, 1e-3, 1e-2], by_senteval)[0]
    )


def test_a_sample_of_the_development_data_keeps_the_share_of_each_label_and_lies_in_every_larger_one(small: Path) -> None:
    development = load("TREC", DataPlace(small)).development(60)
    assert {row.text for row in load("TREC", DataPlace(small)).development(30).task.rows} <= {row.text for row in development.task.rows}
    assert development.task.splits == {"train": 60}
    assert np.bincount([row.label for row in development.task.rows]).tolist() == [10] * 6
    assert load("SST2", DataPlace(small)).development(30).task.splits == {"train": 30, "dev": 30}
    assert load("SST2", DataPlace(small)).development(1000).task.splits == {"train": 150, "dev": 40}


def test_a_label_with_fewer_rows_than_folds_is_missing_in_some(tmp_path: Path, recwarn: pytest.WarningsRecorder) -> None:
    for file in ("train_5500.label", "TREC_10.label"):
        write(tmp_path / "TREC" / file, "ABBR:x one\n" * 2 + "LOC:x two three\n" * 30 + "NUM:x four five six\n" * 30)
    task = load("TREC", DataPlace(tmp_path), classifier="sklearn", folds=5)
    apart = np.array([[row.label == 0, row.label == 4, row.label == 5] for row in task.rows], np.float32) * 9
    assert task.score([apart]).main == 100
    assert not [warning for warning in recwarn if "least populated" in str(warning.message)]


def test_labels_become_words(small: Path, data: Path) -> None:
    task = load("TREC", DataPlace(data))
    examples = dict(task.development().examples())
    assert len(task.development().examples()) == 5452
    assert examples["How did serfdom develop in and then leave Russia ?"] == "description"
    assert examples["What films featured the character Popeye Doyle ?"] == "entity"
    assert {word for _, word in load("MR", DataPlace(small)).development().examples()} == {"negative", "positive"}
    with pytest.raises(ConfigError, match=r"transfer:MRPC labels pairs of texts.*choose one of MR, CR"):
        load("MRPC", DataPlace(small)).development().examples()
