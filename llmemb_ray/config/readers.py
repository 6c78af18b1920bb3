"""Settings of the commands that read a run."""

from __future__ import annotations

from typing import Literal, Self

from pydantic import model_validator

from llmemb_ray.config.base import StorageSettings, setting


class SearchSettings(StorageSettings):
    """Exact search over the shards of a run."""

    run: str = setting(..., "Directory or URL prefix of a run.", panel="Search", argument=True)
    text: list[str] = setting([], "Query texts.", panel="Search", argument=True)
    top_k: int = setting(5, "Results for each query.", panel="Search", ge=1)
    model: str | None = setting(None, "Where the run's model is now, if not where it was; it must be the same.", panel="Search")
    trust_remote_code: bool = setting(False, "Run the Python code that the model's repository brings; the run's own setting does not count.", panel="Search")
    allow_pickle: bool = setting(False, "Load pickled weights (.bin), which can run code, where there are no safetensors.", panel="Search")
    no_text: bool = setting(False, "Show no texts of the rows found; they are read back from the corpus.", panel="Search")
    queries: str | None = setting(None, "File of queries in place of TEXT: .parquet, .jsonl, .csv, .tsv, or .txt with one a line.", panel="Queries")
    query_column: str | None = setting(None, "Column of the queries; default: query, else text.", panel="Queries")
    query_id_column: str | None = setting(None, "Column of the queries' ids; default: query_id, id or _id where there is one.", panel="Queries")
    out: str | None = setting(None, "Write the results to this Parquet file, one row a result.", panel="Queries")
    overwrite: bool = setting(False, "Replace the file that out names.", panel="Queries")
    on_cluster: bool = setting(False, "Spread the shards over a Ray cluster.", panel="Cluster")
    ray_address: str | None = setting(
        None, "Ray cluster to search on; with on_cluster alone: RAY_ADDRESS, else a Ray of its own on this machine.", panel="Cluster"
    )

    @model_validator(mode="after")
    def _check(self) -> Self:
        if not self.text and self.queries is None:
            raise ValueError("TEXT must be given, or a file of queries: the arguments are RUN TEXT..., or RUN and the option queries")
        if self.text and self.queries is not None:
            raise ValueError("TEXT and queries exclude each other; write all queries into the file")
        if self.queries is None and (self.query_column or self.query_id_column):
            raise ValueError("query_column and query_id_column do nothing without queries; give the file")
        if self.overwrite and self.out is None:
            raise ValueError("overwrite: does nothing without out")
        return self


class ExportSettings(StorageSettings):
    """The vectors of a run in the form of another program."""

    run: str = setting(..., "Directory or URL prefix of a run.", panel="Export", argument=True)
    dest: str = setting(..., "Local directory to write; it must be empty or not exist.", panel="Export", argument=True)
    to: Literal["npy", "faiss", "lance", "hf"] = setting(..., "Form: NumPy file, faiss index, Lance dataset, Hugging Face dataset.", panel="Export")
    dtype: Literal["float32", "float16"] | None = setting(None, "Precision of the vectors exported; default float32.", panel="Export")
    raw: bool = setting(False, "Export values as they are stored: codes and bits are not turned back into vectors.", panel="Export")
    faiss_factory: str | None = setting(
        None, "Index of faiss.index_factory, such as IVF1024,SQ8, trained on a sample; default: the exact Flat.", panel="Export"
    )
    overwrite: bool = setting(False, "Replace an earlier export that stands in DEST.", panel="Export")
    allow_unfinished: bool = setting(False, "Export what is committed of a run that is not finished.", panel="Export")

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.raw and self.dtype is not None:
            raise ValueError("raw and dtype exclude each other: raw values keep the dtype of the run")
        if self.faiss_factory is not None and self.to != "faiss":
            raise ValueError(f"faiss_factory: is for faiss; with {self.to} it does nothing")
        return self


class ReportSettings(StorageSettings):
    """One page about a run."""

    run: str = setting(..., "Directory or URL prefix of a run.", panel="Report", argument=True)
    out: str = setting("report.html", "Page to write, local or URL; one that is there is replaced.", panel="Report")
    no_text: bool = setting(False, "Leave out all texts of the corpus; they are else read back from it.", panel="Report")
    sample: int = setting(
        2000,
        "Vectors that health and map are made from, spread evenly over the run; of a synthesis: examples of each family, 3 if not given.",
        panel="Report",
        ge=1,
        le=10_000,
    )


class VerifySettings(StorageSettings):
    """The check of a run from its files alone."""

    run: str = setting(..., "Directory or URL prefix of a run.", panel="Check", argument=True)
    level: Literal["quick", "sample", "full"] = setting(
        "full", "quick: names, sizes and counts; sample: also the contents of some units; full: all contents.", panel="Check", flags=True
    )
    against: list[str] = setting([], "Compare with the corpus itself: its files, rows and ids.", panel="Check")
    allow_duplicate_ids: bool = setting(False, "Report ids that stand in several rows without failing.", panel="Check")
