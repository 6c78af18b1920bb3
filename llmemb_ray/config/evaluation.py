"""Settings of evaluation and of the search for demonstrations."""

from __future__ import annotations

import difflib
from typing import Any, Literal, Self

from pydantic import field_validator, model_validator

from llmemb_ray.config.base import ClusterSettings, setting
from llmemb_ray.errors import ConfigError

SUITES = ("sts", "sts-raw", "transfer", "retrieval", "bitext", "passkey", "mteb")

PASSKEY_LENGTHS = (256, 512, 1024, 2048, 4096, 8192, 16384, 32768)
"""Prompt lengths of paper 2, figure 5, in tokens."""


class EvaluateSettings(ClusterSettings):
    """Suites of tasks on which a model and its representation are scored."""

    runs: list[str] = setting([], "Directories that earlier evaluations wrote, with --compare.", panel="Evaluation", argument=True)
    model: str = setting("", "Hub id, local directory or URL (s3://…) of a decoder-only model.", panel="Model")
    suite: list[str] = setting([], f"{', '.join(SUITES)}; some tasks alone as SUITE:TASK,TASK; repeatable.", panel="Evaluation")
    data: str | None = setting(None, "Directory of the data sets, or hub; default: LLMEMB_DATA.", panel="Evaluation")
    out: str | None = setting(
        None, "Directory or URL prefix of results and vectors; default: evaluation/MODEL-SPACE. Vectors that are there are used again.", panel="Evaluation"
    )
    seed: int = setting(1111, "Seed of folds and classifiers (SentEval's is 1111), and of passkeys.", panel="Evaluation", ge=0)
    classifier: Literal["senteval", "sklearn"] = setting(
        "senteval", "transfer: SentEval's early-stopped linear classifier, or scikit-learn's logistic regression.", panel="Evaluation"
    )
    folds: int = setting(10, "transfer: folds of cross-validation; SentEval's test setting is 10, its quick one 5.", panel="Evaluation", ge=2)
    lengths: list[int] = setting(
        [], "passkey: prompt lengths in tokens, separated by commas; default: 256 to 32768 as far as max_tokens allows.", panel="Evaluation", commas=True
    )
    mteb_job_documents: int = setting(
        100_000, "mteb: corpora of so many documents and more are embedded by the embedding job, whose vectors are kept.", panel="Evaluation", ge=1
    )
    top_k: int = setting(1000, "retrieval: documents ranked for each query.", panel="Evaluation", ge=10)
    split: str = setting("test", "retrieval: judgements qrels/SPLIT.tsv.", panel="Evaluation")
    task_instructions: bool = setting(True, "prompt e5 without an instruction: take paper 2's instruction of each task.", panel="Evaluation")
    contamination: list[str] = setting(
        [], "Training file (Parquet, JSON lines, CSV, text) whose texts are looked for in the suites; repeatable; needs no model.", panel="Evaluation"
    )
    compare: bool = setting(False, "Compare the evaluations in RUNS: one table and one page.", panel="Evaluation")
    study: str | None = setting(None, "YAML of models and representations: each pair is evaluated, then all are compared (jobs/reproduce).", panel="Evaluation")
    models: list[str] = setting([], "study: these models, separated by commas, in place of the study's own.", panel="Evaluation", commas=True)

    @field_validator("lengths", mode="before")
    @classmethod
    def _lengths(cls, value: Any) -> Any:
        return [int(part) if str(part).strip().isdigit() else part for part in value] if isinstance(value, list | tuple) else value

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.compare:
            if not self.runs:
                raise ValueError("compare: name the directories of evaluations: llmemb evaluate --compare RUN RUN …")
            ignored = sorted(self.model_fields_set - {"compare", "runs", "out", "endpoint_url", "storage_options", "storage_retry_seconds"})
            if ignored:
                raise ValueError(f"compare: nothing is evaluated, so that {', '.join(ignored)} would do nothing; leave out")
            return self
        if self.runs:
            raise ValueError(f"runs: {self.runs[0]!r} is compared only with --compare; else give --model and --suite")
        if self.models and self.study is None:
            raise ValueError("models: is for a study; one model is named with --model")
        if self.study is not None:
            if self.model:
                raise ValueError("model: a study names its models; give others with --models A,B")
            return self
        if not self.suite:
            raise ValueError(f"suite: must be given, one of {', '.join(SUITES)}")
        if not self.model and not self.contamination:
            raise ValueError("model: must be given")
        return self

    def suites(self) -> dict[str, list[str]]:
        """Task names by suite, in the order asked for; an empty list means all. Raises ConfigError for a suite that does not exist."""
        chosen: dict[str, list[str]] = {}
        for text in self.suite:
            asked, _, tasks = text.partition(":")
            name = asked.strip().lower()
            if name not in SUITES:
                near = difflib.get_close_matches(name, SUITES, n=2, cutoff=0.4)
                raise ConfigError(f"suite: there is no suite {asked!r}" + (f"; nearest: {', '.join(near)}" if near else "") + f" (suites: {', '.join(SUITES)})")
            wanted = [task.strip() for task in tasks.split(",") if task.strip()]
            earlier = chosen.get(name)
            chosen[name] = [] if not wanted or earlier == [] else [*(earlier or []), *wanted]
        return chosen
