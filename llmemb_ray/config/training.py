"""Settings of contrastive fine-tuning, and of what its outcome is exported to."""

from __future__ import annotations

import math
from typing import Annotated, Any, ClassVar, Literal, Self

from pydantic import BeforeValidator, model_validator

from llmemb_ray.config.base import ModelSettings, RepresentationSettings, Settings, StorageSettings, WeightsSettings, parse_actors, setting

Method = Literal["lora", "full"]

PRESETS: dict[str, dict[str, Any]] = {
    "paper1": {
        "prompt": "prompteol",
        "lora_rank": 64,
        "lora_alpha": 16.0,
        "lora_dropout": 0.05,
        "learning_rate": 5e-4,
        "weight_decay": 0.0,
        "warmup_steps": 100,
        "schedule": "linear",
        "batch_size": 256,
        "epochs": 1,
        "temperature": 0.05,
        "text_tokens": 32,
        "hard_negatives": 1,
        "mask_equal": False,
    },
    "paper2": {
        "prompt": "e5",
        "lora_rank": 16,
        "lora_alpha": 32.0,
        "lora_dropout": 0.1,
        "learning_rate": 1e-4,
        "weight_decay": 0.1,
        "warmup_steps": 100,
        "schedule": "linear",
        "batch_size": 2048,
        "epochs": 1,
        "temperature": 0.02,
        "max_tokens": 512,
        "hard_negatives": 1,
        "gradient_checkpointing": True,
        "mask_equal": False,
    },
}
"""Settings of both papers' training (PAPERS A5, B2); what is given beside a preset wins. Their code masks no equal texts."""


class Source(Settings):
    """Rows of one origin in a mixture."""

    path: list[str] = setting([], "Parquet, CSV, TSV or JSON lines: files, directories or globs.", panel="Data")
    name: str | None = setting(None, "Name in batches and accounts; default: that of the public set, else of the first path.", panel="Data")
    dataset: str | None = setting(None, "Public set of paper 2, which says its columns, instructions and share (docs/training.md).", panel="Data")
    weight: float | None = setting(None, "Share of the rows taken for an epoch; above 1 rows repeat. Default: 1, or the public set's.", panel="Data", gt=0)
    instruction: list[str] = setting([], "Instructions of prompt e5; several are drawn from by row. A column 'instruction' wins.", panel="Data")
    symmetric: bool | None = setting(None, "Give the instruction to both sides; default: the public set's, else no.", panel="Data")
    anchor_column: str | None = setting(None, "Default: anchor, sent0, query, question or text.", panel="Data")
    positive_column: str | None = setting(None, "Default: positive, sent1 or pos; a text, or a list of which one is drawn for each epoch.", panel="Data")
    negative_column: list[str] = setting([], "Default: negative, negative_1 …, negatives, hard_neg or neg; texts or lists.", panel="Data")
    teacher_column: str | None = setting(None, "Column of a teacher's vector of the anchor; default: teacher.", panel="Data")
    scores_column: str | None = setting(None, "Column of a teacher's scores of the positive and the negatives; default: scores.", panel="Data")

    @model_validator(mode="after")
    def _check(self) -> Self:
        if not self.path:
            raise ValueError("path: no file given")
        return self

    def __str__(self) -> str:
        return " ".join(self.path)


def _source(value: Any) -> Any:
    if isinstance(value, str):
        return {"path": [value]}
    if isinstance(value, dict) and isinstance(value.get("path"), str):
        value = value | {"path": [value["path"]]}
    if isinstance(value, dict) and isinstance(value.get("instruction"), str):
        value = value | {"instruction": [value["instruction"]]}
    return value


class FinetuneSettings(RepresentationSettings, WeightsSettings):
    """Contrastive fine-tuning of a model on triples."""

    preset: Literal["none", "paper1", "paper2"] = setting("none", "Settings of a paper's training; what is given beside it wins.", panel="Training")
    method: Method = setting("lora", "lora: train an adapter on all linear layers; full: train all weights (small models).", panel="Training")
    quantization: Literal["none", "nf4"] = setting(
        "none", "Format of the frozen base's weights; nf4: 4 bits, doubly quantised (QLoRA); with method lora.", panel="Model"
    )
    lora_rank: int = setting(16, "Rank of the adapter.", panel="Training", ge=1)
    lora_alpha: float = setting(32.0, "Its scale: alpha divided by the rank multiplies what it adds.", panel="Training", gt=0)
    lora_dropout: float = setting(0.05, "Dropout before it.", panel="Training", ge=0, lt=1)
    lora_targets: list[str] = setting([], "Names of the layers that get one, separated by commas; default: all linear ones.", panel="Training", commas=True)
    gradient_checkpointing: bool = setting(False, "Compute activations again in the backward pass in place of keeping them.", panel="Training")
    shard_parameters: bool = setting(False, "Spread the parameters over the workers (FSDP2), for models that do not fit one.", panel="Training")
    micro_batch: int = setting(
        256,
        "Texts of a worker that are held for the backward pass at once; a larger batch takes no more memory, but a third more time.",
        panel="Training",
        ge=1,
    )

    batch_size: int = setting(64, "Rows in a step, of all workers together.", panel="Training", ge=1)
    epochs: int = setting(1, "Passes over the rows.", panel="Training", ge=1)
    max_steps: int | None = setting(None, "Stop after so many steps; the schedule ends there too.", panel="Training", ge=1)
    learning_rate: float = setting(1e-4, "Of AdamW, at its highest.", panel="Training", gt=0)
    weight_decay: float = setting(0.0, "Of AdamW, on matrices.", panel="Training", ge=0)
    warmup_steps: int = setting(0, "Steps in which the learning rate rises to its highest.", panel="Training", ge=0)
    schedule: Literal["linear", "cosine", "constant"] = setting("linear", "How it falls to zero afterwards.", panel="Training")
    max_grad_norm: float = setting(1.0, "Gradients longer than this are shortened to it; 0 for none.", panel="Training", ge=0)
    seed: int = setting(42, "Of shuffling, drawing, the adapter's start and dropout.", panel="Training", ge=0)

    temperature: float = setting(0.05, "Of the softmax over candidates (paper 1: 0.05, paper 2: 0.02).", panel="Loss", gt=0)
    both_directions: bool = setting(False, "Also from positives to anchors, the mean of both.", panel="Loss")
    matryoshka: list[int] = setting([], "Dimensions whose first so many also make good vectors, separated by commas.", panel="Loss", commas=True)
    mask_equal: bool = setting(True, "Candidates with the text of the positive or the anchor are no negatives.", panel="Loss")
    guide: str | None = setting(None, "Embedding model that says which candidates are false negatives.", panel="Loss")
    guide_margin: float = setting(0.0, "A candidate is one if the guide's score of it exceeds the positive's less this.", panel="Loss")
    distill: Literal["none", "vectors", "scores"] = setting(
        "none", "Learn from a teacher too: its vectors of the anchors, or its scores of positives and negatives.", panel="Loss"
    )
    distill_weight: float = setting(1.0, "Of the teacher's loss; the contrastive one counts 1, and 0 where a batch has no positives.", panel="Loss", ge=0)

    train: list[Annotated[Source, BeforeValidator(_source)]] = setting(
        ..., "Training rows: Parquet, CSV, TSV or JSON lines, a directory or glob; repeatable. In a config file also mappings.", panel="Data"
    )
    text_tokens: int | None = setting(None, "Cut texts to so many tokens before the prompt (paper 1: 32).", panel="Data", ge=1)
    hard_negatives: int = setting(1, "Most negatives of a row that are used; drawn for each epoch where it has more.", panel="Data", ge=0)
    mix_tasks: bool = setting(False, "Let a batch hold rows of several sources; else in-batch negatives are of the same task.", panel="Data")
    holdout: int = setting(0, "Rows kept apart to evaluate on.", panel="Data", ge=0)

    evaluate: Literal["none", "sts-dev", "holdout"] = setting("none", "What checkpoints are chosen by: STS-B dev, or the rows held out.", panel="Evaluation")
    data: str | None = setting(None, "Directory of evaluation data; default: LLMEMB_DATA.", panel="Evaluation")
    eval_steps: int = setting(100, "Steps between evaluations.", panel="Evaluation", ge=1)
    patience: int | None = setting(None, "Stop after so many evaluations without a better one.", panel="Evaluation", ge=1)

    out: str = setting(..., "Directory or URL prefix of batches, checkpoints, metrics and the outcome.", panel="Output")
    overwrite: bool = setting(False, "Delete what another training left in OUT.", panel="Output")
    checkpoint_steps: int = setting(50, "Steps between checkpoints.", panel="Output", ge=1)
    log_steps: int = setting(10, "Steps between lines of the log.", panel="Output", ge=1)

    workers: str = setting("1", "Workers of Ray Train: N, or MIN:MAX to train with as many as there is room for.", panel="Cluster")
    gpus_per_worker: float | None = setting(None, "GPUs of a worker; default 1 where the cluster has GPUs, else 0.", panel="Cluster", ge=0)
    cpus_per_worker: float | None = setting(None, "CPU cores of a worker; default: 1 beside a GPU, else what the cluster has for each.", panel="Cluster", gt=0)
    max_failures: int = setting(3, "Times that training is started again from its last checkpoint after a worker died.", panel="Cluster", ge=0)
    ray_address: str | None = setting(None, "Ray cluster; default: RAY_ADDRESS, else a Ray of its own on this machine.", panel="Cluster")

    _BASE: ClassVar[tuple[str, ...]] = tuple(name for part in (RepresentationSettings, WeightsSettings) for name in part.model_fields)

    @model_validator(mode="before")
    @classmethod
    def _with_preset(cls, values: Any) -> Any:
        if isinstance(values, dict):
            if type(values.get("workers")) is int:
                values = values | {"workers": str(values["workers"])}
            cls._check_given(values)
            if values.get("preset") in PRESETS:
                left_out = {"prompt", "max_tokens"} if values.get("representation") is not None else set()
                return {name: value for name, value in PRESETS[values["preset"]].items() if name not in left_out} | values
        return values

    @classmethod
    def _check_given(cls, values: dict[str, Any]) -> None:
        """Raises ValueError for what was given, not by a preset, and would do nothing."""
        idle = sorted(name for name in values if name.startswith("lora_") and values.get("method") == "full")
        if idle:
            raise ValueError(f"{', '.join(idle)}: nothing with method full; leave it out")
        if "distill_weight" in values and values.get("distill", "none") == "none":
            raise ValueError("distill_weight: does nothing without distill")
        if "eval_steps" in values and values.get("evaluate", "none") == "none":
            raise ValueError("eval_steps: does nothing without evaluate")

    @model_validator(mode="after")
    def _check(self) -> Self:
        if not self.train:
            raise ValueError("train: no file given")
        low, high = self.worker_range
        for workers in range(low, high + 1):
            if self.batch_size % workers:
                raise ValueError(
                    f"batch_size: {self.batch_size} rows do not divide among {workers} workers; take {math.lcm(*range(low, high + 1))} or a multiple"
                )
        if self.quantization == "nf4" and self.method == "full":
            raise ValueError("quantization: weights of 4 bits cannot be trained; set method lora, or leave quantization out")
        if self.evaluate == "holdout" and not self.holdout:
            raise ValueError("evaluate: holdout needs rows to evaluate on; give holdout, the number of rows kept apart")
        if self.patience is not None and self.evaluate == "none":
            raise ValueError("patience: needs an evaluation; give evaluate")
        if "role" in self.model_fields_set:
            raise ValueError("role: anchors are embedded as queries and positives as documents; leave it out")
        if any(size < 1 for size in self.matryoshka):
            raise ValueError(f"matryoshka: {self.matryoshka} must be positive numbers of dimensions")
        if self.layer != -1 and self.shard_parameters:
            raise ValueError("layer: with shard_parameters only the last layer's states are trained; leave one of them out")
        if self.guide is None and "guide_margin" in self.model_fields_set:
            raise ValueError("guide_margin: needs a guide, a model that scores candidates")
        return self

    @property
    def worker_range(self) -> tuple[int, int]:
        """Fewest and most workers. Raises ValueError."""
        found = parse_actors(self.workers)
        if found is None or found[0] < 1:
            raise ValueError(f"workers: {self.workers!r} is neither N nor MIN:MAX")
        return found

    def model_settings(self) -> ModelSettings:
        """The same model and representation as one that embeds with transformers."""
        given = {name: getattr(self, name) for name in self._BASE if name in self.model_fields_set}
        return ModelSettings.make(given | {"backend": "hf", "quantization": self.quantization, "role": "query"})


class ExportModelSettings(StorageSettings):
    """What a trained model is written as."""

    trained: str = setting(..., "Directory or URL of the training (its OUT), of an adapter or of a model.", panel="Model", argument=True)
    to: Literal["merged", "sentence-transformers"] = setting(
        "merged", "merged: one model in place of base and adapter; sentence-transformers: a directory that SentenceTransformer loads.", panel="Output"
    )
    dest: str = setting(..., "Directory to write.", panel="Output")
    base: str | None = setting(None, "Base model; default: the one that the adapter names.", panel="Model")
    dtype: Literal["bfloat16", "float16", "float32"] = setting("bfloat16", "Precision of the weights written.", panel="Output")
    overwrite: bool = setting(False, "Replace what stands in DEST.", panel="Output")
    trust_remote_code: bool = setting(False, "Run the Python code that the model's repository brings.", panel="Model")
