"""The search for demonstrations, on a small model and small data in SentEval's layout."""

from __future__ import annotations

import json
import shlex
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from scipy.stats import spearmanr

from llmemb_ray.config import DemosSelectSettings
from llmemb_ray.demonstrations import leaderboard
from llmemb_ray.demonstrations.scoring import Examiner, Trial, drawn, sts_exam, tokenize
from llmemb_ray.demonstrations.select import Selection, select
from llmemb_ray.embedders.embedder import Embedder, settle
from llmemb_ray.errors import ConfigError, InputError, ItemsFailed, RunFailed, RunMismatch
from llmemb_ray.evaluation import transfer
from llmemb_ray.evaluation.data import DataPlace
from llmemb_ray.pipeline import pool
from llmemb_ray.representation import Demonstration, Representation, templates
from llmemb_ray.representation.cleaning import clean
from llmemb_ray.storage import Storage
from tests.s3_server import S3Server
from tests.small_models import make_adapter

WORDS = ["man", "woman", "dog", "guitar", "horse", "plays", "rides", "eats", "sees", "a", "the", "red", "fast", "slowly"]
CANDIDATES = [
    ("A man is smoking.", "Smoking"),
    ("meat from a deer.", "Venison"),
    ('They said "yes" and {left}', "Leaving"),
    ("A jockey riding a horse.", "Equestrian"),
    ("relating to switzerland or its people.", "Swiss"),
    ("A man is playing on a guitar and singing.", "Music"),
]


def sentences(count: int) -> list[str]:
    random = np.random.default_rng(0)
    return [" ".join(random.choice(WORDS, size=random.integers(3, 8))) + " ." for _ in range(count)]


PAIRS = list(zip(sentences(40)[:20], sentences(40)[20:], (np.arange(20) * 7 % 11 / 2).tolist(), strict=True))


@pytest.fixture
def place(tmp_path: Path) -> Path:
    """Data with twenty pairs of STS-B dev and sixty labelled sentences of MR, and a file of candidates."""
    sts, mr = tmp_path / "data" / "STS" / "STSBenchmark", tmp_path / "data" / "MR"
    sts.mkdir(parents=True)
    mr.mkdir()
    sts.joinpath("sts-dev.csv").write_text("".join(f"g\tf\ty\t{n}\t{gold}\t{a}\t{b}\n" for n, (a, b, gold) in enumerate(PAIRS)), encoding="utf-8")
    for name, number in (("pos", 0), ("neg", 1)):
        mr.joinpath(f"rt-polarity.{name}").write_text("".join(f'{text} "{name}"\n' for text in sentences(60)[number::2]), encoding="latin-1")
    lines = [json.dumps({"sentence": sentence, "word": word, "source": "test"}) + "\n" for sentence, word in CANDIDATES]
    tmp_path.joinpath("candidates.jsonl").write_text("".join(lines), encoding="utf-8")
    return tmp_path


@pytest.fixture
def search(place: Path, model: Path) -> Callable[..., Selection]:
    def run(out: str = "out", **changes: Any) -> Selection:
        values = {"model": str(model), "actors": "0", "data": str(place / "data"), "out": out if "://" in out else str(place / out), "token_budget": 256}
        if not str(changes.get("for_", "")).startswith("transfer"):
            values["candidates"] = str(place / "candidates.jsonl")
        return select(DemosSelectSettings.make(values | changes))

    return run


def scores(selection: Selection) -> dict[str, float | None]:
    return {" ".join(one.word for one in row.demonstrations): row.outcome.score for row in selection.ranking}


def test_scores_are_those_of_plain_inference(search: Callable[..., Selection], place: Path, model: Path) -> None:
    """Each prompt tokenised whole, embedded alone by transformers, without packing or sharing; Spearman by scipy."""
    import torch
    from transformers import AutoModel, AutoTokenizer

    tokenizer, decoder = AutoTokenizer.from_pretrained(model), AutoModel.from_pretrained(model, dtype=torch.float32)

    def score(template: str) -> float:
        cosines = []
        for left, right, _ in PAIRS:
            with torch.inference_mode():
                u, v = (
                    decoder(**tokenizer(template.format(text=clean(text, "senteval")).strip(), return_tensors="pt")).last_hidden_state[0, -1]
                    for text in (left, right)
                )
            cosines.append(float(torch.nn.functional.cosine_similarity(u, v, dim=0)))
        return float(100 * spearmanr(cosines, [gold for *_, gold in PAIRS]).statistic)

    selection = search()
    expected = {word: score(templates.prompteol((Demonstration(sentence, word),))) for sentence, word in CANDIDATES}
    assert scores(selection) == pytest.approx(expected, abs=0.4)  # Two neighbours in rank that swap: 12 / (20 · 399) = 0.15.
    assert selection.zero_shot == pytest.approx(score(templates.PROMPTEOL), abs=0.4)
    ordered = [row.outcome.score or 0.0 for row in selection.ranking]
    assert ordered == sorted(ordered, reverse=True)
    assert selection.retokenized == 0

    best = selection.ranking[0]
    written = Representation.load(place / "out")
    assert written.document.template == (templates.prompteol(best.demonstrations) if best.gain > 0 else templates.PROMPTEOL)  # type: ignore[operator]
    assert written.document.clean == "senteval"
    assert Embedder.load(str(model), representation=str(place / "out")).encode(["A man."]).shape == (1, 32)
    page = (place / "out" / "leaderboard.html").read_text(encoding="utf-8")
    assert "Equestrian" in page


def test_computing_the_demonstrations_with_every_text_changes_no_score(place: Path, model: Path) -> None:
    spec = settle(DemosSelectSettings.make({"model": str(model), "candidates": "x", "out": "x", "token_budget": 256}))
    exam, embedder = sts_exam(DataPlace(place / "data"), raw=False, seed=1), Embedder(spec)
    rows, trial = tokenize(spec, exam.texts), Trial((Demonstration(*CANDIDATES[0]), Demonstration(*CANDIDATES[5])), exam.size)
    shared, alone = (Examiner(exam=exam, base=spec.representation, rows=rows, share=share)(embedder, trial) for share in (True, False))
    assert shared.score == pytest.approx(alone.score, abs=0.4)
    assert alone.computed == alone.tokens == shared.tokens
    assert shared.computed < 0.6 * shared.tokens


def test_actors_give_the_scores_of_this_process(search: Callable[..., Selection]) -> None:
    cluster = {"actors": "2", "cpus_per_actor": 0.5, "ray_address": "local"}
    there, here = search("there", **cluster), search("here")
    assert (there.scored, there.zero_shot) == (len(CANDIDATES) + 1, pytest.approx(here.zero_shot, abs=0.4))
    assert scores(there) == pytest.approx(scores(here), abs=0.4)


def test_what_killed_the_actors_is_named_and_the_search_goes_on(search: Callable[..., Selection], monkeypatch: pytest.MonkeyPatch, place: Path) -> None:
    whole, run = search("whole"), pool._Alone.run

    def killed_at_three(*arguments: Any) -> Iterator[Any]:
        for number, outcome in run(*arguments):
            if number == 3:
                raise ItemsFailed("an actor died: out of memory", [2, 3])
            yield number, outcome

    with monkeypatch.context() as patched:
        patched.setattr(pool._Alone, "run", killed_at_three)
        with pytest.raises(
            RunFailed, match=r"(?s)died: out.*⇒ .* or .*⇒ Leaving.*The 3 scores .* stand in .*/killed, .*leave the candidate out of .*candidates\.jsonl"
        ):
            search("killed")
    resumed = search("killed")
    assert (resumed.found, scores(resumed)) == (3, scores(whole))


def test_a_search_that_was_stopped_goes_on(search: Callable[..., Selection], monkeypatch: pytest.MonkeyPatch, place: Path) -> None:
    whole = search("whole")
    assert (whole.scored, whole.found) == (len(CANDIDATES) + 1, 0)
    add, calls = leaderboard.Leaderboard.add, 0

    def stop_after_three(self: Any, *arguments: Any) -> None:
        nonlocal calls
        if calls == 3:
            raise KeyboardInterrupt
        calls += 1
        add(self, *arguments)

    with monkeypatch.context() as patched:
        patched.setattr(leaderboard.Leaderboard, "add", stop_after_three)
        with pytest.raises(KeyboardInterrupt):
            search("stopped")
    assert not (place / "stopped" / "llmemb.json").exists()
    resumed = search("stopped")
    assert (resumed.scored, resumed.found) == (len(CANDIDATES) + 1 - 3, 3)
    assert scores(resumed) == scores(whole)
    monkeypatch.setattr("llmemb_ray.demonstrations.select.pool", None)  # With nothing to score no model is loaded.
    assert search("stopped").scored == 0


def test_a_search_in_object_storage_goes_on(search: Callable[..., Selection], s3: S3Server) -> None:
    reach = {"endpoint_url": s3.endpoint_url, "storage_options": s3.storage_options}
    first = search(s3.url("search"), **reach)
    assert s3.path("search/llmemb.json").is_file()
    storage = Storage(s3.url("search"), s3.access())
    storage.delete([storage.list("scores")[0].path])
    again = search(s3.url("search"), **reach)
    assert (again.scored, again.found) == (1, len(CANDIDATES))
    assert scores(again) == scores(first)


def test_another_exam_or_model_is_refused_before_a_model_is_loaded(search: Callable[..., Selection], place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    search()
    monkeypatch.setattr("llmemb_ray.demonstrations.select.pool", None)
    with pytest.raises(RunMismatch, match=r"space\.representation\.pooling: this search 'mean', the directory 'last'"):
        search(pooling="mean")
    for changes in ({"quantization": "nf4"}, {"compute_dtype": "bfloat16"}):
        ((name, value),) = changes.items()
        with pytest.raises(RunMismatch, match=rf"engine\.{name}: this search '{value}', the directory '(none|float32)'"):
            search(**changes)
    assert search(compute_dtype="float32", quantization="none").scored == 0
    record = place / "out" / "search.json"
    record.write_text(record.read_text(encoding="utf-8").replace('"backend": "hf"', '"backend": "vllm"'), encoding="utf-8")
    assert search().scored == 0
    with pytest.raises(RunMismatch, match=r"engine\.backend: this search 'hf', the directory 'vllm'"):
        search(backend="hf")
    dev = place / "data" / "STS" / "STSBenchmark" / "sts-dev.csv"
    dev.write_text(dev.read_text(encoding="utf-8").replace("guitar", "flute"), encoding="utf-8")
    with pytest.raises(RunMismatch, match=r"exam\.digest"):
        search()


def test_halving_scores_less_and_is_compared_with_the_full_search(search: Callable[..., Selection]) -> None:
    halved = search(halving=True, halving_first=4)
    assert [(step["candidates"], step["items"]) for step in halved.rounds] == [(6, 5), (3, 10), (2, 20)]
    assert halved.scored == 1 + 6 + 3 + 2
    assert halved.agreement is None
    full = search()
    assert full.scored == len(CANDIDATES) - 2
    assert full.agreement is not None
    order, survivor = list(scores(full)), next(iter(scores(halved)))
    assert full.agreement.winner_rank == order.index(survivor) + 1
    assert full.agreement.same_winner is (order[0] == survivor)
    assert any(line.startswith("halving against the full search") for line in full.lines(5))


def test_prompts_of_two_lengthen_the_best_of_one(search: Callable[..., Selection]) -> None:
    single, double = search(), search(demos_per_prompt=2, beam=2)
    assert single.agreement is None  # Nothing was halved.
    heads = {row.demonstrations for row in single.ranking[:2]}
    pairs = {row.demonstrations for row in double.ranking if len(row.demonstrations) == 2}
    assert double.scored == len(pairs) == 2 * (len(CANDIDATES) - 1)
    assert {pair[:1] for pair in pairs} == heads
    assert all(pair[0] != pair[1] for pair in pairs)
    assert scores(double).items() >= scores(single).items()


def test_a_demonstration_that_leaves_no_room_is_told_and_comes_last(search: Callable[..., Selection], place: Path) -> None:
    with (place / "candidates.jsonl").open("a", encoding="utf-8") as file:
        file.write(json.dumps({"sentence": "word " * 400, "word": "Long"}) + "\n")
    selection = search()
    assert selection.ranking[-1].outcome.score is None
    assert selection.ranking[-1].demonstrations[0].word == "Long"
    assert any("⇒ Long: max_tokens: 256 leaves no room for text" in line for line in selection.lines(20))
    assert not any("⇒ Long" in line for line in selection.lines(6))
    (place / "candidates.jsonl").write_text(json.dumps({"sentence": "word " * 400, "word": "Long"}) + "\n", encoding="utf-8")
    with pytest.raises(InputError, match="none of the 1 candidates can be scored: max_tokens"):
        search()


def test_the_command_that_is_printed_embeds_with_the_winner(
    search: Callable[..., Selection], model: Path, corpus: Path, place: Path, llmemb: Callable[..., Any]
) -> None:
    adapter = make_adapter(model, place / "an adapter")
    selection = search(max_tokens=300, rope_theta=1e5, adapter=str(adapter), compute_dtype="float32", demos_per_prompt=1)
    *_, last = selection.lines(3)
    words = shlex.split(last.removeprefix("embed with it: llmemb "))
    assert words[words.index("--adapter") + 1] == str(adapter)
    assert selection.to_dict()["embed"] in last
    run = [{"INPUT": str(corpus), "OUTPUT": str(place / "vectors")}.get(word, word) for word in words]
    shown = llmemb(*run, "--actors", "0")
    assert shown.code == 0, shown.err
    bare = [word for word in run if word not in ("--rope-theta", "100000.0")]
    assert "max_tokens" in llmemb(*bare, "--actors", "0", "--overwrite").err


def test_transfer_draws_one_example_of_each_label(search: Callable[..., Selection], place: Path) -> None:
    selection = search(for_="transfer:MR", demos_per_prompt=2, draws=4, folds=3, classifier="sklearn")
    assert len(selection.ranking) == 4
    assert selection.exam == "MR dev"
    for row in selection.ranking:
        assert {one.word for one in row.demonstrations} == {"positive", "negative"}
        for one in row.demonstrations:
            assert one.sentence.endswith({"positive": "'pos'", "negative": "'neg'"}[one.word])  # Cleaned: its quotes are the template's else.
    task = transfer.load("MR", DataPlace(place / "data"), folds=3)
    assert drawn(task, count=4, each=2, cleaning="senteval", seed=1) == drawn(task, count=4, each=2, cleaning="senteval", seed=1)
    assert drawn(task, count=4, each=2, cleaning="senteval", seed=1) != drawn(task, count=4, each=2, cleaning="senteval", seed=2)


def test_transfer_scores_are_those_of_the_task_itself(search: Callable[..., Selection], place: Path, model: Path) -> None:
    selection = search(for_="transfer:MR", draws=1, folds=3, classifier="sklearn")
    part = transfer.load("MR", DataPlace(place / "data"), folds=3, classifier="sklearn").development()
    texts = part.needs()[0].texts  # type: ignore[union-attr]
    for demonstrations, score in [((), selection.zero_shot), (selection.ranking[0].demonstrations, selection.ranking[0].outcome.score)]:
        template = templates.prompteol(demonstrations)
        vectors = Embedder.load(str(model), prompt=template, clean="senteval").encode(list(texts))
        assert part.score([vectors]).main == pytest.approx(score, abs=3)  # One sentence of forty is 2.5.


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"for_": "tranfer:MR"}, "neither sts nor transfer:TASK"),
        ({"prompt": "e5"}, "demonstrations are chosen for prompteol"),
        ({"draws": 5}, "draws: not used with for sts"),
        ({"for_": "transfer:MR", "candidates": "x"}, "candidates: not used with for transfer:MR"),
        ({"for_": "transfer:NR"}, "for: 'transfer:NR' names no task to choose for; give one of transfer:MR, transfer:CR, transfer:SUBJ"),
        ({"for_": "transfer:"}, "for: 'transfer:' names no task"),
        ({"for_": "transfer:sst2", "folds": 3}, "folds: not used with for transfer:sst2"),
        ({"beam": 2}, "beam: does nothing with one demonstration"),
        ({"halving_first": 4}, "halving_first: does nothing without halving"),
        ({"role": "query"}, "role: .* for both roles"),
        ({"halving": True, "halving_first": 20}, r"halving_first: the first sample is 1 of 20 items: the gold scores .* Set a smaller --halving-first"),
        (
            {"for_": "transfer:MR", "examples": 40, "halving": True},
            "halving_first: the first sample is 5 of 40 items: folds: 5 are too many for the 5 rows .* smaller --halving-first or more --examples",
        ),
        ({"for_": "transfer:MR", "examples": 20, "folds": 15}, "folds: 15 are too many for the 20 rows"),
        ({"candidates": None}, "llmemb demos build makes them"),
    ],
)
def test_settings_that_cannot_work_are_refused_before_a_model_is_loaded(
    changes: dict[str, Any], message: str, search: Callable[..., Selection], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("llmemb_ray.demonstrations.select.pool", None)
    with pytest.raises(ConfigError, match=message):
        search(**changes)
