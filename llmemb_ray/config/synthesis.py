"""Settings of the synthesis of training data."""

from __future__ import annotations

from typing import Any, Self

from pydantic import field_validator, model_validator

from llmemb_ray.config.base import setting
from llmemb_ray.config.generation import GeneratorSettings


class SynthesizeSettings(GeneratorSettings):
    """Training examples written by an LLM, in the families of paper 2."""

    out: str = setting(..., "Directory or URL prefix of the examples and their accounts.", panel="Synthesis")
    count: int = setting(1000, "Examples asked for; a larger count later goes on where a smaller one ended.", panel="Synthesis", ge=1)
    seed: int = setting(0, "Seed of all that is drawn; a request follows from it and its row alone.", panel="Synthesis", ge=0)
    families: dict[str, Any] = setting(
        {},
        "Weights of the families, such as '{sts: 1, bitext: 1}'; default: paper 2's 167 short-long, 122 long-short, 99 sts, 89 bitext, "
        "17 long-long, 13 short-short.",
        panel="Synthesis",
    )
    languages: dict[str, Any] = setting(
        {}, "Weights of the languages by their codes, such as '{en: 3, de: 1}'; default: paper 2's shares of its 93.", panel="Synthesis"
    )
    prompts: str | None = setting(None, "YAML of prompts to take in place of the package's: brainstorm and generate, by family.", panel="Synthesis")
    unit_rows: int = setting(200, "Examples of a unit: what is committed at once.", panel="Synthesis", ge=1, le=100_000)
    overwrite: bool = setting(False, "Begin anew where OUT holds a synthesis with other settings; its files are removed.", panel="Synthesis")

    tasks: list[str] = setting(
        [], "Tasks of one's own beside those that are brainstormed: .jsonl, .csv, .tsv or .parquet with family and task; repeatable.", panel="Tasks"
    )
    tasks_per_family: int = setting(
        1000, "Distinct tasks brainstormed for each family that needs them; 0 takes those of --tasks alone.", panel="Tasks", ge=0, le=1_000_000
    )
    tasks_only: bool = setting(False, "Stop when the tasks stand in OUT/tasks.jsonl, to look at them; the same command without it goes on.", panel="Tasks")

    strict: bool = setting(False, "Reject examples that break a length rule; else they are kept and the rule is noted.", panel="Checks")
    check_language: bool = setting(True, "Reject texts that are plainly in another language than was asked for.", panel="Checks")
    near_duplicates: float | None = setting(
        None,
        "Drop examples whose runs of three characters are those of an earlier one by so much (Jaccard similarity, such as 0.8; MinHash).",
        panel="Checks",
        gt=0,
        le=1,
    )
    contamination: list[str] = setting(
        [], "Files of evaluation texts; an example with one of them, ignoring case and white space, is rejected; repeatable.", panel="Checks"
    )
    max_characters: int = setting(
        16_000, "Characters of one text at most, by the schema that is asked for; less where a placeholder asks for fewer words.", panel="Checks", ge=16
    )
    keep_raw: bool = setting(False, "Keep each answer as it came, in a column raw; rejects have it always.", panel="Checks")

    price_in: float | None = setting(None, "Price of a million prompt tokens.", panel="Cost", ge=0)
    price_out: float | None = setting(None, "Price of a million tokens of answers.", panel="Cost", ge=0)
    budget: float | None = setting(
        None, "Ask no more when so much is spent, in the currency of the prices, with what earlier commands spent.", panel="Cost", gt=0
    )

    @field_validator("languages", mode="before")
    @classmethod
    def _norwegian(cls, value: Any) -> Any:
        """YAML takes the code ``no`` for a boolean."""
        return {"no" if name is False else name: weight for name, weight in value.items()} if isinstance(value, dict) else value

    @field_validator("families", "languages")
    @classmethod
    def _weights(cls, value: dict[str, Any]) -> dict[str, float]:
        for name, weight in value.items():
            if isinstance(weight, bool) or not isinstance(weight, int | float) or not 0 <= weight < float("inf"):
                raise ValueError(f"{name}: {weight!r} is no weight; write a number from 0 on")
        if value and not any(value.values()):
            raise ValueError("all weights are 0")
        return {str(name): float(weight) for name, weight in value.items()}

    @model_validator(mode="after")
    def _check_synthesis(self) -> Self:
        if self.budget is not None and not (self.price_in or self.price_out):
            raise ValueError("budget: cannot be reckoned with without price_in and price_out")
        if self.llm is None and self.model_fields_set & {"price_in", "price_out", "budget"}:
            raise ValueError("price_in, price_out and budget: for an endpoint that is paid by token; they do nothing without llm")
        if self.tasks_per_family == 0 and not self.tasks and not self.families:  # Those named may need none.
            raise ValueError("tasks_per_family: without brainstorming the tasks must come from --tasks")
        return self
