"""Parity: what is compared with what, held to which bounds, and that engines which differ are found."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from llmemb_ray import engines
from llmemb_ray.config import ParitySettings
from llmemb_ray.embedders.embedder import EmbedderSpec, settle
from llmemb_ray.errors import CheckFailed, ConfigError, EngineDied, InputError, ModelError
from llmemb_ray.pipeline.parity import comparison, processes, sample, text
from llmemb_ray.pipeline.parity.comparison import COSINE, FLOAT32_CPU, NEIGHBOURS, NOISES, Bound, bound_of, compare
from llmemb_ray.pipeline.parity.parity import PATH, Parity, compared, parity
from llmemb_ray.pipeline.parity.passes import ORDERS, Load, Pass, Passes, Work, calls, make
from llmemb_ray.pipeline.parity.processes import in_own_process
from llmemb_ray.pipeline.parity.suite import Suite, measure
from llmemb_ray.pipeline.parity.texts import TEXTS, texts
from tests.small_jobs import embed, opened, settled, write
from tests.small_models import SENTENCES, make_adapter, make_damaged_model, make_model

without_vllm = pytest.mark.skipif(engines.vllm_version() is not None, reason="says what is so where vLLM is not installed")

WIDE: dict[str, Any] = {"hidden_size": 64, "num_attention_heads": 2, "num_key_value_heads": 1}
"""vLLM's CPU kernels begin at attention heads of 32 dimensions, bitsandbytes' at rows of 64 weights."""


@pytest.fixture(scope="module")
def wide(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model(tmp_path_factory.mktemp("wide") / "llama", **WIDE)


# -- measures and bounds -----------------------------------------------------------------------------


def found(vectors: Any, **changes: Any) -> Pass:
    return Pass(**({"vectors": np.asarray(vectors, np.float32), "failed": {}, "tokens": 10, "shared": 0} | changes))


def turned(degrees: float) -> list[float]:
    return [math.cos(math.radians(degrees)), math.sin(math.radians(degrees))]


def test_distances_are_those_of_unit_vectors_whatever_their_length() -> None:
    reference = np.array([turned(0), turned(10), turned(90)], np.float32) * np.array([[1], [50], [0.01]], np.float32)
    made = compare("x", found([turned(0), turned(13), turned(91)]), reference, np.arange(3))
    assert made.cosine == pytest.approx(1 - math.cos(math.radians(3)), rel=1e-4)
    assert made.mean_cosine == pytest.approx((1 + math.cos(math.radians(3)) + math.cos(math.radians(1))) / 3, abs=1e-7)
    assert made.difference == pytest.approx(math.sin(math.radians(13)) - math.sin(math.radians(10)), rel=1e-4)
    assert (made.rows, made.furthest, made.neighbours) == (3, 1, 2)


def test_a_distance_far_below_float32_of_one_is_told() -> None:
    """1 − cosine of 5e-11 would drown in the rounding of a float32 cosine."""
    reference = np.array([[1.0, 0.0], [0.0, 1.0]], np.float32)
    made = compare("x", found([[1.0, 1e-5], [0.0, 1.0]]), reference, np.arange(2))
    assert made.cosine == pytest.approx(5e-11, rel=1e-3)


@pytest.mark.parametrize("vectors", [[[1, 0], [math.nan, 1]], [[1, 0], [0, 0]], [[1, 0], [math.inf, 0]]], ids=["nan", "zero", "inf"])
def test_a_row_that_only_the_engine_lacks_is_never_within_bounds(vectors: Any) -> None:
    reference = np.eye(2, dtype=np.float32)
    for bound in (None, Bound(measure="cosine", value=1.0, why="")):
        made = compare("x", found(vectors), reference, np.arange(2), bound=bound)
        assert (made.passed, list(made.missing), made.rows) == (False, [1], 1)
        assert json.loads(json.dumps(made.to_dict(), allow_nan=False))["passed"] is False
    failed = compare("x", found(np.eye(2), failed={0: "refused"}), reference, np.arange(2))
    assert (failed.passed, failed.missing) == (False, {0: "refused"})
    assert compare("x", found(vectors), reference, np.array([0])).passed, "a row that the reference lacks as well is not compared"


@pytest.mark.parametrize(
    ("bound", "passed"),
    [
        (Bound(measure="difference", value=0.011, why=""), True),
        (Bound(measure="difference", value=0.009, why=""), False),
        (Bound(measure="cosine", value=6e-5, why=""), True),
        (Bound(measure="cosine", value=4e-5, why=""), False),
        (None, True),
    ],
)
def test_each_measure_is_held_to_its_own_bound(bound: Bound | None, passed: bool) -> None:
    """Of a turn by 0.01 the largest difference is 0.01 and 1 − cosine 5e-5."""
    reference = np.array([[1.0, 0.0], [0.0, 1.0]], np.float32)
    assert compare("x", found([[1.0, 0.01], [0.0, 1.0]]), reference, np.arange(2), bound=bound).passed is passed


def test_neighbours_are_counted_by_row() -> None:
    """On a circle at 0, 10, 30 and 60 degrees the nearest of each is 1, 0, 1 and 2; with 30 moved to 50 it is 1, 0, 3 and 2."""
    unit = [np.array([turned(angle) for angle in angles]) for angles in ((0, 10, 30, 60), (0, 10, 50, 60))]
    assert comparison.agreement(unit[0], unit[0], 1) == 1
    assert comparison.agreement(unit[1], unit[0], 1) == 0.75
    assert comparison.agreement(unit[1], unit[0], 3) == 1, "all rows there are"


def test_duplicates_have_no_order_among_them() -> None:
    generator = np.random.default_rng(0)
    rows = np.repeat(generator.normal(size=(3, 8)), 5, axis=0)
    rows /= np.linalg.norm(rows, axis=1, keepdims=True)
    shaken = rows + 1e-9 * generator.normal(size=rows.shape)
    assert comparison.agreement(shaken, rows, 2) == 1


def test_a_single_row_has_no_neighbours() -> None:
    made = compare("x", found([[1.0, 0.0]]), np.array([[1.0, 0.0]], np.float32), np.arange(1))
    assert (made.agreement, made.neighbours) == (None, 0)


@pytest.mark.parametrize(
    ("dtype", "weights", "device", "noise", "measure_", "value"),
    [
        ("float32", None, "cpu", None, "difference", FLOAT32_CPU),
        ("float32", None, "NVIDIA H100", None, "cosine", COSINE),
        ("bfloat16", None, "cpu", 1e-4, "cosine", COSINE),
        ("bfloat16", None, "cpu", 2e-3, "cosine", NOISES * 2e-3),
        ("float16", None, "NVIDIA H100", None, "cosine", COSINE),
        ("float32", "nf4", "cpu", None, "cosine", COSINE),
    ],
)
def test_the_bounds_are_those_promised(dtype: str, weights: str | None, device: str, noise: float | None, measure_: str, value: float) -> None:
    bound = bound_of(dtype, weights, device, noise)
    assert bound is not None
    assert (bound.measure, bound.value) == (measure_, value)


def test_llm_int8_is_exempt() -> None:
    assert bound_of("bfloat16", "llm.int8", "cpu", 1e-4) is None


# -- rows and orders ---------------------------------------------------------------------------------


@pytest.mark.parametrize("rows", [1, 2, 3, 50])
def test_every_row_goes_through_once_in_each_order(rows: int) -> None:
    for order in ORDERS:
        groups = calls(order, rows, seed=3)
        assert sorted(np.concatenate(groups).tolist()) == list(range(rows))
        assert all(len(group) for group in groups)
    assert len(calls("one by one", rows, 0)) == rows
    assert len(calls("batched", rows, 0)) == 1


def test_shuffled_rows_have_other_neighbours_and_the_seed_decides_which() -> None:
    shuffled = calls("shuffled", 50, 0)
    assert len({len(group) for group in shuffled}) > 1
    assert np.concatenate(shuffled).tolist() != list(range(50))
    assert [group.tolist() for group in shuffled] == [group.tolist() for group in calls("shuffled", 50, 0)]
    assert np.concatenate(shuffled).tolist() != np.concatenate(calls("shuffled", 50, 1)).tolist()
    assert np.concatenate(shuffled).tolist() != np.concatenate(calls("repeated", 50, 0)).tolist()


@pytest.mark.parametrize("prompt", ["prompteol", "none", "e5"])
def test_built_in_texts_make_prompts_and_one_is_cut(tokenizers: dict[str, Path], tmp_path: Path, prompt: str) -> None:
    for tokenizer in tokenizers.values():
        from transformers import AutoTokenizer

        directory = make_model(tmp_path / tokenizer.name, tokenizer=AutoTokenizer.from_pretrained(tokenizer), max_position_embeddings=512)
        made = sample.built_in(settle(ParitySettings.make({"model": str(directory), "prompt": prompt})), "document", 1000)
        assert (len(made.prompts), made.rejects) == (len(TEXTS) + 1, [])
        assert np.flatnonzero(made.prompts.truncated).tolist() == [1]
        assert made.prompts.lengths[1] >= 500


def test_built_in_texts_differ() -> None:
    assert len(set(texts(4096))) == len(TEXTS) + 1


def test_rows_of_a_corpus_come_from_all_over_it_and_bad_ones_are_named(tmp_path: Path, model: Path, corpus: Path) -> None:
    ready = settled(corpus, tmp_path / "out", model)
    made = sample.of_corpus(ready.job, ready.plan, 1000)
    assert len(made.prompts) == 118
    assert made.rejects == [
        ("row 7 of part-1.parquet", "null", "the text is null"),
        ("row 23 of part-1.parquet", "empty", "the text is empty or only white space"),
    ]
    some = sample.of_corpus(ready.job, ready.plan, 6)
    assert len(some.prompts) == 6
    assert {name.split(" of ")[1] for name in some.names} == {f"part-{file}.parquet" for file in range(3)}
    filtered = settled(corpus, tmp_path / "filtered", model, filter="id LIKE '2-%'")
    assert {name.split(" of ")[1] for name in sample.of_corpus(filtered.job, filtered.plan, 4).names} == {"part-2.parquet"}


def test_a_corpus_without_a_prompt_is_refused(tmp_path: Path, model: Path) -> None:
    ready = settled(write(tmp_path / "in" / "a.parquet", [None, " "]), tmp_path / "out", model)
    with pytest.raises(InputError, match="none of 2 rows"):
        sample.of_corpus(ready.job, ready.plan, 5)


# -- transformers ------------------------------------------------------------------------------------


def found_here(model: Path, *, rows: int = 12, **settings: Any) -> Parity:
    """Everything in this process, which is as good where transformers alone is measured."""
    return parity(ParitySettings.make({"model": str(model), "sample": rows, "backend": "hf"} | settings), run=make)


def no_adapter(directory: Path) -> Path:
    """An adapter whose weights change nothing, as one that was never trained."""
    weights = load_file(directory / "adapter_model.safetensors")
    save_file({name: np.zeros_like(weight) if "lora_B" in name else weight for name, weight in weights.items()}, directory / "adapter_model.safetensors")
    return directory


@pytest.fixture(scope="module")
def adapter(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_adapter(model, tmp_path_factory.mktemp("adapter"))


@pytest.fixture(scope="module")
def idle_adapter(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return no_adapter(make_adapter(model, tmp_path_factory.mktemp("idle-adapter")))


@without_vllm
def test_float32_is_within_its_bound_in_every_order_and_vllm_is_named_as_left_out(model: Path) -> None:
    made = found_here(model, rows=100)
    made.require()
    assert [one.name for _, one in made.comparisons] == [f"transformers float32, {order}" for order in ORDERS]
    assert all(one.rows == len(TEXTS) + 1 and one.agreement == 1 and one.bound and one.bound.value == FLOAT32_CPU for _, one in made.comparisons)
    assert made.comparisons[0][1].shared > 0, "as configured the template is shared"
    assert made.groups[0].measured.left_out == {"vLLM": "vLLM is not installed here"}
    assert made.groups[0].measured.noise is None


def test_bfloat16_is_measured_against_float32_with_its_noise(model: Path) -> None:
    made = found_here(model, compute_dtype="bfloat16")
    made.require()
    noise = made.groups[0].measured.noise
    assert noise is not None
    assert 1e-7 < noise.cosine < 0.01
    assert noise.shared == 0, "plain inference shares nothing"
    for _, one in made.comparisons:
        assert one.bound is not None
        assert (one.bound.measure, one.bound.value) == ("cosine", max(COSINE, NOISES * noise.cosine))
        assert one.cosine > 1e-7, "against float32, not against itself"


def test_quantised_weights_are_held_to_their_own_and_shown_against_the_model(wide: Path) -> None:
    made = found_here(wide, quantization="nf4")
    made.require()
    measured = made.groups[0].measured
    assert (measured.reference, measured.held_to) == ("transformers float32, plain", "transformers float32 nf4, plain")
    assert measured.quantised is not None
    assert (measured.quantised.bound, measured.quantised.cosine > 1e-3) == (None, True)
    assert all(one.cosine < 1e-4 for _, one in made.comparisons)
    assert "alone" in measured.left_out["vLLM"]


def test_llm_int8_is_shown_without_a_bound_and_says_so(wide: Path) -> None:
    made = found_here(wide, quantization="llm.int8")
    made.require()
    assert all(one.bound is None and "outlier" in one.why_no_bound for _, one in made.comparisons)
    assert "none: LLM.int8 chooses outlier columns" in text.text(made)


def test_an_adapter_is_measured_with_and_without_it(model: Path, adapter: Path) -> None:
    made = found_here(model, adapter=str(adapter))
    made.require()
    assert [group.name for group in made.groups] == ["with the adapter", "without the adapter"]
    assert made.adapter_effect is not None
    assert made.adapter_effect.cosine > 0.01
    assert len(made.comparisons) == 2 * len(ORDERS)


def test_an_adapter_that_does_nothing_is_found(model: Path, idle_adapter: Path) -> None:
    made = found_here(model, adapter=str(idle_adapter))
    assert all(one.passed for _, one in made.comparisons)
    with pytest.raises(CheckFailed, match="changes no vector at all"):
        made.require()


def test_a_reference_in_bfloat16_is_for_models_that_compute_in_it(model: Path) -> None:
    with pytest.raises(ConfigError, match="reference_dtype: bfloat16 tells nothing of compute_dtype float32"):
        found_here(model, reference_dtype="bfloat16")
    made = found_here(model, reference_dtype="bfloat16", compute_dtype="bfloat16")
    made.require()
    assert (made.groups[0].measured.reference, made.groups[0].measured.noise) == ("transformers bfloat16, plain", None)


def test_rows_without_a_vector_one_by_one_are_named_and_not_compared(tmp_path: Path) -> None:
    """The built-in texts have the token whose embedding is damaged in some of their rows."""
    made = found_here(make_damaged_model(tmp_path / "model"), rows=100)
    lost = made.groups[0].measured.lost
    assert {made.sample.names[row] for row in lost} == {name for name in made.sample.names if "#" in name}
    assert all(one.rows == len(TEXTS) + 1 - len(lost) for _, one in made.comparisons)
    made.require()
    assert made.to_dict()["groups"][0]["lost"]


def test_a_model_without_a_single_vector_is_no_parity(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="gives no row a vector"):
        found_here(make_damaged_model(tmp_path / "model", token="This"))


# -- engines that differ are found -------------------------------------------------------------------


def suite_and_rows(model: Path, **settings: Any) -> tuple[Suite, EmbedderSpec, Any]:
    spec = settle(ParitySettings.make({"model": str(model), "backend": "hf"} | settings)).on(gpu=False)
    return Suite.of(spec, gpu=False), spec, sample.built_in(spec, "document", 12)


def measured_with(suite: Suite, spec: EmbedderSpec, rows: Any, *, seed: int = 0, **changes: Any) -> list[comparison.Comparison]:
    """The comparisons of a suite whose measured engine loads something else than the reference."""
    wrong = replace(suite, measured=tuple(replace(load, spec=replace(load.spec, **changes)) for load in suite.measured))
    return measure(wrong, lambda load: make(Work(load=load, rows=rows.prompts, role="document", seed=seed))).comparisons


def test_an_engine_with_other_weights_is_found(model: Path, tmp_path: Path) -> None:
    suite, spec, rows = suite_and_rows(model)
    other = settle(ParitySettings.make({"model": str(make_model(tmp_path / "other", seed=1))})).model
    made = measured_with(suite, spec, rows, model=other)
    assert not any(one.passed for one in made)
    assert min(one.cosine for one in made) > 0.1


def test_an_engine_that_ignores_its_adapter_is_found(model: Path, adapter: Path) -> None:
    suite, spec, rows = suite_and_rows(model, adapter=str(adapter))
    assert all(one.passed for one in measured_with(suite, spec, rows))
    assert not any(one.passed for one in measured_with(suite, spec, rows, adapter=None))


def test_an_engine_that_pools_otherwise_is_found(model: Path) -> None:
    suite, spec, rows = suite_and_rows(model)
    assert not any(one.passed for one in measured_with(suite, spec, rows, representation=replace(spec.representation, pooling="mean")))


def test_an_engine_whose_batches_mix_rows_up_is_found_in_batches_alone(model: Path) -> None:
    _, spec, rows = suite_and_rows(model)

    def run(work: Work) -> Passes:
        passes = make(work)
        if not work.load.plain:
            vectors = passes.by_order["batched"].vectors
            vectors[[3, 4]] = vectors[[4, 3]]
        return passes

    made = compared(spec, rows, "document", gpu=False, run=run, say=lambda line: None)
    assert [one.passed for _, one in made.comparisons] == [order != "batched" for order in ORDERS]
    with pytest.raises(CheckFailed, match=r"transformers float32, batched: the largest difference is .* the bound 1e-05 \(float32 on the CPU\), furthest at '"):
        made.require()


def test_a_backend_that_is_not_configured_may_fail_and_the_one_configured_may_not(model: Path) -> None:
    suite, spec, rows = suite_and_rows(model)

    def run(load: Load) -> Passes:
        if load.spec.backend == "vllm":
            raise ModelError("vLLM has no kernel for it")
        return make(Work(load=load, rows=rows.prompts, role="document", seed=0))

    both = replace(suite, measured=(*suite.measured[:1], Load(spec=replace(spec, backend="vllm"))), left_out={})
    assert measure(both, run).left_out == {"vLLM": "vLLM has no kernel for it"}
    with pytest.raises(ModelError, match="no kernel"):
        measure(replace(both, configured="vllm"), run)


# -- processes ---------------------------------------------------------------------------------------


def test_an_engine_in_a_process_of_its_own_gives_what_it_gives_here(model: Path) -> None:
    suite, _, rows = suite_and_rows(model)
    assert suite.reference is not None
    work = Work(load=suite.reference, rows=rows.prompts, role="document", seed=0)
    here, there = make(work), in_own_process(work)
    np.testing.assert_allclose(here.by_order["one by one"].vectors, there.by_order["one by one"].vectors, atol=1e-6)
    assert there.device == "cpu"


def test_an_error_in_the_other_process_is_raised_as_what_it_was(model: Path, tmp_path: Path) -> None:
    _, spec, rows = suite_and_rows(model)
    gone = Load(spec=replace(spec, model=replace(spec.model, name=str(tmp_path / "gone"))))
    with pytest.raises(ModelError, match=r"gone does not exist on this node"):
        in_own_process(Work(load=gone, rows=rows.prompts, role="document", seed=0))


def test_a_process_that_dies_is_named_with_its_last_words(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    suite, _, rows = suite_and_rows(model)
    monkeypatch.setattr(processes, "SCRIPT", "import os; os.write(2, b'no more memory\\n'); os.kill(os.getpid(), 9)")
    with pytest.raises(EngineDied, match=r"transformers float32: the process that held it was ended by SIGKILL \(out of memory.*\): no more memory"):
        in_own_process(Work(load=suite.measured[0], rows=rows.prompts, role="document", seed=0))


# -- the command -------------------------------------------------------------------------------------


def test_the_command_prints_a_table_and_ends_with_0(model: Path, corpus: Path, llmemb: Any) -> None:
    shown = llmemb("parity", corpus, "--model", model, "--sample", 5, "--backend", "hf")
    assert shown.code == 0, shown.err
    lines = shown.out.splitlines()
    assert lines[0].startswith("5 prompts of the corpus")
    assert [line.split(",")[0] for line in lines if line.endswith("  ok")][:4] == ["transformers float32"] * 4
    assert f"agreement@{NEIGHBOURS}" in shown.out
    assert "torch " in lines[-1]
    assert "transformers float32, plain: 5 rows, one by one" in shown.err


def test_the_command_ends_with_3_beyond_the_bounds(model: Path, idle_adapter: Path, llmemb: Any) -> None:
    shown = llmemb("parity", "--model", model, "--adapter", idle_adapter, "--sample", 4, "--backend", "hf", "--json")
    assert shown.code == 3
    data = json.loads(shown.out)
    assert (data["passed"], data["rows"], [group["name"] for group in data["groups"]]) == (False, 4, ["with the adapter", "without the adapter"])
    assert data["adapter_effect"]["difference"] == 0
    assert "changes no vector at all" in shown.err


def test_settings_of_a_corpus_without_one_are_refused(model: Path, llmemb: Any) -> None:
    shown = llmemb("parity", "--model", model, "--text-column", "body")
    assert (shown.code, "do nothing without INPUT" in shown.err) == (2, True)


# -- before a job ------------------------------------------------------------------------------------


def test_a_job_keeps_the_comparison_and_goes_on(model: Path, corpus: Path, tmp_path: Path) -> None:
    receipt = embed(corpus, tmp_path / "out", model, check_parity=6)
    assert receipt.rows_embedded == 118
    record = tmp_path / "out" / PATH
    data = json.loads(record.read_text())
    assert (data["passed"], data["rows"], data["engine"]["compute_dtype"]) == (True, 6, "float32")
    assert data["space"] == opened(tmp_path / "out").plan.space_digest
    assert not any(sentence in record.read_text() for sentence in SENTENCES if len(sentence) > 10), "no texts of the corpus are kept"
    record.unlink()
    assert embed(corpus, tmp_path / "out", model, check_parity=6).rows_embedded == 118
    assert not record.exists(), "of a finished run nothing is compared again"


def test_a_job_beyond_the_bounds_stops_before_its_first_unit(model: Path, idle_adapter: Path, corpus: Path, tmp_path: Path, llmemb: Any) -> None:
    arguments = ("embed", corpus, tmp_path / "out", "--model", model, "--adapter", idle_adapter, "--actors", 0)
    shown = llmemb(*arguments, "--check-parity", 4)
    assert shown.code == 3
    assert "changes no vector at all" in shown.err
    assert "parity: 1 findings" in shown.err
    assert not (tmp_path / "out" / "data").exists()
    assert json.loads((tmp_path / "out" / PATH).read_text())["passed"] is False
    assert llmemb(*arguments).code == 0, "without the check the same job goes on"
    assert llmemb(*arguments, "--overwrite").code == 0
    assert not (tmp_path / "out" / PATH).exists(), "it was of the run that is overwritten"


@pytest.mark.usefixtures("ray_with_fake_gpus")
def test_a_job_with_actors_compares_on_the_cluster(model: Path, corpus: Path, tmp_path: Path, llmemb: Any) -> None:
    shown = llmemb("embed", corpus, tmp_path / "out", "--model", model, "--actors", 1, "--backend", "hf", "--check-parity", 4)
    assert shown.code == 0, shown.err
    assert "parity: within bounds: transformers bfloat16 on 4 prompts of the corpus" in shown.err
    assert json.loads((tmp_path / "out" / PATH).read_text())["groups"][0]["noise"]["cosine"] > 0


# -- vLLM --------------------------------------------------------------------------------------------

DEMONSTRATED: dict[str, Any] = {"prompt": "prompteol-icl", "demo": ["A jockey riding a horse.=>Equestrian"]}
"""A shared prefix of more than a block of vLLM's cache."""


@pytest.mark.vllm
def test_vllm_is_within_the_bounds_with_an_adapter_and_without(wide: Path, tmp_path: Path, llmemb: Any) -> None:
    adapter = make_adapter(wide, tmp_path / "adapter")
    made = parity(ParitySettings.make({"model": str(wide), "adapter": str(adapter), **DEMONSTRATED}))
    made.require()
    assert made.engine["backend"] == "vllm"
    of_vllm = {(group, one.name): one for group, one in made.comparisons if one.name.startswith("vLLM")}
    assert len(of_vllm) == 2 * len(ORDERS)
    for group in ("with the adapter", "without the adapter"):
        first, batched, repeated = (of_vllm[group, f"vLLM float32, {order}"].shared for order in ("one by one", "batched", "repeated"))
        assert 0 < batched <= first < repeated, "only what is repeated finds the rows' own beginnings"
    assert all(group.measured.left_out == {} for group in made.groups)


@pytest.mark.vllm
def test_vllm_in_bfloat16_is_held_to_float32(wide: Path) -> None:
    made = parity(ParitySettings.make({"model": str(wide), "compute_dtype": "bfloat16", "backend": "vllm"}))
    made.require()
    assert {one.name.split(",")[0] for _, one in made.comparisons} == {"transformers bfloat16", "vLLM bfloat16"}
    assert all(one.cosine > 1e-7 for _, one in made.comparisons)


@pytest.mark.vllm
def test_vllm_with_other_weights_is_found(wide: Path, tmp_path: Path) -> None:
    spec = settle(ParitySettings.make({"model": str(wide)})).on(gpu=False)
    other = settle(ParitySettings.make({"model": str(make_model(tmp_path / "other", seed=1, **WIDE))})).model

    def run(work: Work) -> Passes:
        swapped = replace(work.load, spec=replace(work.load.spec, model=other)) if work.load.spec.backend == "vllm" else work.load
        return in_own_process(replace(work, load=swapped))

    made = compared(spec, sample.built_in(spec, "document", 8), "document", gpu=False, run=run, say=lambda line: None)
    assert [one.passed for _, one in made.comparisons] == [one.name.startswith("transformers") for _, one in made.comparisons]
    with pytest.raises(CheckFailed, match="vLLM float32, one by one"):
        made.require()


@pytest.mark.vllm
def test_weights_that_vllm_quantises_are_held_to_vllm_one_by_one(wide: Path) -> None:
    made = parity(ParitySettings.make({"model": str(wide), "quantization": "int8_per_channel_weight_only", "sample": 12}))
    made.require()
    measured = made.groups[0].measured
    assert (measured.reference, measured.held_to) == ("transformers float32, plain", "vLLM bfloat16 int8_per_channel_weight_only")
    assert [one.name.split(", ")[1] for one in measured.comparisons] == ["batched", "shuffled", "repeated"]
    assert measured.quantised is not None
    assert measured.quantised.cosine > 1e-7


@pytest.mark.vllm
def test_a_model_that_vllm_cannot_load_is_left_out_with_the_reason(model: Path) -> None:
    """Attention heads of eight dimensions."""
    made = parity(ParitySettings.make({"model": str(model), "sample": 4}))
    made.require()
    assert made.engine["backend"] == "hf"
    assert "attention heads have 8 dimensions" in made.groups[0].measured.left_out["vLLM"]


@pytest.mark.vllm
def test_a_job_with_actors_of_vllm_compares_on_the_cluster(wide: Path, corpus: Path, tmp_path: Path, llmemb: Any) -> None:
    shown = llmemb("embed", corpus, tmp_path / "out", "--model", wide, "--actors", 1, "--cpus-per-actor", 1, "--check-parity", 4)
    assert shown.code == 0, shown.err
    assert "parity: within bounds: transformers float32 and vLLM float32 on 4 prompts of the corpus" in shown.err
