"""Studies: which pairs they evaluate, that they continue, that one failure stops no other; and those of the papers."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from llmemb_ray.config import EvaluateSettings
from llmemb_ray.embedders.embedder import settle
from llmemb_ray.errors import ConfigError, InputError, ModelError, RunFailed
from llmemb_ray.evaluation import compare, evaluate, published, study
from llmemb_ray.evaluation.record import Evaluation
from llmemb_ray.storage import Storage
from tests.evaluation.records import made
from tests.small_models import SENTENCES, make_model

REPRODUCE = sorted((Path(__file__).parents[2] / "jobs" / "reproduce").glob("*.yaml"))

STUDY = """
models: [org/one, /models/two]
suite: [sts]
settings: {clean: senteval, pooling: mean}
variants:
  plain: {prompt: none}
  shown:
    prompt: prompteol-icl
    demo: {org/one: "A cat.=>Cat"}
  tuned:
    pooling: last
    adapter: {org/one: adapters/one, default: "$ADAPTERS/{model}"}
"""

RUN = """
models: [{models}/one, {models}/two]
suite: ["sts:STS-B"]
settings: {{clean: senteval, pooling: mean, actors: 0}}
variants:
  plain: {{prompt: none}}
  shown:
    prompt: prompteol-icl
    demo: {{"{models}/one": "A cat.=>Cat"}}
  tuned: {{pooling: last}}
"""
"""Of models that are there."""


def settings(path: Path, **values: Any) -> EvaluateSettings:
    return EvaluateSettings.make({"study": str(path), "out": str(path.parent / "out")} | values)


def pairs(path: Path, **values: Any) -> dict[str, EvaluateSettings]:
    return {pair.name: pair.settings for pair in study.pairs(study.load(str(path)), settings(path, **values))[0]}


@pytest.fixture
def path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("ADAPTERS", "/adapters")
    (tmp_path / "study.yaml").write_text(STUDY)
    return tmp_path / "study.yaml"


@pytest.fixture
def ready(tmp_path: Path, model: Path) -> Path:
    """A study whose models and data are there."""
    for name in ("one", "two"):
        shutil.copytree(model, tmp_path / name)
    sts = tmp_path / "data" / "STSBenchmark" / "sts-test.csv"
    sts.parent.mkdir(parents=True)
    pairs = zip(SENTENCES[:5], SENTENCES[5:], range(5), strict=False)
    sts.write_text("".join(f"g\tf\ty\t1\t{gold}\t{' '.join(left.split())}\t{' '.join(right.split())}\n" for left, right, gold in pairs))
    (tmp_path / "run.yaml").write_text(RUN.format(models=tmp_path))
    return tmp_path / "run.yaml"


class Evaluating:
    """Keeps a record as an evaluation does, and tells which were asked for."""

    def __init__(self, fails: Callable[[EvaluateSettings], Exception | None] = lambda one: None) -> None:
        self.asked: list[str] = []
        self.fails = fails

    def __call__(self, one: EvaluateSettings) -> Evaluation:
        assert one.out is not None
        self.asked.append("/".join(one.out.split("/")[-2:]))
        error = self.fails(one)
        if error is not None:
            raise error
        found = made(one.model, method="none", space=settle(one).space.digest, settings=one.model_dump(mode="json"))
        found.save(Storage(one.out))
        return found


def test_each_model_meets_each_variant(path: Path) -> None:
    found = pairs(path)
    assert list(found) == ["one plain", "one shown", "one tuned", "two plain", "two tuned"]
    assert (found["one plain"].model, found["one plain"].prompt, found["one plain"].pooling, found["one plain"].clean) == (
        "org/one",
        "none",
        "mean",
        "senteval",
    )
    assert found["one shown"].demo == ["A cat.=>Cat"]
    assert [found[f"{name} tuned"].adapter for name in ("one", "two")] == ["adapters/one", "/adapters/two"]
    assert found["one tuned"].pooling == "last", "a variant wins over the study"
    assert found["two plain"].out == f"{path.parent}/out/two/plain"
    _, notes = study.pairs(study.load(str(path)), settings(path))
    assert notes == ["variant shown is left out for /models/two: it has values for other models only"]


def test_the_command_wins_over_the_study_and_a_variant_over_both(path: Path) -> None:
    found = pairs(path, models=["other/three"], suite=["sts:STS12"], pooling="weighted-mean", actors="0")
    assert list(found) == ["three plain", "three tuned"]
    assert {one.actors for one in found.values()} == {"0"}
    assert {tuple(one.suite) for one in found.values()} == {("sts:STS12",)}
    assert [one.pooling for one in found.values()] == ["weighted-mean", "last"]


def test_models_of_one_name_have_directories_of_their_own(path: Path) -> None:
    found = pairs(path, models=["a/same", "b/same", "c/other"])
    outs = [one.out for one in found.values()]
    assert len(set(outs)) == len(outs) == 6
    assert str(path.parent / "out" / "other" / "plain") in outs


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("models: [a]\nvariants: {x: {}}", "suite must be a list"),
        ("models: a\nvariants: {x: {}}\nsuite: [sts]", "models must be a list"),
        ("models: [a]\nvariants: {x: {}}\nsuite: [sts]\nmodel: b", "unknown model"),
        ("models: [a]\nvariants: {x/y: {}}\nsuite: [sts]", "names a directory"),
        ("models: [a]\nvariants: {x: {promt: e5}}\nsuite: [sts]", "a, variant x: promt: there is no such setting"),
        ("models: [a]\nvariants: {x: {out: b}}\nsuite: [sts]", "out is no setting of one variant"),
        ("models: [a]\nvariants: {x: {demo: 'A cat=>Cat'}}\nsuite: [sts]", "belong to prompt 'prompteol-icl'"),
        ("models: [a]\nvariants: {x: {adapter: '${NO_SUCH}/b'}}\nsuite: [sts]", "the environment has no NO_SUCH"),
        ("models: [a]\nvariants: {x: {demo: {b: 'A cat=>Cat'}}}\nsuite: [sts]", "no variant has values for a"),
        ("models: [a\n", "not YAML, line 2"),
        ("- a", "a mapping with models, variants, suite"),
    ],
)
def test_a_study_that_cannot_work_is_refused(tmp_path: Path, text: str, says: str) -> None:
    (tmp_path / "study.yaml").write_text(text)
    with pytest.raises(ConfigError, match=says.replace("$", r"\$")):
        pairs(tmp_path / "study.yaml")


def test_a_missing_study_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"gone.yaml is not there.*jobs/reproduce"):
        study.load(str(tmp_path / "gone.yaml"))


def test_it_continues_and_evaluates_again_what_changed(ready: Path) -> None:
    first, again, changed = Evaluating(), Evaluating(), Evaluating()
    comparison = study.run(settings(ready), first)
    assert first.asked == ["one/plain", "one/shown", "one/tuned", "two/plain", "two/tuned"]
    assert [row.name for row in comparison.rows] == ["one plain", "one shown", "one tuned", "two plain", "two tuned"]
    kept = json.loads((ready.parent / "out" / study.RESULT).read_text())
    assert kept == json.loads(json.dumps(comparison.to_dict()))
    assert "variant shown is left out" in kept["notes"][0]
    assert study.run(settings(ready, actors="2", storage_retry_seconds=5), again).to_dict() == comparison.to_dict()
    assert again.asked == []
    ready.write_text(ready.read_text().replace("{prompt: none}", "{prompt: none, layer: -2}"))
    study.run(settings(ready), changed)
    assert changed.asked == ["one/plain", "two/plain"]


def test_a_changed_variant_and_changed_weights_have_new_figures(ready: Path, tmp_path: Path) -> None:
    told: list[str] = []

    def figures() -> dict[str, float]:
        told.clear()
        comparison = study.run(chosen, evaluate.run, told.append)
        assert not comparison.failed
        return {row.name: row.figures["sts"]["STS-B"] for row in comparison.rows}

    def alone(**more: Any) -> float:
        values = {"clean": "senteval", "actors": "0", "data": str(tmp_path / "data"), "suite": ["sts:STS-B"], "model": str(tmp_path / "one")}
        return evaluate.run(EvaluateSettings.make(values | {"out": str(tmp_path / f"alone-{len(list(tmp_path.iterdir()))}")} | more)).suites["sts"]["STS-B"]

    chosen = settings(ready, models=[str(tmp_path / "one")], data=str(tmp_path / "data"))
    before = figures()
    assert figures() == before
    assert [line.partition(": ")[2] for line in told] == ["was evaluated before"] * 3
    ready.write_text(ready.read_text().replace("{prompt: none}", "{prompt: none, layer: 0}"))
    changed = figures()
    assert changed["one plain"] == alone(prompt="none", layer=0, pooling="mean") != before["one plain"]
    assert changed | {"one plain": 0} == before | {"one plain": 0}
    shutil.rmtree(tmp_path / "one")
    make_model(tmp_path / "one", seed=1)
    retrained = figures()
    assert all("its weights or tokenizer changed" in line for line in told)
    assert retrained["one tuned"] == alone() != before["one tuned"]


def test_a_pair_that_was_stopped_may_change_and_a_record_of_others_is_left(ready: Path, tmp_path: Path) -> None:
    def stopped(one: EvaluateSettings) -> Evaluation:
        evaluate.run(one)
        raise KeyboardInterrupt

    chosen = settings(ready, models=[str(tmp_path / "one")], data=str(tmp_path / "data"))
    with pytest.raises(KeyboardInterrupt):
        study.run(chosen, stopped)
    ready.write_text(ready.read_text().replace("{prompt: none}", "{prompt: none, layer: 0}"))
    mine = tmp_path / "out" / "one" / "tuned"
    evaluate.run(EvaluateSettings.make({"model": str(tmp_path / "one"), "data": chosen.data, "out": str(mine), "suite": ["sts:STS-B"], "actors": "0"}))
    kept = (mine / "evaluation.json").read_bytes()
    for _ in range(2):
        comparison = study.run(chosen, evaluate.run)
        assert [row.name for row in comparison.rows] == ["one plain", "one shown"]
        assert "name another --out" in comparison.failed["one tuned"]
    assert (mine / "evaluation.json").read_bytes() == kept


def test_contamination_is_looked_for_once(ready: Path, tmp_path: Path) -> None:
    (tmp_path / "train.csv").write_text(f"sent0,sent1\n{SENTENCES[0].upper()},something else entirely\n")
    asked: list[EvaluateSettings] = []

    def evaluating(one: EvaluateSettings) -> Evaluation:
        asked.append(one)
        return Evaluating()(one)

    chosen = settings(ready, data=str(tmp_path / "data"), contamination=[str(tmp_path / "train.csv")])
    for _ in range(2):
        comparison = study.run(chosen, evaluating)
        assert comparison.contamination["tasks"]["sts STS-B"]["found"] == 1
        shown = "\n".join(compare.lines(comparison))
        assert shown.count("contamination: texts that stand") == 1
        assert repr(SENTENCES[0]) in shown
    assert len(asked) == 5, "finished pairs are not evaluated again for it"
    assert not any(one.contamination for one in asked)
    assert json.loads((tmp_path / "out" / study.RESULT).read_text())["contamination"] == comparison.contamination
    with pytest.raises(InputError, match=r"gone\.csv is not there"):
        study.run(settings(ready, data=chosen.data, contamination=[str(tmp_path / "gone.csv")]), evaluating)
    with pytest.raises(ConfigError, match="contamination: the texts of passkey"):
        study.run(settings(ready, suite=["passkey"], contamination=chosen.contamination), evaluating)


def test_one_that_fails_stops_no_other_and_is_evaluated_the_next_time(ready: Path) -> None:
    told: list[str] = []
    broken = {"one/plain": ModelError("model org/one: no such directory"), "two/plain": RuntimeError("out of memory")}
    first = Evaluating(lambda one: broken.get("/".join(str(one.out).split("/")[-2:])))
    comparison = study.run(settings(ready), first, told.append)
    assert len(first.asked) == 5
    assert comparison.failed == {"one plain": "model org/one: no such directory", "two plain": "RuntimeError: out of memory"}
    assert [row.name for row in comparison.rows] == ["one shown", "one tuned", "two tuned"]
    assert any("Traceback" in line for line in told), "of what is no error of ours"
    second = Evaluating()
    assert study.run(settings(ready), second).failed == {}
    assert second.asked == ["one/plain", "two/plain"]


def test_a_study_of_which_nothing_is_left_fails(path: Path) -> None:
    with pytest.raises(RunFailed, match=r"no pair(.|\n)*one plain: gone"):
        study.run(settings(path), Evaluating(lambda one: ModelError("gone")))


def test_an_interruption_ends_it_and_what_was_done_stays(ready: Path) -> None:
    def interrupted(one: EvaluateSettings) -> Evaluation:
        if str(one.out).endswith("one/tuned"):
            raise KeyboardInterrupt
        return Evaluating()(one)

    with pytest.raises(KeyboardInterrupt):
        study.run(settings(ready), interrupted)
    rest = Evaluating()
    study.run(settings(ready), rest)
    assert rest.asked == ["one/tuned", "two/plain", "two/tuned"]


# -- those of the papers -----------------------------------------------------------------------------


@pytest.mark.parametrize("path", REPRODUCE, ids=lambda path: path.stem)
def test_each_study_of_the_papers_makes_settings_that_work(path: Path) -> None:
    found = pairs(path)
    loaded = study.load(str(path))
    assert len(found) == len(loaded.models) * len(loaded.variants), "no variant is left out for a model of the study"
    readme = (path.parent / "README.md").read_text()
    assert f"`{path.name}`" in readme
    assert f"--study jobs/reproduce/{path.name}" in path.read_text()


def test_there_are_six_studies() -> None:
    assert [path.stem for path in REPRODUCE] == ["demonstrations", "finetuned", "passkey", "quantized", "representations", "sizes"]


def test_the_demonstrations_are_among_those_of_the_paper(data: Path) -> None:
    lines = (data / "icl_demos" / "demos.jsonl").read_text(encoding="utf-8").splitlines()
    known = {f"{row['sentence']}=>{row['word']}" for row in map(json.loads, lines)}
    demos = [demo for path in REPRODUCE for one in pairs(path).values() for demo in one.demo]
    assert len(demos) == 8 + 2
    assert set(demos) <= known


def test_a_study_finds_the_published_rows_of_its_methods() -> None:
    """The methods of the representations are told apart, and each passkey setting meets its own row."""
    by_name = {path.stem: pairs(path) for path in REPRODUCE}
    methods = []
    for one in list(by_name["representations"].values())[:4]:
        representation = one.build_representation()
        prompt = {"none": "none", "prompteol": "prompteol"}.get(one.prompt, "template")
        methods.append(published.method_of(made(method=prompt, template=representation.document.template, representation={"pooling": one.pooling})))
    assert methods == ["avg", "last", "prompt", "prompteol"]
    rows = []
    for one in by_name["passkey"].values():
        given = {name: value for name, value in one.model_dump(mode="json").items() if name in one.model_fields_set}
        rows.append(published.nearest(made(one.model, method="e5", suites={"passkey": {"16k": 50}}, settings=given), "passkey"))
    assert [row.figure("16k") for row in rows if row] == [30, 0, 88, 36]
