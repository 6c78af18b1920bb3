"""New texts out of the free ones: captions with their halves exchanged, news lines from names, documentation as questions.

Invariant: seeded, and made of words of the origins and of the patterns below alone; what the teacher thinks of a text is asked afterwards,
so a text may be odd but never wrongly labelled.
"""

from __future__ import annotations

import random
import re
from collections.abc import Mapping, Sequence

_SPLIT = re.compile(r"^((?:\S+ ){1,7}?)(is|are) (\S+ing .*?)\s*\.?$")

_VERBS = (
    "Returns?|Creates?|Reads?|Writes?|Opens?|Closes?|Removes?|Deletes?|Converts?|Parses?|Finds?|Gets?|Sets?|Sends?|Receives?|Copy|Copies|Moves?|Lists?|Prints?|"
    "Compares?|Computes?|Calculates?|Checks?|Tests?|Starts?|Stops?|Waits?|Runs?|Executes?|Loads?|Saves?|Adds?|Inserts?|Appends?|Replaces?|Splits?|Joins?|Sorts?|"
    "Encodes?|Decodes?|Compress|Decompress|Formats?|Connects?|Binds?|Registers?|Changes?|Makes?|Builds?|Generates?|Extracts?|Locks?|Acquires?|Releases?|Iterates?|"
    "Displays?|Shows?|Selects?|Searche?s?|Evaluates?|Determines?|Retrieves?|Updates?|Prepends?|Raises?|Invokes?|Calls?|Flush|Seeks?|Truncates?|Escapes?|Quotes?"
)
_IMPERATIVE = re.compile(rf"^({_VERBS}) (?!self\b)(.{{8,}}?)\.?$")
_THIRD = {"copies": "copy", "searches": "search"}

NEWS = (
    "{country} and {country} sign {event} agreement",
    "{country} president meets {country} {role} in {city}",
    "{number} killed in {event} in {city}",
    "{number} people injured in {city} {event}",
    "{person} wins {event} in {country}",
    "{country} {role} arrested over {event}",
    "{country} warns {country} over {event}",
    "{city} {role} charged with {event}",
    "{country}'s prime minister resigns after {event}",
    "{person} says {country} will not accept the {event}",
    "The {role} told reporters in {city} on Tuesday that the {event} would continue .",
    "Shares of the company fell {number} percent after the {event} was announced in {city} .",
    "Police in {city} said on Monday that a {role} had died in the {event} .",
    "{country} votes on {event} law amid protests in {city}",
    "Oil prices rise as {country} {event} continues",
    "UN calls for end to {event} in {country}",
    "{person}, the {country} {role}, dies at {number}",
    "{role} from {city} to lead {country} {event}",
    "Bomb attack in {city} leaves {number} dead",
    "{country} beats {country} in {event} final",
    "European Parliament debates the {event} in {country}",
    "The {event} was the worst in {country} for {number} years .",
)
"""Patterns of news lines, written for this model."""


def captions(texts: Sequence[str], count: int, seed: int = 1) -> list[str]:
    """'A man is riding a horse' and 'Two dogs are running': subject of the one, predicate of the other, where the verb agrees."""
    halves: dict[str, tuple[list[str], list[str]]] = {"is": ([], []), "are": ([], [])}
    for text in texts:
        if found := _SPLIT.match(text):
            subject, verb, predicate = found.groups()
            halves[verb][0].append(subject.strip())
            halves[verb][1].append(predicate)
    draw = random.Random(seed)
    made: dict[str, None] = {}
    while len(made) < count:
        verb = "is" if draw.random() < len(halves["is"][0]) / sum(len(side[0]) for side in halves.values()) else "are"
        made[f"{draw.choice(halves[verb][0])} {verb} {draw.choice(halves[verb][1])} ."] = None
    return list(made)


def news(names: Mapping[str, Sequence[str]], count: int, seed: int = 2) -> list[str]:
    """The patterns with names filled in; numbers from 2 to 99."""
    draw = random.Random(seed)
    made: dict[str, None] = {}
    while len(made) < count:
        pattern = draw.choice(NEWS)
        made[re.sub(r"\{(\w+)\}", lambda slot: str(draw.randint(2, 99)) if slot[1] == "number" else draw.choice(names[slot[1]]), pattern)] = None
    return list(made)


def question(sentence: str) -> str | None:
    """'Return the absolute path of a file.' as 'how to get the absolute path of a file'; None for a sentence of another form."""
    found = _IMPERATIVE.match(sentence)
    if not found or len(sentence.split()) > 16:
        return None
    verb = found[1].lower()
    verb = _THIRD.get(verb) or (verb[:-1] if verb.endswith("s") and not verb.endswith("ss") else verb)
    return f"how to {'get' if verb == 'return' else verb} {found[2]}"


def questions(texts: Sequence[str]) -> list[str]:
    """Of all sentences that can be asked; every third as 'How do I …?'."""
    asked = [found for text in texts if (found := question(text))]
    return [f"How do I {text.removeprefix('how to ')}?" if index % 3 == 0 else text for index, text in enumerate(dict.fromkeys(asked))]
