"""Dictionaries: WordNet's data files, in lines as WordNet 3.0 writes them, and tables of words."""

from __future__ import annotations

from pathlib import Path

import pytest

from llmemb_ray.demonstrations.dictionary import read_dictionary
from llmemb_ray.errors import ConfigError, InputError


def lines(*texts: str) -> str:
    """WordNet ends its lines with two blanks."""
    return "".join(f"{text}  \n" for text in texts)


NOUNS = lines(
    "  1 This software and database is being provided to you, the LICENSEE, by",
    "  2 Princeton University under the following license.  By obtaining, using",
    "00001740 03 n 01 entity 0 003 ~ 00001930 n 0000 ~ 00002137 n 0000 ~ 04424418 n 0000 | "
    "that which is perceived or known or inferred to have its own distinct existence (living or nonliving)",
    "02084071 05 n 03 dog 0 domestic_dog 0 Canis_familiaris 0 003 @ 02083346 n 0000 @ 01317541 n 0000 #m 02083863 n 0000 | "
    "a member of the genus Canis (probably descended from the common wolf) that has been domesticated by man since prehistoric times; "
    'occurs in many breeds; "the dog barked all night"',
    "00433216 04 n 02 contact_sport 0 body_sport 0 001 @ 00523513 n 0000 | a sport that necessarily involves body contact between opposing players",
    "07653394 13 n 0a venison 0 b 0 c 0 d 0 e 0 f 0 g 0 h 0 i 0 j 0 001 @ 07649854 n 0000 | meat from a deer used as food",
)
"""Ten words of a synset are written 0a."""

VERBS = lines(
    "00001740 29 v 04 breathe 0 take_a_breath 0 respire 0 suspire 3 003 * 00005041 v 0000 * 00004227 v 0000 + 03110322 a 0301 02 + 02 00 + 08 00 | "
    'draw air into, and expel out of, the lungs; "I can breathe better when the air is clean"; "The patient is respiring"'
)

ADJECTIVES = lines(
    "00001740 00 a 01 able 0 005 = 05200169 n 0000 = 05616246 n 0000 + 05616246 n 0101 + 05200169 n 0101 ! 00002098 a 0101 | "
    "(usually followed by `to') having the necessary means or skill or know-how or authority to do something; "
    '"able to swim"; "she was able to program her computer"',
    '01230387 00 s 01 galore(ip) 0 001 & 01229020 a 0000 | in great numbers; "daffodils galore"',
    '00002312 00 s 01 acroscopic 0 000 | "an example and nothing else"',
)


def pairs(path: Path) -> list[tuple[str, str]]:
    return [(candidate.word, candidate.sentence) for candidate in read_dictionary(str(path)).candidates]


@pytest.fixture
def wordnet(tmp_path: Path) -> Path:
    for name, text in {"data.noun": NOUNS, "data.verb": VERBS, "data.adj": ADJECTIVES}.items():
        (tmp_path / name).write_text(text)
    (tmp_path / "index.noun").write_text("not read\n")
    return tmp_path


def test_wordnet_gives_first_words_with_definitions_without_examples(wordnet: Path) -> None:
    assert pairs(wordnet / "data.noun") == [
        ("Entity", "that which is perceived or known or inferred to have its own distinct existence (living or nonliving)"),
        (
            "Dog",
            "a member of the genus Canis (probably descended from the common wolf) that has been domesticated by man since prehistoric times; "
            "occurs in many breeds",
        ),
        ("Venison", "meat from a deer used as food"),
    ]
    assert pairs(wordnet / "data.verb") == [("Breathe", "draw air into, and expel out of, the lungs")]
    assert pairs(wordnet / "data.adj") == [
        ("Able", "(usually followed by `to') having the necessary means or skill or know-how or authority to do something"),
        ("Galore", "in great numbers"),
    ]


def test_wordnet_s_directory_is_all_its_files(wordnet: Path) -> None:
    read = read_dictionary(str(wordnet))
    assert [candidate.word for candidate in read.candidates] == ["Entity", "Dog", "Venison", "Breathe", "Able", "Galore"]
    assert {candidate.source for candidate in read.candidates} == {"data.noun", "data.verb", "data.adj"}
    assert read.passed_over == 2  # contact sport, acroscopic
    (wordnet / "none").mkdir()
    with pytest.raises(InputError, match=r"without WordNet's data files"):
        read_dictionary(str(wordnet / "none"))


@pytest.mark.parametrize(
    "line",
    [
        "00001740 03 n 01 entity 0 003",
        "00001740 03 n 02 entity 0 000 | one word less than it says",
        "00001740 03 x 01 entity 0 000 | no part of speech",
        "hello | world",
    ],
)
def test_a_line_that_is_no_synset_is_named(wordnet: Path, line: str) -> None:
    (wordnet / "data.adv").write_text(f"  1 licence  \n{line}\n")
    with pytest.raises(InputError, match=r"data\.adv line 2 is no synset"):
        read_dictionary(str(wordnet / "data.adv"))


def test_tables_of_words(tmp_path: Path) -> None:
    (tmp_path / "words.tsv").write_text("word\tdefinition\nswiss\trelating to  Switzerland.\nice cream\ta frozen food\nswiss\trelating to Switzerland.\n")
    assert pairs(tmp_path / "words.tsv") == [("Swiss", "relating to Switzerland.")]
    (tmp_path / "words.jsonl").write_text('{"word": "venison", "definition": "meat from a deer.", "more": 1}\n')
    assert pairs(tmp_path / "words.jsonl") == [("Venison", "meat from a deer.")]


@pytest.mark.parametrize(
    ("name", "text", "said"),
    [
        ("w.tsv", "swiss\tof Switzerland\nvenison\n", "line 2: 1 columns"),
        ("w.tsv", "swiss\t \n", "line 1: 2 columns, or an empty one"),
        ("w.jsonl", '{"word": "venison"}\n', "line 1: word or definition is no text"),
        ("w.jsonl", "[]\n", "line 1 is no JSON object"),
    ],
)
def test_a_malformed_line_is_named(tmp_path: Path, name: str, text: str, said: str) -> None:
    (tmp_path / name).write_text(text)
    with pytest.raises(InputError, match=said):
        read_dictionary(str(tmp_path / name))


def test_another_kind_of_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"\.tsv or \.jsonl"):
        read_dictionary(str(tmp_path / "dictionary.xml"))
