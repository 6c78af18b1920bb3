"""Free English texts for the embedded model, as sentences of 3 to 40 words, origin by origin.

Invariant: a text comes from one named origin with one stated licence, and two runs over the same files give the same texts in the same order.
Evaluation sentences are taken out elsewhere, after everything is put together.
"""

from __future__ import annotations

import csv
import gzip
import html
import re
import subprocess
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from llmemb_ray.demo import compiled_docstrings, docstrings

WORDS = 3, 40
"""Fewest and most words of a text."""

LETTERS = 0.85
"""Least share of letters and blanks: code, tables and paths are left out."""

_END = re.compile(r"(?<=[.!?])[\"')]*\s+(?=[\"'(]*[A-Z])")
_TAG = re.compile(r"<[^>]+>")
_ENTRY = re.compile(r"^(?:\d+\.|\([a-z]\))\s*")


@dataclass(frozen=True, kw_only=True)
class Origin:
    """Where texts come from. package: Debian package that holds them, None for what the project has itself; most: texts taken, evenly spaced."""

    name: str
    licence: str
    read: Callable[[Path], Iterator[str]]
    package: str | None = None
    most: int | None = None


def sentences(text: str) -> Iterator[str]:
    """The sentences of running text that read as English: 3 to 40 words, nearly all letters."""
    for sentence in _END.split(" ".join(text.split())):
        sentence = sentence.strip(" -*")
        if WORDS[0] <= len(sentence.split()) <= WORDS[1] and sum(c.isalpha() or c == " " for c in sentence) >= LETTERS * len(sentence) and sentence.isascii():
            yield sentence


def _paragraphs(text: str) -> Iterator[str]:
    for paragraph in re.split(r"\n\s*\n", text):
        yield from sentences(paragraph)


def python_docstrings(root: Path) -> Iterator[str]:
    """root: the standard library's directory."""
    for _, text in sorted((dict(compiled_docstrings()) | dict(docstrings(root))).items()):
        yield from _paragraphs(text)


def snli(root: Path) -> Iterator[str]:
    """root: directory with triples as CSV; all three columns."""
    for path in sorted(root.glob("*.csv")):
        with path.open(encoding="utf-8", newline="") as file:
            rows = csv.reader(file)
            next(rows)
            for row in rows:
                yield from (" ".join(text.split()) for text in row)


def _synsets(root: Path) -> Iterator[tuple[str, list[str], str]]:
    """(part of speech, lemmas, gloss)"""
    for kind in ("noun", "verb", "adj", "adv"):
        for line in (root / f"usr/share/wordnet/data.{kind}").read_text(encoding="latin-1").splitlines():
            if line[:1].isdigit():
                data, _, gloss = line.partition(" | ")
                fields = data.split()
                yield kind, [re.sub(r"\(\w+\)$", "", word).replace("_", " ") for word in fields[4 : 4 + 2 * int(fields[3], 16) : 2]], gloss.strip()


def wordnet(root: Path) -> Iterator[str]:
    """Definitions, examples, and words with their definitions: 'horse: solid-hoofed herbivorous quadruped'."""
    for _, lemmas, gloss in _synsets(root):
        definition = gloss.split('; "')[0].strip(" ;")
        yield definition
        yield from re.findall(r'"([^"]+)"', gloss)
        yield f"{lemmas[0]}: {definition}"


def wordnet_names(root: Path) -> dict[str, list[str]]:
    """Names for news lines, told by their definitions: countries, cities, people (surnames), and common nouns of persons and events."""
    found: dict[str, list[str]] = {"country": [], "city": [], "person": [], "role": [], "event": []}
    for kind, lemmas, gloss in _synsets(root):
        word = lemmas[0]
        if kind != "noun" or not word.isascii():
            continue
        proper = word[0].isupper()
        if proper and len(word.split()) <= 2 and re.match(r"an? (\w+ )*(republic|kingdom|country|monarchy|nation)\b", gloss):
            found["country"].append(word)
        elif proper and len(word.split()) <= 2 and re.match(r"(an?|the) ((\w+ )*city|capital|port)\b", gloss):
            found["city"].append(word)
        elif proper and re.search(r"\(\d{4}-\d{0,4}\)|\(born in \d{4}\)", gloss):
            found["person"].append(lemmas[-1] if len(lemmas[-1].split()) == 1 else word)
        elif not proper and word.isalpha() and re.match(r"(a person|someone|an official|an? \w+ who|a member|a worker|a leader|a politician)\b", gloss):
            found["role"].append(word)
        elif not proper and word.isalpha() and re.match(r"(an? )?(the act of|an event|a violent|an accident|a meeting|a contest|a crime|the crime)\b", gloss):
            found["event"].append(word)
    return {name: sorted(set(words)) for name, words in found.items()}


def _dictd(root: Path) -> str:
    (path,) = sorted(root.glob("usr/share/dictd/*.dict.dz"))
    return gzip.decompress(path.read_bytes()).decode("utf-8", errors="replace")


def gcide(root: Path) -> Iterator[str]:
    """Definitions of the Collaborative International Dictionary; marks of sources, cross references and numbers left out."""
    for paragraph in re.split(r"\n\s*\n", _dictd(root)):
        paragraph = re.sub(r"\[[^\]]*\]", " ", paragraph)
        head, *rest = paragraph.strip().split("\n")
        if "\\" in head:
            paragraph = " ".join(rest)
        paragraph = re.sub(r"--\s*[A-Z][\w. ]*$|[{}]", " ", " ".join(paragraph.split()))
        yield from sentences(_ENTRY.sub("", paragraph.strip()))


def dictionary(root: Path) -> Iterator[str]:
    """FOLDOC, the Jargon File, the Devil's Dictionary."""
    yield from _paragraphs(re.sub(r"<[^>]*>|\[[^\]]*\]", " ", _dictd(root).replace("{", "").replace("}", "")))


def pages(pattern: str) -> Callable[[Path], Iterator[str]]:
    """Paragraphs, items and headings of HTML or Mallard files (also gzipped)."""

    def read(root: Path) -> Iterator[str]:
        for path in sorted(root.glob(pattern)):
            raw = path.read_bytes()
            text = (gzip.decompress(raw) if path.suffix == ".gz" else raw).decode("utf-8", errors="replace")
            text = re.sub(r"(?s)<(script|style|pre|code|screen|head|info)\b.*?</\1>", " ", text)
            for block in re.split(r"(?i)</?(?:p|li|h\d|dd|dt|td|tr|div|title|item|section|ul|table)\b[^>]*>", text):
                yield from sentences(html.unescape(_TAG.sub("", block)))

    return read


def pod(root: Path) -> Iterator[str]:
    """Perl's documentation, the questions of its FAQ among it."""
    for path in sorted(root.rglob("*.pod")):
        text = re.sub(r"[A-Z]<+\s*([^<>]*?)\s*>+", r"\1", path.read_text(encoding="utf-8", errors="replace"))
        for paragraph in re.split(r"\n\s*\n", text):
            if not paragraph.startswith((" ", "\t")):
                yield from sentences(re.sub(r"^=\w+ ?", "", paragraph))


def quoted(pattern: str, quote: str) -> Callable[[Path], Iterator[str]]:
    """Texts in quotation marks of game data."""

    def read(root: Path) -> Iterator[str]:
        for path in sorted(root.glob(pattern)):
            for text in re.findall(quote, path.read_text(encoding="utf-8", errors="replace")):
                yield from sentences(re.sub(r"<[^>]*>", "they", text).replace('""', '"').strip('" \t'))

    return read


def descriptions(_: Path) -> Iterator[str]:
    """Short descriptions of the packages that apt knows, without what stands in parentheses."""
    listed = subprocess.run(["apt-cache", "dumpavail"], capture_output=True, check=True, text=True).stdout  # noqa: S607
    for line in sorted(set(re.findall(r"(?m)^Description(?:-en)?: (.+)$", listed))):
        yield from sentences(re.sub(r"\s*[(\[].*?[)\]]|\s+[-–—]+ .*", "", line))


ORIGINS = (
    Origin(name="snli", licence="CC BY-SA 4.0", read=snli),
    Origin(name="python-docstrings", licence="PSF-2.0", read=python_docstrings),
    Origin(name="python-manual", licence="PSF-2.0", read=pages("usr/share/doc/python3.11/html/**/*.html"), package="python3.11-doc", most=20_000),
    Origin(name="wordnet", licence="WordNet 3.0 licence", read=wordnet, package="wordnet-base", most=80_000),
    Origin(name="gcide", licence="GPL-2.0-or-later", read=gcide, package="dict-gcide", most=10_000),
    Origin(name="foldoc", licence="GFDL-1.1-or-later", read=dictionary, package="dict-foldoc", most=10_000),
    Origin(name="jargon", licence="public domain", read=dictionary, package="dict-jargon"),
    Origin(name="devil", licence="public domain", read=dictionary, package="dict-devil"),
    Origin(name="gnome", licence="CC BY-SA 3.0", read=pages("usr/share/help/C/**/*.page"), package="gnome-user-docs"),
    Origin(name="libreoffice", licence="MPL-2.0", read=pages("usr/share/libreoffice/help/en-US/text/**/*.html"), package="libreoffice-help-en-us", most=6_000),
    Origin(name="perl", licence="Artistic or GPL-1.0-or-later", read=pod, package="perl-doc", most=8_000),
    Origin(name="anarchism", licence="GPL-2.0", read=pages("usr/share/doc/anarchism/html/*.html*"), package="anarchism", most=18_000),
    Origin(name="endless-sky", licence="GPL-3.0-or-later", read=quoted("usr/share/games/**/*.txt", r"`([^`\n]{20,})`"), package="endless-sky-data"),
    Origin(name="wesnoth", licence="GPL-2.0-or-later", read=quoted("**/*.cfg", r'= *_ *"([^"]{20,})"'), package="wesnoth-1.16-data"),
    Origin(name="debian-descriptions", licence="that of each package (all free: Debian main)", read=descriptions, most=15_000),
)


def read(origin: Origin, root: Path) -> list[str]:
    """An origin's distinct texts; evenly spaced ones where it has more than it gives."""
    found = list(dict.fromkeys(text for text in origin.read(root) if WORDS[0] <= len(text.split()) <= WORDS[1]))
    if origin.most is not None and len(found) > origin.most:
        found = [found[index * len(found) // origin.most] for index in range(origin.most)]
    return found
