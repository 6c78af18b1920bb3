"""Words with their definitions, out of a dictionary's file: TSV, JSON lines, or WordNet's data files.

Invariant: a line that is not of its format is refused with file and line. An entry that can be no demonstration (several
words, no definition) is passed over and counted.
"""

from __future__ import annotations

import posixpath
import re
from dataclasses import dataclass

from llmemb_ray.demonstrations import words
from llmemb_ray.demonstrations.candidates import Candidate, json_object, numbered_lines, unique
from llmemb_ray.errors import ConfigError, InputError
from llmemb_ray.storage import Access, Storage, absolute, redact

WORDNET = ("data.noun", "data.verb", "data.adj", "data.adv")

_SYNSET = re.compile(r"\d{8} \d\d [nvasr] (?P<words>[0-9a-f]{2}) (?P<rest>.+?) \| ?(?P<gloss>.*)")
"""wndb(5): synset_offset, lex_filenum, ss_type, w_cnt in hexadecimal, then word and lex_id that often, pointers, frames, and the gloss."""

_MARKER = re.compile(r"\((?:a|p|ip)\)$")
"""The place of an adjective, written after it: of a noun (a), in the predicate (p), after a noun (ip)."""

_EXAMPLES = re.compile(r'(?:^|[;:])\s*".*')


@dataclass(frozen=True)
class Dictionary:
    """candidates: definition and word of each entry that can be one, each once; passed_over: entries that cannot."""

    candidates: list[Candidate]
    passed_over: int


def read_dictionary(url: str, access: Access | None = None) -> Dictionary:
    """The entries of a file, or of the WordNet data files in a directory. Raises ConfigError for a kind of file that is not read, InputError."""
    storage = Storage(absolute(url), access)
    if storage.is_directory():
        files = [name for name in WORDNET if storage.exists(name)]
        if not files:
            raise InputError(f"dictionary: {redact(url)} is a directory without WordNet's data files ({', '.join(WORDNET)})")
        read = [read_dictionary(posixpath.join(url, name), access) for name in files]
        return Dictionary(unique(candidate for one in read for candidate in one.candidates), sum(one.passed_over for one in read))
    name = posixpath.basename(url)
    suffix = posixpath.splitext(name)[1].lower()
    if name not in WORDNET and suffix not in (".tsv", ".jsonl", ".ndjson"):
        raise ConfigError(
            f"dictionary: {redact(url)} is of no kind that is read here: .tsv or .jsonl of word and definition, or WordNet's {', '.join(WORDNET)}"
        )
    candidates, passed_over = [], 0
    for number, line in numbered_lines(url, access):
        where = f"{redact(url)} line {number}"
        if name in WORDNET:
            if line.startswith("  "):  # The licence, before the first synset.
                continue
            word, definition = _synset(line, where)
        elif suffix == ".tsv":
            word, definition = _tab_separated(line, where)
            if number == 1 and (word.lower(), definition.lower()) == ("word", "definition"):
                continue
        else:
            word, definition = _record(line, where)
        if words.is_word(word) and definition:
            candidates.append(Candidate(sentence=definition, word=words.capitalized(word), source=name))
        else:
            passed_over += 1
    return Dictionary(unique(candidates), passed_over)


def _tab_separated(line: str, where: str) -> tuple[str, str]:
    parts = line.split("\t")
    if len(parts) != 2 or not all(part.strip() for part in parts):
        raise InputError(f"{where}: {len(parts)} columns, or an empty one; a line is a word, a tab and its definition")
    return parts[0].strip(), " ".join(parts[1].split())


def _record(line: str, where: str) -> tuple[str, str]:
    record = json_object(line, where)
    word, definition = record.get("word"), record.get("definition")
    if not isinstance(word, str) or not isinstance(definition, str):
        raise InputError(f'{where}: word or definition is no text; a line is {{"word": …, "definition": …}}')
    return word.strip(), " ".join(definition.split())


def _synset(line: str, where: str) -> tuple[str, str]:
    """First word and definition of a line of WordNet; its examples, in quotes after the definition, are left out."""
    match = _SYNSET.fullmatch(line.rstrip())
    fields = match["rest"].split(" ") if match else []
    count = int(match["words"], 16) if match else 0
    if match is None or not count or len(fields) <= 2 * count or not re.fullmatch(r"\d{3}", fields[2 * count]):
        raise InputError(f"{where} is no synset of WordNet's data files (wndb(5))")
    definition = " ".join(_EXAMPLES.sub("", match["gloss"].strip()).split()).rstrip("; ")
    return _MARKER.sub("", fields[0]).replace("_", " "), definition
