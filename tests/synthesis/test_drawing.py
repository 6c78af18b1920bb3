"""Requests are of the seed and the row alone, and in the proportions that were asked for."""

from __future__ import annotations

import hashlib
import json
import math
import pickle
import random
import subprocess
import sys
from collections import Counter
from dataclasses import asdict
from typing import Any

import pytest

from llmemb_ray.errors import ConfigError
from llmemb_ray.synthesis.drawing import Draw
from llmemb_ray.synthesis.families import ASYMMETRIC, FAMILIES, WEIGHTS
from llmemb_ray.synthesis.languages import LANGUAGES, SHARES
from llmemb_ray.synthesis.prompts import Prompts
from llmemb_ray.synthesis.tasks import Pool, Task

ROWS = 6000


def pool(each: int = 3) -> Pool:
    return Pool(Task(family=family, task=f"{family} task {number}", source="test") for family in ASYMMETRIC for number in range(each))


def draw(**changes: Any) -> Draw:
    values: dict[str, Any] = {"seed": 7, "families": WEIGHTS, "languages": SHARES, "pool": pool(), "prompts": Prompts.load(), "generator_name": "g"}
    return Draw(**values | changes)


def within(count: int, rows: int, share: float) -> bool:
    """Five standard deviations of a binomial."""
    return abs(count - rows * share) <= 5 * math.sqrt(rows * share * (1 - share)) + 1


def test_a_row_is_the_same_whoever_draws_it_and_when() -> None:
    first = draw()
    rows = [0, 1, 17, 3000, 10**9, 2**40]
    requests = {row: first.request(row) for row in rows}
    again = pickle.loads(pickle.dumps(draw()))
    assert {row: again.request(row) for row in random.Random(0).sample(rows, len(rows))} == requests
    assert len({request.seed for request in requests.values()}) == len(rows)
    assert any(draw(seed=8).request(row).prompt != requests[row].prompt for row in rows)


def test_another_process_draws_the_same() -> None:
    code = "import json; from tests.synthesis.test_drawing import asdict, draw; print(json.dumps([asdict(draw().request(row)) for row in (5, 6)]))"
    environment = {"PYTHONHASHSEED": "3", "PYTHONPATH": ":".join(sys.path)}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env=environment)
    assert json.loads(done.stdout) == [asdict(draw().request(row)) for row in (5, 6)]


def test_the_request_seed_is_the_first_31_bits_of_its_hash() -> None:
    for row in range(20):
        expected = int(hashlib.blake2b(f"7/{row}/seed".encode(), digest_size=8).hexdigest(), 16) // 2**33
        assert draw().request(row).seed == expected < 2**31


def test_families_languages_tasks_and_placeholders_in_proportion() -> None:
    one = draw()
    requests = [one.request(row) for row in range(ROWS)]
    families = Counter(request.family for request in requests)
    assert all(within(families[family], ROWS, weight / 507) for family, weight in WEIGHTS.items())
    languages = Counter(request.language for request in requests)
    assert all(within(languages[code], ROWS, share / 100) for code, share in SHARES.items())
    for name, family in FAMILIES.items():
        own = [request for request in requests if request.family == name]
        drawn = [("task", tuple(f"{name} task {number}" for number in range(3)))] if family.asymmetric else []
        for placeholder, values in (*drawn, *family.placeholders.items()):
            counts = Counter(request.task if placeholder == "task" else request.placeholders[placeholder] for request in own)
            assert set(counts) == set(values)
            assert all(within(count, len(own), 1 / len(values)) for count in counts.values())
        if not family.asymmetric:
            assert {request.task for request in own} == {family.instruction}


def test_bitext_has_two_languages_each_by_its_share() -> None:
    one = draw(families={"bitext": 1}, languages={"en": 2, "de": 1, "fr": 1})
    pairs = Counter((request.language, request.target) for request in map(one.request, range(ROWS)))
    # The source by the shares; the target by those of the other two.
    expected = {("en", "de"): 1 / 4, ("en", "fr"): 1 / 4, ("de", "en"): 1 / 6, ("de", "fr"): 1 / 12, ("fr", "en"): 1 / 6, ("fr", "de"): 1 / 12}
    assert set(pairs) == set(expected)
    assert all(within(count, ROWS, expected[pair]) for pair, count in pairs.items())
    request = one.request(0)
    names = (LANGUAGES[request.language].name, LANGUAGES[str(request.target)].name)
    assert (request.placeholders["src_lang"], request.placeholders["tgt_lang"]) == names
    assert all(name in request.prompt for name in names)


def test_a_prompt_says_what_was_drawn() -> None:
    one = draw(families={"short-long": 1})
    for request in map(one.request, range(50)):
        assert request.target is None
        assert all(value in request.prompt for value in (request.task, LANGUAGES[request.language].name, *request.placeholders.values()))


def test_another_pool_changes_tasks_alone() -> None:
    one, other = draw(), draw(pool=pool(4))
    for row in range(200):
        before, after = asdict(one.request(row)), asdict(other.request(row))
        assert {name for name in before if before[name] != after[name]} <= {"task", "prompt"}


def test_identity_holds_all_that_decides_a_request() -> None:
    identities = [
        draw(**changes).identity
        for changes in ({}, {"seed": 8}, {"families": {"sts": 1}}, {"languages": {"en": 1, "de": 1}}, {"pool": pool(4)}, {"generator_name": "h"})
    ]
    assert len({json.dumps(identity, sort_keys=True) for identity in identities}) == len(identities)
    assert draw(families=WEIGHTS | {"sts": 0}).identity == draw(families={name: weight for name, weight in WEIGHTS.items() if name != "sts"}).identity


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"families": {"sst": 1}}, "families: 'sst' is not known; there are short-long"),
        ({"families": {"sts": 0}}, "families: none has a weight above 0"),
        ({"languages": {"en": -1}}, "languages: en has weight -1"),
        ({"languages": {"en": math.nan}}, "languages: en has weight nan"),
        ({"languages": {"xx": 1}}, "languages: 'xx' is not known"),
        ({"languages": {"en": 1}}, "languages: bitext needs two, there is en"),
        ({"pool": Pool()}, "tasks: the pool has none of family short-long and long-short and long-long and short-short"),
    ],
)
def test_what_cannot_be_drawn_from_is_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        draw(**changes)


def test_families_without_weight_need_no_tasks_and_no_second_language() -> None:
    assert draw(families={"sts": 1}, pool=Pool(), languages={"pl": 1}).request(0).language == "pl"
