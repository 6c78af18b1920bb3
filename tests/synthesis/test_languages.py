"""The languages of paper 2, and whether real sentences are told to be of theirs."""

from __future__ import annotations

import random
from pathlib import Path

import pytest

from llmemb_ray.synthesis.languages import KIN, LANGUAGES, SHARES, count_words, plausible

_PAIRS = (
    "afr:af amh:am ara:ar aze:az bel:be ben:bn bos:bs bre:br bul:bg cat:ca ces:cs cmn:zh cym:cy dan:da deu:de ell:el epo:eo est:et eus:eu fin:fi fra:fr"
    " fry:fy gla:gd gle:ga glg:gl heb:he hin:hi hrv:hr hun:hu hye:hy ind:id isl:is ita:it jav:jv jpn:ja kat:ka kaz:kk khm:km kor:ko kur:ku lat:la lit:lt"
    " lvs:lv mal:ml mar:mr mkd:mk mon:mn nld:nl nob:no pes:fa pol:pl por:pt ron:ro rus:ru slk:sk slv:sl spa:es sqi:sq srp:sr swe:sv swh:sw tam:ta tel:te"
    " tgl:tl tha:th tur:tr uig:ug ukr:uk urd:ur uzb:uz vie:vi xho:xh yid:yi zsm:ms"
)
TATOEBA = dict(pair.split(":") for pair in _PAIRS.split())
"""Codes of Tatoeba and ours."""


def test_languages_and_shares() -> None:
    assert len(LANGUAGES) == len({language.name for language in LANGUAGES.values()}) == 93
    assert set(SHARES) == set(LANGUAGES)
    assert sum(SHARES.values()) == pytest.approx(100)
    assert (SHARES["en"], SHARES["pl"], SHARES["ar"]) == (43.1, 3.0, 2.7)
    assert {SHARES[code] for code in ("ja", "it", "ru", "id", "de", "fa")} == {2.9}
    assert {SHARES[code] for code in ("es", "zh", "fr", "pt", "nl")} == {2.8}
    assert sorted(SHARES.values())[78] == pytest.approx(19.8 / 79)  # The 79 without a share of their own have 19.8 per cent together.


@pytest.mark.parametrize(
    ("text", "code"),
    [
        ("ok", "zh"),
        ("2 + 2 = 4", "ar"),
        ("我叫Jack。", "zh"),
        ("iPhone 15 の電池を交換する方法", "ja"),
        ("Фильм «The Grand Budapest Hotel» вышел на экраны в две тысячи четырнадцатом году", "ru"),
        ("Где купить книгу Harry Potter and the Stone в этом городе", "ru"),
        ("Kako se zoveš i odakle dolaziš, ako smijem pitati?", "sr"),
        ("Jeg gikk meg vill, og for å gjøre det enda verre så begynte det å regne.", "da"),
        ("Aku harap aku bisa berbahasa Inggris.", "ms"),
        ("mindfulness coach", "pl"),
        ('<div class="a"><span>x</span></div><br/><table><tr><td></td></tr></table>', "fi"),
        ("The Greek word λόγος has many meanings, among them reason and speech.", "en"),
        ("क्या आप मुझे बता सकते हैं", "hi"),
    ],
)
def test_a_text_in_its_language_is_plausible(text: str, code: str) -> None:
    assert plausible(text, code)


@pytest.mark.parametrize(
    ("text", "code"),
    [
        ("hello there", "zh"),
        ("これはペンです", "zh"),
        ("Привет", "en"),
        ("What is the best way to learn how to play the guitar?", "de"),
        ("What is the best way to learn how to play the guitar?", "sr"),
        ("What is the best way to learn how to play the guitar?", "su"),
        ("Was ist die beste Art, Gitarre spielen zu lernen?", "fr"),
        ("Was ist die beste Art, Gitarre spielen zu lernen?", "sr"),
        ("Какой самый лучший способ научиться играть на гитаре?", "bg"),
        ("今天的天气很好，我们一起去公园散步，然后在附近的餐厅吃晚饭吧。", "ja"),
        ("می‌خواهم بدانم که چگونه می‌توانم گیتار بزنم و آواز بخوانم", "ar"),
    ],
)
def test_a_text_in_another_language_is_not(text: str, code: str) -> None:
    assert not plausible(text, code)


def test_words_are_counted_by_characters_where_no_blanks_are_written() -> None:
    assert count_words("  one two\n three ", "en") == 3
    assert count_words("我们 今天都去公园", "zh") == 5.0  # 8 characters, 1.6 a word.
    assert count_words("我们 今天都去公园", "ko") == 2


def test_real_sentences(data: Path) -> None:
    directory = data / "tatoeba"
    if not directory.is_dir():
        pytest.skip(f"no Tatoeba sentences at {directory}; set LLMEMB_DATA")
    sentences = {ours: (directory / f"tatoeba.{theirs}-eng.{theirs}").read_text(encoding="utf-8").splitlines() for theirs, ours in TATOEBA.items()}
    sentences["en"] = (directory / "tatoeba.deu-eng.eng").read_text(encoding="utf-8").splitlines()
    for code, lines in sentences.items():
        some = lines[::4]
        assert sum(not plausible(line, code) for line in some) <= 0.01 * len(some), code

    rng = random.Random(1)
    caught, asked, short = 0, 0, 0
    for code, lines in sentences.items():
        strangers = [other for other in LANGUAGES if other != code and not any({code, other} <= group for group in KIN)]
        for line in [line for line in lines if sum(map(str.isalpha, line)) >= 20][:40]:
            asked += 1
            caught += not plausible(line, rng.choice(strangers))
        short += sum(not plausible(line, rng.choice(strangers)) for line in lines if sum(map(str.isalpha, line)) < 4)
    assert asked > 2500
    assert caught / asked > 0.9
    assert short == 0
