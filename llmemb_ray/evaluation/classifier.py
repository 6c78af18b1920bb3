"""Linear classifiers fitted many at a time: SentEval's early-stopped one and scikit-learn's logistic regression.

Invariant: a fit among many follows the trajectory that it has alone: its own order of rows, its own Adam state, its own early stopping,
and a pass that has ended for it changes nothing in it. Only the rounding of float32 sums may differ.

SentEval's classifier (nhid 0, as ``senteval/tools/classifier.py`` runs it): a linear layer on the mean cross-entropy of mini-batches of 64,
Adam with the l2 strength in the gradient (bias included), scored on dev after every 4 passes. A fit ends at the first score without
improvement after 5 earlier ones (they need not be consecutive), or after 204 passes; the weights of the best score are kept.

Shapes: N rows, D features, F fits side by side, S strengths of each (they share its rows), C classes, B rows of a mini-batch.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from copy import copy
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np
import numpy.typing as npt

if TYPE_CHECKING:
    import torch

Floats: TypeAlias = npt.NDArray[np.float32]
Rows: TypeAlias = npt.NDArray[np.int64]

BATCH = 64
PASSES = 4
"""Passes over the training rows between two scores on dev (SentEval's epoch_size)."""
TENACITY = 5
"""Scores without improvement that are forgiven in one fit."""
MAX_PASSES = 200
"""No further four passes begin once a fit has done more than these."""
VALIDATION = 0.05
"""Share of the training rows, drawn at random, that serves as dev where none is given."""
LR, BETA1, BETA2, EPSILON = 1e-3, 0.9, 0.999, 1e-8
"""Adam's, torch's defaults."""

L2_GRID = (1e-5, 1e-4, 1e-3, 1e-2)

BATCH_BYTES = {"cpu": 8 << 20, "cuda": 256 << 20}
"""Of the mini-batches of all fits that run side by side in a thread: bounds the memory. On the CPU it hardly matters (CR, 768 features, one thread: 17, 18
and 19 s of processor time at 2, 8 and 32 MiB); a GPU is waited for less the more it is given at once."""


MAX_THREADS, FITS_PER_THREAD = 8, 5
"""On the CPU each thread steps fits of its own. OpenMP's threads meet after every product instead, and where another process holds one of two cores they
took 20 to 60 times as long as one thread alone; more than eight would wait for Python."""


@dataclass(frozen=True, kw_only=True)
class Fit:
    """What is fitted: one classifier for each strength, on the same rows."""

    train: Rows
    """Rows of the features, [n]."""
    dev: Rows | None
    """Rows that early stopping looks at; None: a random share of ``train`` is held out for it."""
    strengths: tuple[float, ...]
    """l2 of SentEval's classifier, C of scikit-learn's; as many in each fit of a call."""


@dataclass(frozen=True, kw_only=True)
class Fitted:
    """weights: float32 [S, C, D + 1], the bias last; accuracy: float64 [S] on dev, from 0 to 1, NaN where there was none to look at."""

    weights: Floats
    accuracy: npt.NDArray[np.float64]
    passes: tuple[int, ...] = ()
    """Over the training rows until each of SentEval's fits stopped, [S]."""
    unconverged: int = 0
    """Fits that scikit-learn's solver gave up at its limit of iterations."""

    def predict(self, features: Floats, strength: int = 0) -> Rows:
        """Classes, int64 [N], by the strength's index; features: float32 [N, D]."""
        weights = self.weights[strength]
        return np.asarray(np.argmax(features @ weights[:, :-1].T + weights[:, -1], axis=1), np.int64)


@dataclass
class _Member:
    """One of the fits under way, with the numbers that it draws."""

    number: int
    train: Rows
    dev: torch.Tensor
    random: np.random.RandomState
    best: npt.NDArray[np.float64]
    failures: npt.NDArray[np.int64]
    ended: npt.NDArray[np.int64]
    """Passes after which a strength stopped; 0 while it goes on."""
    passes: int = 0
    steps: int = 0


def fit_senteval(features: Floats, labels: Rows, fits: Sequence[Fit], *, classes: int, seed: int, device: str | None = None) -> list[Fitted]:
    """SentEval's classifier for every fit and strength, as many side by side as ``BATCH_BYTES`` allow; the next one takes the place of one that stops.

    features: float32 [N, D], copied once with a column of ones, to the device; labels: int64 [N], from 0 to classes - 1. Every fit starts from the same
    ``seed``, as in SentEval: equal weights, and equal orders where the numbers of rows are equal. device: "cuda" where there is one, else "cpu".
    """
    import torch

    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    if not fits:
        return []
    side = _Side(torch, features, labels, list(fits), classes, seed, device)
    workers = min(len(os.sched_getaffinity(0)), MAX_THREADS, -(-len(fits) // FITS_PER_THREAD)) if device == "cpu" else 1
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        with ThreadPoolExecutor(max(1, workers)) as pool:
            parts = list(pool.map(lambda part: copy(side).run(range(part, len(fits), workers)), range(workers)))
    finally:
        torch.set_num_threads(threads)
    fitted = {number: one for part in parts for number, one in part.items()}
    return [fitted[number] for number in range(len(fits))]


class _Side:
    """Fits side by side: their weights are one array, [F, S * C, D + 1]. Threads take copies, which share the features."""

    def __init__(self, torch: Any, features: Floats, labels: Rows, fits: list[Fit], classes: int, seed: int, device: str) -> None:
        rows, width = features.shape
        self.torch, self.fits, self.classes, self.seed, self.device = torch, fits, classes, seed, device
        self.width, self.strengths = width + 1, len(fits[0].strengths) if fits else 0
        with_ones = np.ones((rows, width + 1), np.float32)
        with_ones[:, :width] = features
        self.features = torch.from_numpy(with_ones).to(device)
        self.labels = torch.from_numpy(np.asarray(labels, np.int64)).to(device)
        self.targets = torch.nn.functional.one_hot(self.labels, classes).float()
        self.initial = self._initial().to(device)
        self.places = max(1, BATCH_BYTES[device.split(":")[0]] // (BATCH * self.width * 4))

    def _initial(self) -> torch.Tensor:
        """Weights and bias as torch.nn.Linear draws them after torch.manual_seed(seed)."""
        torch = self.torch
        generator = torch.Generator().manual_seed(self.seed)
        weights = torch.empty(self.classes, self.width - 1)
        torch.nn.init.kaiming_uniform_(weights, a=5**0.5, generator=generator)
        bound = (self.width - 1) ** -0.5
        bias = torch.empty(self.classes).uniform_(-bound, bound, generator=generator)
        return torch.cat([weights, bias[:, None]], dim=1)  # type: ignore[no-any-return]

    def _member(self, number: int) -> _Member:
        fit = self.fits[number]
        random = np.random.RandomState(self.seed)
        train, dev = np.asarray(fit.train, np.int64), fit.dev
        if dev is None:
            order = random.permutation(len(train))
            held = max(1, int(VALIDATION * len(train)))
            train, dev = train[order[held:]], train[order[:held]]
        assert len(train)
        assert len(dev)
        assert len(fit.strengths) == self.strengths
        return _Member(
            number=number,
            train=train,
            dev=self.torch.from_numpy(np.asarray(dev, np.int64)).to(self.device),
            random=random,
            best=np.full(self.strengths, -1.0),
            failures=np.zeros(self.strengths, np.int64),
            ended=np.zeros(self.strengths, np.int64),
        )

    def run(self, numbers: Sequence[int]) -> dict[int, Fitted]:
        """The fits of these numbers."""
        with self.torch.inference_mode():
            return self._run(list(numbers)[::-1])

    def _run(self, waiting: list[int]) -> dict[int, Fitted]:
        torch, results = self.torch, dict[int, Fitted]()
        members = [self._member(waiting.pop()) for _ in range(min(self.places, len(waiting)))]
        fresh = self.initial.repeat(self.strengths, 1)
        self.weights = fresh.repeat(len(members), 1, 1)
        self.first, self.second = torch.zeros_like(self.weights), torch.zeros_like(self.weights)
        self.kept = self.weights.clone()
        self.decay = torch.stack([self._decay(member) for member in members])
        while members:
            for _ in range(PASSES):
                self._pass(members)
            self._look(members)
            going = []
            for place, member in enumerate(members):
                if not member.ended.all():
                    going.append(place)
                    continue
                weights = self.kept[place].view(self.strengths, self.classes, self.width)
                results[member.number] = Fitted(weights=weights.cpu().numpy().copy(), accuracy=member.best, passes=tuple(member.ended.tolist()))
                if waiting:
                    members[place] = self._member(waiting.pop())
                    self.weights[place], self.first[place], self.second[place] = fresh, 0, 0
                    self.decay[place] = self._decay(members[place])
                    going.append(place)
            if len(going) < len(members):
                members = [members[place] for place in going]
                self.weights, self.first, self.second, self.kept, self.decay = (
                    array[going] for array in (self.weights, self.first, self.second, self.kept, self.decay)
                )
        return results

    def _decay(self, member: _Member) -> torch.Tensor:
        """l2 of each row of weights, [S * C, 1]."""
        return self.torch.tensor(self.fits[member.number].strengths, device=self.device).repeat_interleave(self.classes)[:, None]  # type: ignore[no-any-return]

    def _pass(self, members: list[_Member]) -> None:
        """Each member once over its training rows. Those with fewer mini-batches rest at the end."""
        torch = self.torch
        steps = max(-(-len(member.train) // BATCH) for member in members)
        rows = np.zeros((len(members), steps * BATCH), np.int64)
        share = np.zeros((len(members), steps * BATCH), np.float32)
        for place, member in enumerate(members):
            count = len(member.train)
            rows[place, :count] = member.train[member.random.permutation(count)]
            share[place, :count] = 1 / BATCH
            last = count // BATCH * BATCH
            share[place, last:count] = 1 / max(1, count - last)
        step = np.array([member.steps for member in members])[None] + np.arange(1, steps + 1)[:, None]
        rate = torch.from_numpy((-LR / (1 - BETA1**step)).astype(np.float32))[:, :, None, None].to(self.device)
        root = torch.from_numpy(np.sqrt(1 - BETA2**step).astype(np.float32))[:, :, None, None].to(self.device)
        rows_FB, share_FB = (torch.from_numpy(array).view(len(members), steps, BATCH).transpose(0, 1).contiguous().to(self.device) for array in (rows, share))
        lengths = np.array([-(-len(member.train) // BATCH) for member in members])
        batch = torch.empty(len(members) * BATCH, self.width, device=self.device)
        for at in range(steps):
            if (lengths > at).all():
                self._step((self.weights, self.first, self.second), self.decay, rows_FB[at], share_FB[at], rate[at], root[at], batch)
                continue
            some = torch.from_numpy(np.flatnonzero(lengths > at)).to(self.device)
            state = self.weights[some], self.first[some], self.second[some]
            self._step(state, self.decay[some], rows_FB[at][some], share_FB[at][some], rate[at][some], root[at][some], batch[: len(some) * BATCH])
            self.weights[some], self.first[some], self.second[some] = state
        for member, length in zip(members, lengths, strict=True):
            member.steps += int(length)

    def _step(self, state: tuple[Any, Any, Any], decay: Any, rows: Any, share: Any, rate: Any, root: Any, batch: Any) -> None:
        """One mini-batch of each member: gradient of the mean cross-entropy, then Adam, in place."""
        torch = self.torch
        weights, first, second = state
        count = len(weights)
        flat = rows.reshape(-1)
        torch.index_select(self.features, 0, flat, out=batch)
        batch_FBD = batch.view(count, BATCH, self.width)
        logits_FSCB = torch.bmm(weights, batch_FBD.transpose(1, 2)).view(count, self.strengths, self.classes, BATCH)
        error = torch.softmax(logits_FSCB, dim=2)
        error.sub_(self.targets.index_select(0, flat).view(count, 1, BATCH, self.classes).transpose(2, 3)).mul_(share[:, None, None, :])
        slope = torch.bmm(error.view(count, -1, BATCH), batch_FBD).addcmul_(weights, decay)
        first.lerp_(slope, 1 - BETA1)
        second.mul_(BETA2).addcmul_(slope, slope, value=1 - BETA2)
        torch.sqrt(second, out=slope)
        slope.div_(root).add_(EPSILON)
        torch.div(first, slope, out=slope)
        weights.addcmul_(slope, rate)

    def _look(self, members: list[_Member]) -> None:
        """Scores on dev: keep the weights that are better than before, stop those that were not too often."""
        torch = self.torch
        right = torch.empty(len(members), self.strengths, dtype=torch.int64, device=self.device)
        for place, member in enumerate(members):
            logits = (self.features[member.dev] @ self.weights[place].T).view(-1, self.strengths, self.classes)
            right[place] = (logits.argmax(dim=2) == self.labels[member.dev][:, None]).sum(dim=0)
        better = np.zeros((len(members), self.strengths), np.bool_)
        for place, (member, hits) in enumerate(zip(members, right.cpu().numpy(), strict=True)):
            member.passes += PASSES
            accuracy = hits / len(member.dev)
            going = member.ended == 0
            better[place] = going & (accuracy > member.best)
            member.best[better[place]] = accuracy[better[place]]
            worse = going & ~better[place]
            member.ended[(worse & (member.failures >= TENACITY)) | (going & (member.passes > MAX_PASSES))] = member.passes
            member.failures += worse
        taken = torch.from_numpy(better.repeat(self.classes, axis=1)).to(self.device)[:, :, None]
        torch.where(taken, self.weights, self.kept, out=self.kept)


def fit_sklearn(features: Floats, labels: Rows, fits: Sequence[Fit], *, classes: int, seed: int) -> list[Fitted]:
    """scikit-learn's LogisticRegression for every fit and strength C, one after another; dev rows are only scored. Arguments as of ``fit_senteval``."""
    from sklearn.exceptions import ConvergenceWarning
    from sklearn.linear_model import LogisticRegression

    results = []
    for fit in fits:
        weights = np.zeros((len(fit.strengths), classes, features.shape[1] + 1), np.float32)
        accuracy = np.full(len(fit.strengths), np.nan)
        unconverged = 0
        train, train_labels = features[fit.train], labels[fit.train]
        dev = None if fit.dev is None else (features[fit.dev], labels[fit.dev])
        for number, strength in enumerate(fit.strengths):
            model = LogisticRegression(C=strength, random_state=seed)
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", ConvergenceWarning)
                model.fit(train, train_labels)
            unconverged += int(model.n_iter_.max() >= model.max_iter)
            found = np.concatenate([model.coef_, model.intercept_[:, None]], axis=1)
            weights[number, :, -1] = -np.inf
            weights[number, model.classes_] = np.concatenate([-found, found]) if len(found) == 1 else found
            if dev is not None:
                accuracy[number] = model.score(*dev)
        results.append(Fitted(weights=weights, accuracy=accuracy, unconverged=unconverged))
    return results
