"""One real finished run that the tests of this directory copy and damage."""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

import llmemb_ray
from llmemb_ray.shards.run import Run
from llmemb_ray.storage import Storage


@dataclass(frozen=True)
class Finished:
    corpus: Path
    output: Path

    @property
    def run(self) -> Run:
        """Opened anew, so that nothing of it is remembered."""
        return Run(Storage(str(self.output)))


@pytest.fixture(scope="session")
def finished_once(tmp_path_factory: pytest.TempPathFactory, model: Path) -> Finished:
    """Two files of 24 rows, one null text in each; four units of 12 rows."""
    root = tmp_path_factory.mktemp("finished")
    (root / "corpus").mkdir()
    for file in range(2):
        texts = [None if row == 5 else f"sentence {row} of file {file}" for row in range(24)]
        pq.write_table(pa.table({"id": [f"{file}-{row}" for row in range(24)], "text": texts}), root / "corpus" / f"{file}.parquet", row_group_size=12)
    receipt = llmemb_ray.embed(str(root / "corpus"), str(root / "out"), model=str(model), actors="0", quiet=True, rows_per_unit=12)
    assert (receipt.units, receipt.rows_embedded, receipt.rows_rejected) == (4, 46, 2)
    return Finished(root / "corpus", root / "out")


@pytest.fixture
def finished(finished_once: Finished, tmp_path: Path) -> Finished:
    """A copy of the run, to be damaged; the corpus is the original and must be left as it is."""
    shutil.copytree(finished_once.output, tmp_path / "run")
    return Finished(finished_once.corpus, tmp_path / "run")
