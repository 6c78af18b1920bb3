"""Many fits at once against the same fits one by one, with torch's own layer, loss and optimizer."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import pytest
import torch
from sklearn.linear_model import LogisticRegression
from threadpoolctl import threadpool_limits

from llmemb_ray.evaluation import classifier
from llmemb_ray.evaluation.classifier import Fit, Fitted, Floats, Rows, fit_senteval, fit_sklearn


@dataclass
class Alone:
    """One fit by the plain loop: the weights kept [C, D + 1], their accuracy on dev, and the passes made."""

    weights: Floats
    accuracy: float
    passes: int


def fit_alone(features: Floats, labels: Rows, train: Rows, dev: Rows | None, l2: float, *, classes: int, seed: int, forgiven: int = 5) -> Alone:
    """SentEval's classifier as its source reads, one fit, on the global generators that it seeds."""
    np.random.seed(seed)
    torch.manual_seed(seed)
    layer = torch.nn.Linear(features.shape[1], classes)
    adam = torch.optim.Adam(layer.parameters(), weight_decay=l2)
    if dev is None:
        order = np.random.permutation(len(train))
        held = int(0.05 * len(train))
        train, dev = train[order[held:]], train[order[:held]]
    x, y = torch.from_numpy(features), torch.from_numpy(labels)
    best, kept, failures, passes = -1.0, np.zeros(0, np.float32), 0, 0
    while passes <= 200:
        for _ in range(4):
            order = np.random.permutation(len(train))
            for at in range(0, len(train), 64):
                rows = train[order[at : at + 64]]
                adam.zero_grad()
                torch.nn.functional.cross_entropy(layer(x[rows]), y[rows]).backward()
                adam.step()
        passes += 4
        accuracy = float((layer(x[dev]).argmax(dim=1) == y[dev]).double().mean())
        if accuracy > best:
            best, kept = accuracy, torch.cat([layer.weight, layer.bias[:, None]], dim=1).detach().numpy().copy()
        elif failures >= forgiven:
            break
        else:
            failures += 1
    return Alone(kept, best, passes)


def problem(rows: int, width: int, classes: int, seed: int = 3) -> tuple[Floats, Rows]:
    """Classes that a plane separates in part."""
    random = np.random.default_rng(seed)
    features = random.standard_normal((rows, width)).astype(np.float32)
    noisy = features @ random.standard_normal((width, classes)) + 2 * random.standard_normal((rows, classes))
    return features, noisy.argmax(axis=1)


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    """Steps this small are slower on several threads, and slower by far beside other work."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    with threadpool_limits(1):
        yield
    torch.set_num_threads(threads)


STRENGTHS = (1e-5, 0.1)


@pytest.fixture(scope="module")
def fits() -> list[Fit]:
    """Of 128, 129 (whose last mini-batch is one row) and 70 rows; one holds its dev rows out by itself."""
    rows = np.random.default_rng(1).permutation(300)
    parts = [(rows[:128], rows[200:]), (rows[:129], rows[200:]), (rows[50:120], rows[:50]), (rows[:135], None)]
    return [Fit(train=train, dev=dev, strengths=STRENGTHS) for train, dev in parts]


@pytest.fixture(scope="module")
def alone(fits: list[Fit]) -> list[list[Alone]]:
    features, labels = problem(300, 12, 3)
    return [[fit_alone(features, labels, fit.train, fit.dev, l2, classes=3, seed=7) for l2 in fit.strengths] for fit in fits]


@pytest.mark.parametrize("places", [100, 3, 1])
def test_many_fits_are_the_fits_one_by_one(fits: list[Fit], alone: list[list[Alone]], places: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where there is room for three or one, and each that stops makes place for the next."""
    monkeypatch.setattr(classifier, "BATCH_BYTES", {"cpu": places * 64 * 13 * 4})
    features, labels = problem(300, 12, 3)
    found = fit_senteval(features, labels, fits, classes=3, seed=7, device="cpu")
    assert len({one.passes for group in alone for one in group}) > 3, "the fits should end at different times"
    for fitted, group in zip(found, alone, strict=True):
        assert fitted.passes == tuple(one.passes for one in group)
        np.testing.assert_allclose(fitted.accuracy, [one.accuracy for one in group], rtol=0, atol=1e-12)
        for weights, one in zip(fitted.weights, group, strict=True):
            np.testing.assert_allclose(weights, one.weights, rtol=0, atol=2e-5)


def test_a_fit_that_is_never_stopped_ends_after_204_passes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(classifier, "TENACITY", 10**6)
    features, labels = problem(90, 5, 2)
    train, dev = np.arange(60), np.arange(60, 90)
    expected = fit_alone(features, labels, train, dev, 1e-3, classes=2, seed=11, forgiven=10**6)
    assert expected.passes == 204
    (found,) = fit_senteval(features, labels, [Fit(train=train, dev=dev, strengths=(1e-3,))], classes=2, seed=11, device="cpu")
    assert found.passes == (204,)
    np.testing.assert_allclose(found.weights[0], expected.weights, rtol=0, atol=2e-5)


def test_generators_of_the_process_are_left_alone() -> None:
    features, labels = problem(80, 4, 2)
    before = np.random.get_state()[1].copy(), torch.get_rng_state()
    fit_senteval(features, labels, [Fit(train=np.arange(60), dev=None, strengths=(1e-3,))], classes=2, seed=5)
    assert (np.random.get_state()[1] == before[0]).all()
    assert torch.equal(torch.get_rng_state(), before[1])


@pytest.mark.parametrize("classes", [2, 3])
def test_scikit_learn_is_asked_for_each_strength(classes: int) -> None:
    features, labels = problem(120, 6, classes)
    train, dev = np.arange(80), np.arange(80, 120)
    (found,) = fit_sklearn(features, labels, [Fit(train=train, dev=dev, strengths=(0.01, 4.0))], classes=classes, seed=1)
    for number, strength in enumerate((0.01, 4.0)):
        model = LogisticRegression(C=strength).fit(features[train], labels[train])
        assert found.accuracy[number] == model.score(features[dev], labels[dev])
        assert (found.predict(features, number) == model.predict(features)).all()


def test_a_class_without_training_rows_is_never_predicted() -> None:
    features, labels = problem(120, 6, 3)
    train = np.flatnonzero(labels != 1)
    (found,) = fit_sklearn(features, labels, [Fit(train=train, dev=None, strengths=(1.0,))], classes=3, seed=1)
    assert (found.predict(features) == LogisticRegression(C=1.0).fit(features[train], labels[train]).predict(features)).all()
    assert np.isnan(found.accuracy).all()


def test_fits_that_did_not_converge_are_counted() -> None:
    features, labels = problem(200, 20, 2)
    features *= np.logspace(-3, 3, 20).astype(np.float32)
    (found,) = fit_sklearn(features, labels, [Fit(train=np.arange(200), dev=None, strengths=(1e-9, 1e3))], classes=2, seed=1)
    assert found.unconverged == 1


def test_the_bias_decides_where_the_features_say_nothing() -> None:
    weights = np.array([[[1, 0, 0.5], [0, 1, 0]]], np.float32)
    model = Fitted(weights=weights, accuracy=np.array([1.0]))
    assert model.predict(np.array([[0, 0], [0, 1], [2, 1]], np.float32)).tolist() == [0, 1, 0]
