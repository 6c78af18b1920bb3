"""The training loop of one worker: read its part of a step, vectors, loss, gradients, a step of the optimiser; checkpoints and evaluation.

Invariant: what a step does depends on the weights, the optimiser's state, the settings and the step's number alone: batches are read by number,
random numbers are seeded by it. So a training that goes on from a checkpoint ends as one that was never stopped.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

from llmemb_ray.config import FinetuneSettings
from llmemb_ray.embedders.embedder import Embedder, EmbedderSpec
from llmemb_ray.errors import CheckFailed, ConfigError, InputError, RunFailed
from llmemb_ray.representation import Role, TokenRows
from llmemb_ray.training import caching, distillation
from llmemb_ray.training.batches import Batch, Batches
from llmemb_ray.training.checkpoints import Checkpoint, Checkpoints
from llmemb_ray.training.judging import Asked, Floats, Judge
from llmemb_ray.training.loss import InfoNCE, Outcome, Rows, gathered
from llmemb_ray.training.model import TrainedModel
from llmemb_ray.training.prompting import Prompting, Prompts
from llmemb_ray.training.schedule import learning_rate, seed_of

if TYPE_CHECKING:
    import torch

PIECES = 4
"""Forward passes that a batch of at most ``micro_batch`` texts is cut into by length, so that short texts are not padded to the longest."""

SHOWN_ROWS = 5


@dataclass(frozen=True)
class Place:
    """This worker among all of them."""

    rank: int = 0
    workers: int = 1


@dataclass
class Standing:
    """What a checkpoint says besides weights and optimiser."""

    step: int = 0
    """Steps done."""
    tokens: int = 0
    seconds: float = 0.0
    rows: list[dict[str, Any]] = field(default_factory=list)
    """Of metrics, as ``metrics`` has them."""
    best_step: int | None = None
    """Of those evaluated after training began."""
    best_score: float | None = None
    worse: int = 0
    """Evaluations since the best one."""


@dataclass
class _Sums:
    """Of the steps since the last line."""

    steps: int = 0
    contrasted: int = 0
    """Of the steps, those with positives."""
    loss: float = 0.0
    contrastive: float = 0.0
    distillation: float = 0.0
    accuracy: float = 0.0
    masked: int = 0
    tokens: int = 0
    seconds: float = 0.0
    norm: float = 0.0


Tell = Callable[[dict[str, Any]], None]


class Loop:
    """One worker's training. Every worker of a group makes one and runs it.

    tell: called by the first worker with each new row of metrics; keep: by the first worker after each checkpoint, with all rows
    """

    def __init__(
        self,
        settings: FinetuneSettings,
        spec: EmbedderSpec,
        batches: Batches,
        checkpoints: Checkpoints,
        *,
        device: torch.device,
        place: Place | None = None,
        judge: Judge | None = None,
        tell: Tell = lambda row: None,
        keep: Callable[[list[dict[str, Any]]], None] = lambda rows: None,
    ) -> None:
        import torch

        self.settings, self.spec, self.batches, self.checkpoints = settings, spec, batches, checkpoints
        self.place, self.judge, self._tell, self._keep = place or Place(), judge, tell, keep
        self.device = device
        self.steps = min(batches.steps, settings.max_steps or batches.steps)
        self.prompting = Prompting(spec, text_tokens=settings.text_tokens)
        self.model = TrainedModel.load(spec, settings, device=device)
        self._loss = InfoNCE(
            temperature=settings.temperature,
            both_directions=settings.both_directions,
            dimensions=self._widths(),
            guide_margin=settings.guide_margin if settings.guide else None,
        )
        self._guide = Embedder.load(settings.guide, device=str(device), compute_dtype=settings.compute_dtype) if settings.guide else None
        named = self.model.trainable()
        groups = [
            {"params": [weight for _, weight in named if weight.ndim >= 2], "weight_decay": settings.weight_decay},
            {"params": [weight for _, weight in named if weight.ndim < 2], "weight_decay": 0.0},
        ]
        self.optimizer = torch.optim.AdamW([group for group in groups if group["params"]], lr=settings.learning_rate)
        self.standing = Standing()
        self._sums = _Sums()

    def _widths(self) -> tuple[int, ...]:
        """Of the vectors that the loss is taken of: with Matryoshka all of them, and the whole. Raises ConfigError."""
        wide, asked = self.model.size, self.settings.matryoshka
        if asked and max(asked) > wide:
            raise ConfigError(f"matryoshka: {max(asked)} are more than the {wide} dimensions of this model's vectors")
        return tuple(sorted({*asked, wide})) if asked else ()

    # -- the course of it --------------------------------------------------------------------------

    def run(self) -> Standing:
        """Trains to the end, from the last checkpoint if there is one. Raises RunFailed where the loss is no number."""
        self._resume()
        if self.judge is not None and not self.standing.rows:
            self._evaluate()
        with ThreadPoolExecutor(1, thread_name_prefix="batches") as ahead:
            coming = self._ask(ahead, self.standing.step)
            while coming is not None and not self._patience_is_over():
                batch, prompts = coming.result()
                coming = self._ask(ahead, self.standing.step + 1)
                self._step(batch, prompts)
                self._after_step(batch.task)
        return self.standing

    def _ask(self, ahead: ThreadPoolExecutor, step: int) -> Future[tuple[Batch, Prompts]] | None:
        return ahead.submit(self._read, step) if step < self.steps else None

    def _read(self, step: int) -> tuple[Batch, Prompts]:
        batch = self.batches.read(step, self.place.rank, self.place.workers)
        return batch, self.prompting.of(batch)

    def _after_step(self, task: str) -> None:
        done, settings = self.standing.step, self.settings
        last = done == self.steps
        judged = self.judge is not None and (done % settings.eval_steps == 0 or last)
        saved = judged or done % settings.checkpoint_steps == 0 or last
        if saved or done % settings.log_steps == 0:
            self._log(task)  # Before a checkpoint, so that none is left with sums of some steps.
        if judged:
            self._evaluate()
        if saved:
            self._save()

    def _patience_is_over(self) -> bool:
        return self.settings.patience is not None and self.standing.worse >= self.settings.patience

    # -- a step ------------------------------------------------------------------------------------

    def _step(self, batch: Batch, prompts: Prompts) -> None:
        import torch

        started, settings, step = time.perf_counter(), self.settings, self.standing.step
        torch.manual_seed(seed_of(settings.seed, step, self.place.rank))
        rate = learning_rate(step, steps=self.steps, warmup=settings.warmup_steps, highest=settings.learning_rate, schedule=settings.schedule)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        self.model.train()
        self.optimizer.zero_grad(set_to_none=True)
        value, parts = self._backward(batch, prompts)
        self.model.average_gradients()
        norm = self.model.clip(settings.max_grad_norm)
        if not np.isfinite(norm):
            raise RunFailed(f"step {step + 1}: the gradient is not finite; lower learning_rate, or compute in float32; rows {_some(batch.sources)}")
        self.optimizer.step()
        sums = self._sums
        sums.steps += 1
        sums.loss += float(value)
        sums.contrasted += prompts.positives > 0
        sums.contrastive += parts.contrastive
        sums.distillation += parts.distillation
        sums.accuracy += parts.accuracy
        sums.masked += parts.masked
        sums.norm += norm
        sums.tokens += int(prompts.lengths.sum())
        sums.seconds += time.perf_counter() - started
        self.standing.step += 1

    def _backward(self, batch: Batch, prompts: Prompts) -> tuple[torch.Tensor, _Parts]:
        """Gradients of this worker's loss; large batches in micro-batches, with the gradients of one pass."""
        import torch

        order = np.argsort(prompts.lengths, kind="stable")
        cached = len(order) > self.settings.micro_batch
        size = self.settings.micro_batch if cached else max(1, -(-len(order) // PIECES))
        pieces = [prompts.rows.take(order[start : start + size]) for start in range(0, len(order), size)]
        back = torch.from_numpy(np.argsort(order, kind="stable")).to(self.device)

        def loss(vectors: torch.Tensor) -> tuple[torch.Tensor, _Parts]:
            return self._loss_of(vectors[back], batch, prompts)

        if cached:
            return caching.backward(self.model.encode, pieces, loss, device=self.device, held_back=self.model.no_sync)
        value, parts = loss(torch.cat([self.model.encode(piece) for piece in pieces]))
        value.backward()  # type: ignore[no-untyped-call]
        return value.detach(), parts

    def _loss_of(self, vectors: torch.Tensor, batch: Batch, prompts: Prompts) -> tuple[torch.Tensor, _Parts]:
        """vectors: [N, D], in the order of the prompts. Raises RunFailed naming the rows whose vectors are not finite."""
        import torch

        self._require_finite(vectors, batch, prompts)
        anchors, positives, negatives = vectors.split([prompts.anchors, prompts.positives, prompts.anchors * prompts.negatives])  # type: ignore[no-untyped-call]
        value = vectors.new_zeros(())
        contrastive = distilled = accuracy = 0.0
        masked = 0
        rows = Rows(anchors=anchors, positives=positives, negatives=negatives.unflatten(0, (prompts.anchors, prompts.negatives)))
        if prompts.positives:
            outcome = self._contrast(rows, batch)
            value, contrastive, accuracy, masked = value + outcome.loss, float(outcome.loss.detach()), outcome.accuracy, outcome.masked
        settings = self.settings
        if settings.distill == "vectors" and batch.teacher is not None:
            lost = distillation.from_vectors(anchors, torch.from_numpy(batch.teacher).to(self.device))
            value, distilled = value + settings.distill_weight * lost, float(lost.detach())
        elif settings.distill == "scores" and batch.scores is not None and prompts.positives:
            lost = distillation.from_scores(rows, torch.from_numpy(batch.scores).to(self.device), settings.temperature)
            value, distilled = value + settings.distill_weight * lost, float(lost.detach())
        if not value.isfinite():
            raise RunFailed(
                f"step {self.standing.step + 1}: the loss is {float(value.detach())}; lower learning_rate or raise temperature; rows {_some(batch.sources)}"
            )
        return value, _Parts(contrastive, distilled, accuracy, masked)

    def _contrast(self, rows: Rows, batch: Batch) -> Outcome:
        import torch

        from llmemb_ray.mining.equality import keys

        if self.settings.mask_equal:
            candidates = [text for positive, others in zip(batch.positives, batch.negatives, strict=True) for text in (positive, *others)]
            rows = Rows(
                anchors=rows.anchors,
                positives=rows.positives,
                negatives=rows.negatives,
                anchor_ids=torch.from_numpy(keys(batch.anchors)).to(self.device),
                candidate_ids=torch.from_numpy(keys(candidates)).to(self.device).unflatten(0, (len(batch.anchors), -1)),  # type: ignore[no-untyped-call]
            )
        return self._loss(rows, self._guided(batch) if self._guide else None)

    def _guided(self, batch: Batch) -> Rows:
        import torch

        assert self._guide is not None

        def vectors(texts: list[str], role: Role = "document") -> torch.Tensor:
            return torch.from_numpy(self._guide.encode(texts, role)).to(self.device)  # type: ignore[union-attr]

        others = [text for row in batch.negatives for text in row]
        negatives = vectors(others) if others else torch.zeros(0, self._guide.dimension, device=self.device)
        shaped = negatives.unflatten(0, (len(batch.anchors), -1)) if others else negatives.reshape(len(batch.anchors), 0, self._guide.dimension)  # type: ignore[no-untyped-call]
        return Rows(anchors=vectors(batch.anchors, "query"), positives=vectors(batch.positives), negatives=shaped)

    def _require_finite(self, vectors: torch.Tensor, batch: Batch, prompts: Prompts) -> None:
        bad = np.flatnonzero(~vectors.detach().isfinite().all(dim=1).cpu().numpy())
        if len(bad):
            firsts = prompts.anchors + prompts.positives
            rows = sorted({int(place % prompts.anchors if place < firsts else (place - firsts) // prompts.negatives) for place in bad})
            raise RunFailed(
                f"step {self.standing.step + 1}: {len(bad)} vectors of {len(rows)} rows are not finite ({_some([batch.sources[row] for row in rows])}); "
                "lower learning_rate, or compute in float32"
            )

    # -- evaluation --------------------------------------------------------------------------------

    def _evaluate(self) -> None:
        assert self.judge is not None
        standing = self.standing
        started = time.perf_counter()
        self.model.eval()
        score = self.judge.score(self._embed)
        standing.seconds += time.perf_counter() - started
        if standing.step and np.isfinite(score) and (standing.best_score is None or score > standing.best_score):
            standing.best_score, standing.best_step, standing.worse = score, standing.step, 0
        elif standing.step:
            standing.worse += 1
        self._row({"step": standing.step, "evaluation": self.judge.name, "score": score})

    def _embed(self, asked: Asked) -> Floats:
        """Unit vectors of texts, each worker computing its share, in as many passes as the others."""
        import torch

        prompter = self.prompting.prompter(asked.role, asked.instruction, symmetric=asked.symmetric)
        rows, unfit = prompter.tokenize(list(asked.texts))
        for text, problem in zip(asked.texts, unfit, strict=True):
            if problem is not None:
                raise InputError(f"evaluate: {text[:60]!r} cannot be embedded: {problem}; leave it out of the rows that are judged by")
        order = np.argsort(rows.lengths, kind="stable")
        share = -(-len(order) // self.place.workers)
        padded = np.concatenate([order, np.repeat(order[-1:], share * self.place.workers - len(order))])
        own = padded[self.place.rank :: self.place.workers]  # Lengths alike for all.
        size = self.settings.micro_batch
        with torch.no_grad():
            made = torch.cat([self._one(rows.take(own[start : start + size])) for start in range(0, len(own), size)])
            together = gathered(made).float().cpu().numpy()
        vectors = np.zeros((len(order), together.shape[1]), np.float32)
        places = np.concatenate([padded[rank :: self.place.workers] for rank in range(self.place.workers)])
        vectors[places] = together
        return vectors

    def _one(self, rows: TokenRows) -> torch.Tensor:
        from torch.nn.functional import normalize

        return normalize(self.model.encode(rows).float(), dim=1)

    # -- metrics and checkpoints -------------------------------------------------------------------

    def _row(self, row: dict[str, Any]) -> None:
        self.standing.rows.append(row)
        if self.place.rank == 0:
            self._tell(row)

    def _log(self, task: str) -> None:
        import torch

        sums, standing = self._sums, self.standing
        if not sums.steps:
            return
        contrasted = max(1, sums.contrasted)
        means = [sums.loss / sums.steps, sums.contrastive / contrasted, sums.distillation / sums.steps, sums.accuracy / contrasted, sums.norm / sums.steps]
        shared = gathered(torch.tensor([[*means, sums.masked, sums.tokens]], dtype=torch.float64, device=self.device))
        loss, contrastive, distilled, accuracy, norm = (float(value) for value in shared[:, :5].mean(dim=0))
        masked, tokens = (int(value) for value in shared[:, 5:].sum(dim=0))
        standing.tokens += tokens
        standing.seconds += sums.seconds
        self._row(
            {
                "step": standing.step,
                "epoch": standing.step / self.batches.steps_per_epoch,
                "task": task,
                "loss": loss,
                "contrastive": contrastive if sums.contrasted else None,
                "distillation": distilled if self.settings.distill != "none" else None,
                "accuracy": accuracy if sums.contrasted else None,
                "masked": masked,
                "learning_rate": self.optimizer.param_groups[0]["lr"],
                "gradient_norm": norm,
                "tokens": standing.tokens,
                "tokens_per_second": tokens / sums.seconds if sums.seconds else 0.0,
                "seconds": round(standing.seconds, 3),
                "memory_bytes": memory_bytes(self.device),
            }
        )
        self._sums = _Sums()

    def _save(self) -> None:
        """A checkpoint by the first worker; all take part in gathering it."""
        state, optimizer = self.model.state(), self.model.optimizer_state(self.optimizer)
        if self.place.rank == 0:
            info = vars(self.standing) | {"rows": list(self.standing.rows)}
            self.checkpoints.write(Checkpoint(step=self.standing.step, state=state, optimizer=optimizer, info=info))
            self.checkpoints.keep([self.standing.best_step] if self.standing.best_step else [])
            self._keep(self.standing.rows)
        barrier()

    def _resume(self) -> None:
        """All workers go on from the same checkpoint: the last one that is whole."""
        found = same_for_all(self.checkpoints.latest() if self.place.rank == 0 else None)
        if found is None:
            return
        checkpoint = self.checkpoints.read(found)
        self.model.load_state(checkpoint.state)
        self.model.load_optimizer_state(self.optimizer, checkpoint.optimizer)
        self.standing = Standing(**checkpoint.info)

    def load_best(self) -> None:
        """The weights that the judge liked best, in place of the last ones."""
        best = self.standing.best_step
        if best and best != self.standing.step:
            try:
                self.model.load_state(self.checkpoints.read(best).state)
            except CheckFailed as error:
                raise RunFailed(f"the best checkpoint is damaged: {error}; bring it back, or take the last one with evaluate none in another out") from error


@dataclass(frozen=True)
class _Parts:
    contrastive: float
    distillation: float
    accuracy: float
    masked: int


def memory_bytes(device: torch.device) -> int:
    """Most that this worker held: of GPU memory, or of memory where there is no GPU."""
    import resource

    import torch

    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def same_for_all(value: Any) -> Any:
    """What the first worker gives, on every worker."""
    import torch.distributed as dist

    if not (dist.is_available() and dist.is_initialized()):
        return value
    values = [value]
    dist.broadcast_object_list(values)
    return values[0]


def barrier() -> None:
    import torch.distributed as dist

    if dist.is_available() and dist.is_initialized():
        dist.barrier()


def _some(sources: list[str]) -> str:
    more = f" and {len(sources) - SHOWN_ROWS} more" if len(sources) > SHOWN_ROWS else ""
    return ", ".join(sources[:SHOWN_ROWS]) + more
