"""Settings of the mining of hard negatives."""

from __future__ import annotations

from typing import Literal, Self

from pydantic import model_validator

from llmemb_ray.config.base import ClusterSettings, setting


class MineSettings(ClusterSettings):
    """Queries with their positives, a corpus, and which of its rows are hard negatives."""

    queries: list[str] = setting(
        ..., "Queries with their positives: .parquet, .jsonl, .csv or .tsv, or a directory or glob of Parquet; repeatable.", panel="Queries"
    )
    query_column: str | None = setting(None, "Column of the query; default: query, anchor, text or sent0, the first that is there.", panel="Queries")
    positive_column: str | None = setting(None, "Column of the positive: a text, or a list of texts; default: positive, pos or sent1.", panel="Queries")
    positive_id_column: str | None = setting(
        None, "Column of the positive's id in the corpus, or a list of ids; default: positive_id, else positive_ids.", panel="Queries"
    )
    query_id_column: str | None = setting(None, "Column of the query's id; default: query_id, id or _id where there is one.", panel="Queries")
    qrels: str | None = setting(
        None, "BEIR's judgements (TSV: query-id, corpus-id, score) in place of a column of positives; what scores above 0 is a positive.", panel="Queries"
    )
    block_queries: int = setting(10_000, "Queries searched for at once; for each block the corpus' vectors are read once.", panel="Queries", ge=1, le=1_000_000)

    corpus: list[str] = setting([], "Parquet file, directory or glob that negatives are taken from; repeatable.", panel="Corpus")
    text_column: str = setting("text", "Column of the text (a.b for a nested one), or a template such as '{title} {text}'.", panel="Corpus")
    id_column: str | None = setting(None, "Column of the id; default: 'id' where there is one.", panel="Corpus")
    corpus_run: str | None = setting(
        None, "Finished run of the corpus in the same space, in place of --corpus: nothing of it is embedded again.", panel="Corpus"
    )

    top_k: int = setting(100, "Rows found for each query, best first (paper 2: 100); positives may be among them.", panel="Negatives", ge=1)
    negatives: int = setting(1, "Hard negatives of a triple.", panel="Negatives", ge=1)
    rank_from: int = setting(1, "First rank that is taken, counted without positives.", panel="Negatives", ge=1)
    rank_to: int | None = setting(None, "Last rank that is taken; default: all that were found.", panel="Negatives", ge=1)
    min_score: float | None = setting(None, "Take no row that scores below this.", panel="Negatives")
    max_score: float | None = setting(None, "Take no row that scores above this.", panel="Negatives")
    margin: float | None = setting(None, "Take only rows that score at least so much below the positive.", panel="Negatives", ge=0)
    relative_margin: float | None = setting(None, "Take only rows that score at most (1 - X) times the positive's score.", panel="Negatives", ge=0, le=1)
    sample: Literal["top", "random"] = setting("top", "Which of the rows left: the best, or some drawn by seed and row.", panel="Negatives")
    seed: int = setting(0, "Seed of the draw; a row's negatives do not depend on other rows.", panel="Negatives", ge=0)
    keep_short: bool = setting(False, "Keep triples with fewer negatives than asked for, even none; else they are left out and counted.", panel="Negatives")
    symmetric: bool = setting(False, "prompt e5: give the instruction to the corpus too, as paper 2 does for symmetric tasks.", panel="Representation")

    out: str = setting(..., "Directory or URL prefix of the triples, the vectors and the record.", panel="Output")
    overwrite: bool = setting(False, "Replace triples that were mined in OUT with other settings; vectors stay.", panel="Output")

    @model_validator(mode="after")
    def _check(self) -> Self:
        if not self.queries:
            raise ValueError("queries: no file given")
        if bool(self.corpus) == bool(self.corpus_run):
            raise ValueError("corpus: give either the files with --corpus or a finished run of them with --corpus-run")
        if self.corpus_run and self.model_fields_set & {"text_column", "id_column"}:
            raise ValueError("text_column and id_column: a run has its own; leave them out with corpus_run")
        if "role" in self.model_fields_set:
            raise ValueError("role: queries are embedded as queries and the corpus as documents; leave it out (symmetric treats both alike)")
        if self.symmetric and self.instruction is None:
            raise ValueError("symmetric: does nothing without an instruction; give --prompt e5 --instruction TEXT")
        if sum(name is not None for name in (self.positive_column, self.positive_id_column, self.qrels)) > 1:
            raise ValueError("positive_column, positive_id_column and qrels exclude each other; name the one that says what a query's positives are")
        if self.rank_from > (self.rank_to or self.top_k):
            raise ValueError(f"rank_from: {self.rank_from} lies behind the last rank, {self.rank_to or self.top_k}")
        if self.rank_to is not None and self.rank_to > self.top_k:
            raise ValueError(f"rank_to: {self.rank_to} is more than the {self.top_k} rows that are found for a query; raise top_k")
        if self.min_score is not None and self.max_score is not None and self.min_score > self.max_score:
            raise ValueError(f"min_score: {self.min_score} is above max_score={self.max_score}")
        if (self.rank_to or self.top_k) - self.rank_from + 1 < self.negatives:
            raise ValueError(
                f"negatives: {self.negatives} do not fit among ranks {self.rank_from} to {self.rank_to or self.top_k}; raise top_k, or widen the ranks"
            )
        return self
