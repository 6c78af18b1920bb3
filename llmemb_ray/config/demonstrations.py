"""Settings of the demonstrations: making their candidates, and choosing among them."""

from __future__ import annotations

from typing import Literal, Self

from pydantic import model_validator

from llmemb_ray.config.base import ClusterSettings, setting
from llmemb_ray.config.generation import LLMSettings, named
from llmemb_ray.representation.cleaning import Cleaning

TRANSFER = "transfer:"
"""Begins the name of what demonstrations are chosen for, where that is a transfer task."""


STSB_TRAIN = ("stsb-train", "stsb-train-senteval")
"""Sentences that need no file: STS-B's training pairs as they were written, and lower-cased and tokenised."""


class DemosBuildSettings(LLMSettings):
    """Candidates of demonstrations: sentences summed up in one word by an LLM, and words with their definitions."""

    out: str = setting(..., "JSON lines to write: sentence, word, source; local or URL.", panel="Candidates", argument=True)
    append: bool = setting(False, "Add to the candidates that are in OUT.", panel="Candidates")
    overwrite: bool = setting(False, "Replace the candidates that are in OUT; answers kept beside it are used again.", panel="Candidates")
    seed: int = setting(0, "Seed of the samples.", panel="Candidates", ge=0)

    sentences: list[str] = setting(
        [],
        "Sentences to sum up: stsb-train (as written), stsb-train-senteval (lower-cased, tokenised), or a file: .txt with one a line, "
        ".jsonl, .csv, .tsv, .parquet; repeatable.",
        panel="Sentences",
    )
    sentence_column: str | None = setting(None, "Column of the sentences in such a file; default: sentence, else text.", panel="Sentences")
    count: int = setting(100, "Distinct sentences sampled from each source; paper 1 takes 100.", panel="Sentences", ge=1)
    data: str | None = setting(None, "Directory of the data sets, for stsb-train; default: LLMEMB_DATA.", panel="Sentences")

    dictionary: list[str] = setting(
        [],
        "Words with definitions: .tsv (word, tab, definition), .jsonl (word, definition), WordNet's data.noun, data.verb, data.adj, data.adv, "
        "or their directory; repeatable.",
        panel="Dictionary",
    )
    dictionary_count: int = setting(200, "Entries sampled from each dictionary; paper 1 takes 200.", panel="Dictionary", ge=1)

    request_timeout: float = setting(60.0, "Seconds that a request may take.", panel="Endpoint", gt=0)
    temperature: float | None = setting(0.0, "Of the answers: 0 for the likeliest; null leaves it to the endpoint.", panel="Generation", ge=0)
    max_new_tokens: int = setting(24, "Tokens of an answer at most; a model that reasons first needs more.", panel="Generation", ge=1)

    @model_validator(mode="after")
    def _check(self) -> Self:
        if not self.sentences and not self.dictionary:
            raise ValueError("sentences or dictionary must be given: candidates are made of sentences that an LLM sums up, or of words with definitions")
        if self.append and self.overwrite:
            raise ValueError("append and overwrite exclude each other")
        if self.sentences and (self.llm is None) == (self.model is None):
            raise ValueError("llm or model, one of them, must be given: the model of an endpoint, or one to load, that sums up the sentences")
        if not self.sentences and (self.llm or self.model):
            raise ValueError("llm and model sum up sentences; give sentences, or leave them out")
        if not self.sentences and (ignored := self.model_fields_set & {"sentence_column", "count", "data", "max_new_tokens", "temperature", "top_p"}):
            raise ValueError(f"{named(ignored)}: for sentences that an LLM sums up; does nothing with a dictionary alone")
        if not self.dictionary and "dictionary_count" in self.model_fields_set:
            raise ValueError("dictionary_count: does nothing without a dictionary; count is for sentences")
        of_stsb = [name in STSB_TRAIN for name in self.sentences]
        if self.sentence_column is not None and all(of_stsb):
            raise ValueError(f"sentence_column: is for files with columns, not for {' and '.join(self.sentences)}; leave it out")
        if self.data is not None and not any(of_stsb):
            raise ValueError(f"data: only {' and '.join(STSB_TRAIN)} are looked for there; leave it out")
        return self


class DemosSelectSettings(ClusterSettings):
    """Which demonstrations are best for a model."""

    candidates: str | None = setting(None, "JSON lines of demonstrations (sentence, word), as llmemb demos build writes them.", panel="Search")
    out: str = setting(..., "Directory or URL prefix of the leaderboard; what is scored there is not scored again.", panel="Search")
    data: str | None = setting(None, "Directory of the data sets; default: LLMEMB_DATA.", panel="Search")
    for_: str = setting("sts", "What they are chosen for: sts (STS-B dev), or transfer:TASK with the task's labelled examples as candidates.", panel="Search")
    raw: bool = setting(False, "sts: the original text of STS-B, in place of SentEval's lower-cased, tokenised one.", panel="Search")
    demos_per_prompt: int = setting(1, "Demonstrations in a prompt; for sts up to so many, found one after another.", panel="Search", ge=1)
    beam: int = setting(1, "sts: so many of the best prompts are lengthened by each candidate in turn.", panel="Search", ge=1)
    halving: bool = setting(False, "Successive halving: score on a sample of dev, drop the worse half, double the sample.", panel="Search")
    halving_first: int = setting(8, "halving: the first sample is one N-th of dev.", panel="Search", ge=2)
    draws: int = setting(100, "transfer: prompts drawn from the task's labelled examples.", panel="Search", ge=1)
    examples: int | None = setting(None, "transfer: score on so many of the task's training examples; default: all.", panel="Search", ge=20)
    folds: int = setting(5, "transfer: folds of cross-validation.", panel="Search", ge=2)
    classifier: Literal["senteval", "sklearn"] = setting(
        "senteval", "transfer: SentEval's early-stopped linear classifier, or scikit-learn's logistic regression.", panel="Search"
    )
    seed: int = setting(1111, "Seed of the samples of halving, and of the draws and classifiers of transfer.", panel="Search", ge=0)
    top: int = setting(20, "Rows of the leaderboard that are printed.", panel="Search", ge=1)
    clean: Cleaning = setting("senteval", "Text preparation; senteval is that of paper 1's evaluation.", panel="Representation")

    @model_validator(mode="after")
    def _check_search(self) -> Self:
        if self.representation is not None or self.prompt != "prompteol" or self.demo or self.instruction is not None:
            raise ValueError("prompt: demonstrations are chosen for prompteol; leave prompt, demo, instruction and representation out")
        if self.transfer_task is None:
            if self.for_ != "sts":
                raise ValueError(f"for: {self.for_!r} is neither sts nor transfer:TASK, such as transfer:MR")
            if self.candidates is None:
                raise ValueError("candidates: must be given; llmemb demos build makes them")
            ignored = self.model_fields_set & {"draws", "examples", "folds", "classifier"}
        else:
            ignored = self.model_fields_set & {"candidates", "raw", "beam"}
            if self.transfer_task.casefold() == "sst2":  # It has a dev split.
                ignored |= self.model_fields_set & {"folds"}
        if ignored:
            raise ValueError(f"{', '.join(sorted(ignored))}: not used with for {self.for_}; leave out")
        if "role" in self.model_fields_set:
            raise ValueError("role: demonstrations are chosen for both roles at once; leave out")
        if "beam" in self.model_fields_set and self.demos_per_prompt == 1:
            raise ValueError("beam: does nothing with one demonstration in a prompt; leave it out, or set demos_per_prompt")
        if "halving_first" in self.model_fields_set and not self.halving:
            raise ValueError("halving_first: does nothing without halving; leave it out, or set halving")
        return self

    @property
    def transfer_task(self) -> str | None:
        return self.for_.removeprefix(TRANSFER) if self.for_.startswith(TRANSFER) else None
