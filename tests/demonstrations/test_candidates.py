"""Files of candidates: the project's own, and paper 1's prompts."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from llmemb_ray.demonstrations.candidates import Candidate, read_candidates, write_candidates
from llmemb_ray.errors import InputError
from llmemb_ray.representation.templates import prompteol

PROMPT = 'This_sentence_:_"A_man._\'Really\'."_means_in_one_word:"Man".This_sentence_:_"*sent_0*"_means_in_one_word:"'


def test_the_paper_s_prompts_and_their_json_lines_hold_the_same_candidates(data: Path) -> None:
    prompts = read_candidates(str(data / "icl_demos" / "icl_examples.txt"))
    records = [json.loads(line) for line in (data / "icl_demos" / "demos.jsonl").read_text().splitlines()]
    assert len(prompts) == 300
    assert [(candidate.sentence, candidate.word) for candidate in prompts] == [(record["sentence"], record["word"]) for record in records]
    assert [vars(candidate) for candidate in read_candidates(str(data / "icl_demos" / "demos.jsonl"))] == records


def test_a_prompt_gives_back_the_template_it_was_made_of(tmp_path: Path) -> None:
    (tmp_path / "prompts.txt").write_text(PROMPT + "\n\n")
    [candidate] = read_candidates(str(tmp_path / "prompts.txt"))
    assert prompteol((candidate.demonstration,)) == PROMPT.replace("_", " ").replace("*sent 0*", "{text}")
    assert candidate.source == "prompts.txt"


def test_what_is_written_is_read_and_pairs_stand_once(tmp_path: Path) -> None:
    first = Candidate(sentence='Naïve "quotes"\u2028and {braces}', word="Naïveté", source="here")
    other = Candidate(sentence=first.sentence, word="Quotes", source="here")
    write_candidates(str(tmp_path / "made.jsonl"), [first, other, Candidate(sentence=first.sentence, word=first.word, source="there")])
    assert read_candidates(str(tmp_path / "made.jsonl")) == [first, other]


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("This sentence is no prompt", "line 2 is neither JSON nor a prompt"),
        (PROMPT.replace("This_sentence_:_", PROMPT.split('"*sent')[0] + '"', 1), "line 2 holds several demonstrations"),
        ('{"sentence": "A man."', "line 2 is not JSON"),
        ('{"sentence": "A man.", "word": ""}', "line 2: word is no text"),
        ('{"sentence": 3, "word": "Man"}', "line 2: sentence is no text"),
    ],
)
def test_a_bad_line_is_named(tmp_path: Path, line: str, said: str) -> None:
    (tmp_path / "bad.jsonl").write_text(f'{{"sentence": "x", "word": "X"}}\n{line}\n')
    with pytest.raises(InputError, match=said):
        read_candidates(str(tmp_path / "bad.jsonl"))


def test_a_file_that_is_missing_empty_or_of_another_encoding_is_named(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"none\.jsonl; check the path"):
        read_candidates(str(tmp_path / "none.jsonl"))
    (tmp_path / "empty.jsonl").write_text("\n")
    with pytest.raises(InputError, match="holds no candidate"):
        read_candidates(str(tmp_path / "empty.jsonl"))
    (tmp_path / "latin.jsonl").write_bytes(b"\n\xe9")
    with pytest.raises(InputError, match="line 2 is not UTF-8"):
        read_candidates(str(tmp_path / "latin.jsonl"))
