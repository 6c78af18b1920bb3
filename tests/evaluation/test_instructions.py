"""The table against the list of paper 2's code, and which texts of a task get its instruction."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from llmemb_ray.evaluation.instructions import find, instruction, symmetric

TYPES = {"STS", "Summarization", "BitextMining"}
A_TASK_OF = {"CQADupstack*": "CQADupstackAndroidRetrieval", "miracl": "MIRACLRetrieval"}


def test_the_table_says_what_the_papers_list_says(data: Path) -> None:
    listed = json.loads((data / "e5_instructions.json").read_text())
    found = {name: instruction("no such task", name) if name in TYPES else instruction(A_TASK_OF.get(name, name)) for name in listed}
    assert found == listed


@pytest.mark.parametrize(
    ("name", "task_type", "same_as"),
    [
        ("FEVERHardNegatives", "Retrieval", "FEVER"),
        ("Touche2020Retrieval.v3", "Retrieval", "Touche2020"),
        ("CMedQAv1-reranking", "Reranking", "CMedQAv1"),
        ("TwentyNewsgroupsClustering.v2", "Clustering", "TwentyNewsgroupsClustering"),
        ("NQ-PLHardNegatives", "Retrieval", "NQ"),
        ("scifact", None, "SciFact"),
    ],
)
def test_a_variant_of_a_task_has_its_instruction(name: str, task_type: str | None, same_as: str) -> None:
    assert instruction(name, task_type) == instruction(same_as) is not None


def test_a_task_that_the_paper_does_not_name_has_that_of_its_type_or_none() -> None:
    assert instruction("SICK-R", "STS") == "Retrieve semantically similar text."
    assert instruction("SICK-R") is None
    assert instruction("NQTablesRetrieval", "Retrieval") is None
    assert instruction("SciFactory", "Classification") is None


def test_retrieval_instructs_queries_alone() -> None:
    assert [symmetric(kind) for kind in ("STS", "Classification", "Clustering", "PairClassification", "Reranking", "Summarization", "BitextMining")] == [
        True
    ] * 7
    assert not symmetric("Retrieval")
    assert not symmetric("InstructionRetrieval")
    rank, retrieve = find("SciDocsRR"), find("SCIDOCS")
    assert rank is not None
    assert retrieve is not None
    assert rank.symmetric
    assert not retrieve.symmetric
