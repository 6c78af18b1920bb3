"""Templates are those of the papers' code, byte for byte, and nothing in a text or demonstration can change them."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from llmemb_ray.errors import ConfigError
from llmemb_ray.representation import Demonstration, preset, templates


def from_command_line(raw: str) -> str:
    """A template as paper 1's scripts pass it: ``_`` is a space and ``*sent_0*`` the slot."""
    return raw.replace("*sent_0*", "\0").replace("_", " ").replace("\0", "{text}")


def test_prompteol_is_the_string_of_the_paper_s_scripts() -> None:
    assert templates.prompteol() == from_command_line('This_sentence_:_"*sent_0*"_means_in_one_word:"')


def test_one_demonstration() -> None:
    demo = Demonstration("A jockey riding a horse.", "Equestrian")
    raw = 'This_sentence_:_"A jockey riding a horse."_means_in_one_word:"Equestrian".This_sentence_:_"*sent_0*"_means_in_one_word:"'
    assert templates.prompteol((demo,)) == from_command_line(raw)


def test_several_demonstrations_follow_without_a_blank() -> None:
    demos = (Demonstration("meat from a deer.", "Venison"), Demonstration("A man is smoking.", "Smoking"))
    assert templates.prompteol(demos) == (
        'This sentence : "meat from a deer." means in one word:"Venison".'
        'This sentence : "A man is smoking." means in one word:"Smoking".'
        'This sentence : "{text}" means in one word:"'
    )


def test_e5_query_is_equation_1_of_paper_2() -> None:
    assert templates.e5_query("Retrieve semantically similar text.") == "Instruct: Retrieve semantically similar text.\nQuery: {text}"


def test_e5_without_an_instruction_is_the_bare_text() -> None:
    assert templates.split(templates.e5_query("")) == ("", "")


@given(st.text(min_size=1), st.text(min_size=1))
def test_braces_in_demonstrations_and_instructions_stay_as_they_are(sentence: str, word: str) -> None:
    before, after = templates.split(templates.prompteol((Demonstration(sentence, word),)))
    assert before == f'This sentence : "{sentence}" means in one word:"{word}".This sentence : "'
    assert after == '" means in one word:"'
    assert templates.split(templates.e5_query(sentence)) == (f"Instruct: {sentence}\nQuery: ", "")


def test_doubled_braces_are_literal() -> None:
    assert templates.split('{{"a": "{text}"}}') == ('{"a": "', '"}')


@pytest.mark.parametrize(
    ("template", "complaint"),
    [
        ("no slot", "stands there 0 times"),
        ("{text} and {text}", "stands there 2 times"),
        ("{title}: {text}", "{title}"),
        ("{text!r}", "text"),
        ("{text:>10}", "text"),
        ("{text", "{{ and }}"),
        ("}{text}", "{{ and }}"),
        ("{} {text}", "{}"),
    ],
)
def test_a_bad_template_is_refused(template: str, complaint: str) -> None:
    with pytest.raises(ConfigError) as error:
        templates.split(template)
    assert complaint in str(error.value)


@pytest.mark.parametrize("text", ["no arrow", "=>Word", "sentence=>", "  =>  ", ""])
def test_a_bad_demonstration_is_refused(text: str) -> None:
    with pytest.raises(ConfigError, match="sentence=>Word"):
        Demonstration.parse(text)


def test_a_demonstration_is_split_at_its_last_arrow() -> None:
    assert Demonstration.parse(" x => y means x=>y. => Implication ") == Demonstration("x => y means x=>y.", "Implication")


def test_presets() -> None:
    assert preset("prompteol")[0].template == templates.prompteol()
    document, query, append_eos = preset("e5", instruction="Find it.", role="query")
    assert (document.template, query.template, append_eos) == ("{text}", "Instruct: Find it.\nQuery: {text}", True)
    document, query, _ = preset("e5", instruction="Find it.", role="document")
    assert document.template == query.template == "Instruct: Find it.\nQuery: {text}"
    assert preset('A "{text}" of mine')[0].template == 'A "{text}" of mine'


def test_settings_that_a_prompt_would_ignore_are_refused() -> None:
    demo = (Demonstration("a", "b"),)
    with pytest.raises(ConfigError, match="prompteol-icl"):
        preset("prompteol", demonstrations=demo)
    with pytest.raises(ConfigError, match="instruction"):
        preset("prompteol", instruction="Find it.")
    with pytest.raises(ConfigError, match="at least one demonstration"):
        preset("prompteol-icl")
    with pytest.raises(ConfigError, match="neither one of"):
        preset("promptoel")
