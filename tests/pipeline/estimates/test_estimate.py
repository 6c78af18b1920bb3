"""The estimate against the run that follows it, against independent counts, and against torch's own count of operations."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from llmemb_ray.config import PlanSettings
from llmemb_ray.errors import ConfigError, InputError, OutputError
from llmemb_ray.pipeline.estimates import costs
from llmemb_ray.pipeline.estimates import text as estimate_text
from llmemb_ray.pipeline.estimates.estimate import PATH, Estimate, preview
from llmemb_ray.storage import Storage
from tests.small_jobs import embed, write
from tests.small_models import SENTENCES, config_of, make_model, tokenizer_of

LONG_PROMPT = "Read the sentence below with care and say in a single word what it is mostly about. {text} The word is"


def settings_of(corpus: Path, model: Path, **settings: Any) -> PlanSettings:
    return PlanSettings.make({"input": [str(corpus)], "output": str(corpus.parent / "out"), "model": str(model), "actors": "0"} | settings)


def texts_of(rows: int, *, words: int = 40) -> list[str]:
    """Texts of all lengths up to ``words`` words, the same each time."""
    generator = np.random.default_rng(rows)
    vocabulary = " ".join(SENTENCES).split()
    return [" ".join(generator.choice(vocabulary, generator.integers(1, words))) for _ in range(rows)]


def bare(model: Path, to: Path) -> Path:
    """A model's directory without its weights."""
    to.mkdir()
    for path in model.iterdir():
        if path.suffix == ".json":
            (to / path.name).write_bytes(path.read_bytes())
    return to


# -- against the run ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"dtype": "float16", "dimensions": 8, "rows_per_unit": 7},
        {"limit_rows": 50, "pooling": "mean", "keep_columns": ["text"]},
        {"max_tokens": 24},
        {"chunk_tokens": 8, "chunk_overlap": 2},
        {"chunk_tokens": 8, "chunk_pool": "mean"},
        {"filter": "id LIKE '%1'"},
    ],
    ids=str,
)
def test_where_the_sample_is_the_corpus_the_estimate_is_the_receipt(model: Path, corpus: Path, settings: dict[str, Any]) -> None:
    seen = preview(settings_of(corpus, model, **settings))
    receipt = embed(corpus, corpus.parent / "out", model, **settings)
    names = ("run_key", "space", "units", "rows_read", "rows_embedded", "rows_rejected", "rows_filtered", "vectors", "truncated", "tokens", "tokens_shared")
    for name in (*names, "tokens_computed", "dimension", "dtype"):
        assert getattr(seen, name) == getattr(receipt, name), name
    assert (seen.sample_rejects, seen.tokens_margin) == (receipt.rejects_by_reason, 0)
    assert (seen.files, seen.id_column) == (3, "id")
    assert seen.bytes == sum(path.stat().st_size for path in corpus.iterdir())


@pytest.mark.parametrize("dtype", ["float32", "float16", "int8", "ubinary"])
def test_output_sizes_are_those_of_the_shards(tmp_path: Path, model: Path, dtype: str) -> None:
    texts = texts_of(3000, words=4)
    corpus = write(tmp_path / "in" / "a.parquet", texts, id=[f"https://example.org/pages/{row}" for row in range(3000)], row_group_size=700).parent
    settings = {"dtype": dtype, "keep_columns": ["text"], "rows_per_unit": 1500}
    seen = preview(settings_of(corpus, model, **settings))
    receipt = embed(corpus, tmp_path / "run", model, **settings)
    assert seen.shard_bytes == pytest.approx(receipt.shard_bytes, rel=0.1)
    assert seen.shard_bytes_by[dtype] == seen.shard_bytes
    assert seen.shard_bytes_by.keys() == {"float32", "float16", "int8", "ubinary"}


def test_a_sample_tells_the_tokens_of_the_corpus_within_its_margin(tmp_path: Path, model: Path) -> None:
    inside, cut, truth = 0, [], []
    for number in range(5):
        generator = np.random.default_rng(number)
        for file in range(8):  # files differ in the length of their texts, as crawls do
            words = int(generator.integers(3, 60))
            write(tmp_path / f"in-{number}" / f"{file}.parquet", texts_of(1000 + 10 * number + file, words=words), row_group_size=100)
        corpus = tmp_path / f"in-{number}"
        seen = preview(settings_of(corpus, model, sample_rows=640, max_tokens=64))
        whole = preview(settings_of(corpus, model, sample_rows=10**6, max_tokens=64))
        assert (seen.sample_rows < 1000, whole.sample_rows, seen.rows) == (True, whole.rows, whole.rows)
        assert 0 < seen.tokens_margin < 0.4 * whole.tokens
        inside += abs(seen.tokens - whole.tokens) <= seen.tokens_margin
        cut.append(seen.truncated / seen.rows)
        truth.append(whole.truncated / whole.rows)
    assert inside >= 4, "two standard errors hold the truth about nineteen times in twenty"
    assert np.mean(cut) == pytest.approx(np.mean(truth), abs=0.05)


# -- against independent counts ----------------------------------------------------------------------


def test_tokens_before_and_after_the_template_and_the_cut(tmp_path: Path, model: Path) -> None:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(model)
    texts = [*SENTENCES, *texts_of(200)]
    seen = preview(settings_of(write(tmp_path / "in" / "a.parquet", texts).parent, model, prompt=LONG_PROMPT, max_tokens=100))
    alone = np.array([len(tokenizer(text, add_special_tokens=False).input_ids) for text in texts])
    prompts = [tokenizer(LONG_PROMPT.replace("{text}", text)).input_ids for text in texts]
    lengths = np.array([len(ids) for ids in prompts])
    for spread, counts in ((seen.text_tokens, alone), (seen.uncut_tokens, lengths)):
        ordered = np.sort(counts)
        assert spread.mean == pytest.approx(counts.mean(), abs=0.01)
        assert (spread.p50, spread.p99, spread.maximum) == (ordered[len(texts) // 2 - 1], ordered[-(len(texts) // 100) - 1], ordered[-1])
    assert seen.truncated == seen.sample_truncated == int((lengths > 100).sum()) > 0
    assert seen.prompt_tokens.maximum == 100
    assert seen.tokens == pytest.approx(np.minimum(lengths, 100).sum(), rel=0.001), "a cut can end a token or two early, at a word"
    assert seen.template_tokens == len(tokenizer(LONG_PROMPT.replace("{text}", "")).input_ids)


@pytest.mark.parametrize("pooling", ["last", "mean"])
def test_a_shared_prefix_saves_whole_blocks_on_vllm_and_each_token_on_transformers(tmp_path: Path, model: Path, pooling: str) -> None:
    from transformers import AutoTokenizer

    texts = [text for text in texts_of(60) if text[0].isascii() and text[0].isalpha()]
    prompts = [AutoTokenizer.from_pretrained(model)(LONG_PROMPT.replace("{text}", text)).input_ids for text in texts]
    common = 0
    while len({ids[common] for ids in prompts}) == 1:
        common += 1
    assert common > 32, "two blocks and some"
    assert common % 16
    seen = preview(settings_of(write(tmp_path / "in" / "a.parquet", texts).parent, model, prompt=LONG_PROMPT, pooling=pooling))
    assert seen.shared_prefix_tokens == common
    blocks = len(texts) * (common // 16) * 16 if pooling == "last" else 0
    assert seen.tokens_shared_by == {"hf": len(texts) * common, "vllm": blocks}
    assert (seen.tokens_shared, seen.tokens_computed) == (len(texts) * common, seen.tokens - len(texts) * common)


def test_a_template_too_short_for_a_block_is_told(model: Path, corpus: Path) -> None:
    seen = preview(settings_of(corpus, model))
    assert 4 <= seen.shared_prefix_tokens < 16
    assert seen.tokens_shared_by["vllm"] == 0
    assert any("fills no block of 32" in note for note in seen.notes)
    on_gpu = preview(settings_of(corpus, model, actors="auto"))
    assert any("fills no block of 16" in note for note in on_gpu.notes)


def test_an_estimate_kept_by_an_earlier_version_is_still_read(model: Path, corpus: Path) -> None:
    made = preview(settings_of(corpus, model))
    earlier = {name: value for name, value in made.to_dict().items() if name != "backend_why"}
    assert Estimate.from_dict(earlier) == replace(made, backend_why="")


def test_a_model_too_large_for_a_gpu_is_told_to_be_split_on_vllm(model: Path, corpus: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The weights are large on paper alone."""
    monkeypatch.setattr(costs, "weight_bytes", lambda *_: 132e9)
    alone = preview(settings_of(corpus, model, actors="auto", backend="vllm"))
    assert any(note.startswith("H100: the weights need 3 GPUs an actor: set --tensor-parallel 3") for note in alone.notes)
    split = preview(settings_of(corpus, model, actors="auto", backend="vllm", tensor_parallel=4))
    assert {line.gpu: line.gpus_per_actor for line in split.hours}["H100"] == 4
    assert not any(note.startswith("H100") for note in split.notes)


def test_an_architecture_that_runs_padded_shares_nothing_and_is_told(tmp_path: Path, corpus: Path) -> None:
    seen = preview(settings_of(corpus, make_model(tmp_path / "bloom", "bloom")))
    assert (seen.tokens_shared, seen.tokens_computed) == (0, seen.tokens)
    assert any("runs bloom as padded batches" in note for note in seen.notes)


@pytest.mark.parametrize("kind", ["llama", "opt", "gpt2", "qwen3", "gemma", "phi"])
def test_operations_are_those_that_torch_counts(tmp_path: Path, kind: str) -> None:
    import torch
    from torch.utils.flop_counter import FlopCounterMode
    from transformers import AutoModel, AutoTokenizer

    model = make_model(tmp_path / "model", kind)
    texts = texts_of(12, words=25)
    seen = preview(settings_of(write(tmp_path / "in" / "a.parquet", texts).parent, model, prompt="none"))
    assert seen.tokens_shared == 0
    tokenizer, loaded = AutoTokenizer.from_pretrained(model), AutoModel.from_pretrained(model, attn_implementation="eager").eval()
    products, attention = 0.0, 0.0
    for text in texts:
        ids = torch.tensor([tokenizer(text).input_ids])
        with torch.inference_mode(), FlopCounterMode(display=False) as counter:
            loaded(input_ids=ids, use_cache=False)
        counts = {str(name): count for name, count in counter.get_flop_counts()["Global"].items()}
        batched = sum(count for name, count in counts.items() if "bmm" in name)
        # The angles of rotary positions are a product too, of each position with half a head's frequencies.
        rotary = 2 * ids.shape[1] * (getattr(loaded.config, "head_dim", None) or 8) // 2 if kind not in ("opt", "gpt2") else 0
        products += sum(counts.values()) - batched
        attention += (batched - rotary) * (ids.shape[1] + 1) / (2 * ids.shape[1])  # It counts the square, of which causal attention needs half.
    assert seen.flops - seen.flops_attention == pytest.approx(products, rel=0.02)
    assert seen.flops_attention == pytest.approx(attention, rel=0.02)


def test_a_sliding_window_and_a_shared_prefix_bound_attention() -> None:
    config = config_of("gemma3_text")  # one sliding layer of 16, one full; 4 heads of 16
    lengths, shared = np.array([40, 10]), np.array([6, 0])
    keys = sum(position + min(position, 16) for length, first in zip(lengths, shared, strict=True) for position in range(first + 1, length + 1))
    assert costs.attention_flops(config, lengths, shared) == 4 * 4 * 16 * keys


# -- hours and cost ----------------------------------------------------------------------------------


def described(directory: Path, **changes: Any) -> Path:
    """The configuration and tokenizer of a model that nobody could load here."""
    tokenizer = tokenizer_of()
    tokenizer.save_pretrained(directory)
    config_of("llama", len(tokenizer), **changes).save_pretrained(directory)
    return directory


SEVENTY = {"hidden_size": 8192, "intermediate_size": 28672, "num_hidden_layers": 80, "num_attention_heads": 64, "num_key_value_heads": 8}
"""Llama 2 70B: 68.5 B parameters in its layers, 137 GB in bfloat16."""


def test_a_model_larger_than_a_gpu_takes_several_which_are_all_paid(tmp_path: Path, corpus: Path) -> None:
    seen = preview(settings_of(corpus, described(tmp_path / "70b", **SEVENTY)))
    assert seen.parameters == pytest.approx(68.5e9, rel=0.005)
    assert seen.weight_bytes == pytest.approx(137e9, rel=0.005)
    lines = {line.gpu: line for line in seen.hours}
    assert {name: line.gpus_per_actor for name, line in lines.items()} == {"L4": 8, "A10G": 8, "A100": 3, "H100": 3, "H200": 2, "B200": 1}
    assert seen.flops == pytest.approx(2 * 68.5e9 * seen.tokens_computed, rel=0.01)
    hours = (3 * seen.flops / 989e12 / 0.6 / 3600, 3 * seen.flops / 989e12 / 0.3 / 3600)
    assert lines["H100"].gpu_hours == pytest.approx(hours)
    assert lines["H100"].cost == pytest.approx(tuple(6.88 * hour for hour in hours))
    assert lines["H100"].tokens_per_s == pytest.approx(tuple(seen.tokens / hour / 3600 for hour in reversed(hours)))
    four_bit = preview(settings_of(corpus, tmp_path / "70b", quantization="nf4", gpu="a100", gpus_per_actor=1, actors="1"))
    assert [line.gpus_per_actor for line in four_bit.hours] == [1]
    assert any("nf4 is slower" in note for note in four_bit.notes)
    tight = preview(settings_of(corpus, tmp_path / "70b", gpu="H100", gpus_per_actor=2, actors="1"))
    assert any("need 3 GPUs an actor, more than gpus_per_actor=2" in note for note in tight.notes)


def test_a_throughput_and_a_price_given_win_over_the_table(model: Path, corpus: Path) -> None:
    (line,) = preview(settings_of(corpus, model, throughput=100, price=3.6, actors="2", rows_per_unit=10)).hours
    tokens = preview(settings_of(corpus, model)).tokens
    assert line.gpu_hours == pytest.approx((tokens / 100 / 3600,) * 2)
    assert line.cost == pytest.approx((tokens / 100 / 1000,) * 2)
    assert line.tokens_per_s == pytest.approx((100, 100))
    (line,) = preview(settings_of(corpus, model, throughput=100)).hours
    assert (line.price, line.cost) == (None, None)
    (named,) = preview(settings_of(corpus, model, gpu="l4", utilization="0.5")).hours
    assert (named.gpu, named.price, named.currency, named.gpu_hours[0]) == ("L4", 0.8, "USD", named.gpu_hours[1])
    (priced,) = preview(settings_of(corpus, model, gpu="L4", utilization="0.5", price=8)).hours
    assert priced.currency is None
    assert priced.cost == pytest.approx(tuple(8 * hour for hour in named.gpu_hours))


def test_a_price_of_no_gpu_is_asked_about(model: Path, corpus: Path) -> None:
    seen = preview(settings_of(corpus, model, price=2))
    assert any("price=2 is of which GPU?" in note for note in seen.notes)
    assert {line.price for line in seen.hours} != {2}
    without = preview(settings_of(corpus, model, gpus_per_actor=0, actors="2"))
    assert without.hours == []
    assert any("give --throughput" in note for note in without.notes)


def test_every_assumption_that_a_figure_rests_on_is_named(model: Path, corpus: Path) -> None:
    seen = preview(settings_of(corpus, model, gpu="H100", dedup="exact"))
    told = "\n".join(seen.assumptions)
    for words in ("30% to 60%", "989 TFLOP/s", "80 GB", "2026-09", "p5.48xlarge", "one after the other", "dedup", "as a new run", "are not counted"):
        assert words in told
    assert "30% to 60%" not in "\n".join(preview(settings_of(corpus, model, throughput=5)).assumptions)


def test_binary_vectors_and_rejects_are_warned_about(tmp_path: Path, model: Path) -> None:
    corpus = write(tmp_path / "in" / "a.parquet", ["x", None] * 30).parent
    seen = preview(settings_of(corpus, model, dtype="ubinary"))
    assert any("--centre" in note and "int8" in note for note in seen.notes)
    assert not any("(--centre)" in note for note in preview(settings_of(corpus, model, dtype="ubinary", centre=True)).notes)
    assert any("50.0% of the rows would be rejected" in note for note in seen.notes)


# -- what it touches, and what it refuses --------------------------------------------------------------


def test_a_plan_needs_no_weights_starts_no_ray_and_touches_no_output(tmp_path: Path, model: Path, corpus: Path) -> None:
    output = corpus.parent / "out"
    embed(corpus, output, model)
    before = {entry.path: entry.version for entry in Storage(str(output)).list()}
    script = "import sys; from llmemb_ray.cli import main; code = main(sys.argv[1:]); print(code, 'ray' in sys.modules, file=sys.stderr)"
    arguments = ["plan", str(corpus), str(output), "--model", str(bare(model, tmp_path / "bare")), "--json", "--prompt", "e5", "--instruction", "Find it"]
    done = subprocess.run([sys.executable, "-c", script, *arguments], capture_output=True, text=True, check=True)
    assert done.stderr.splitlines()[-1] == "0 False"
    seen = Estimate.from_dict(json.loads(done.stdout))
    assert seen.template == "Instruct: Find it\nQuery: {text}"
    assert {entry.path: entry.version for entry in Storage(str(output)).list()} == before


def test_an_estimate_is_kept_beside_the_plan(tmp_path: Path, model: Path, corpus: Path) -> None:
    storage = Storage(str(tmp_path / "kept"))
    assert Estimate.load(storage) is None
    seen = preview(settings_of(corpus, model))
    seen.save(storage)
    assert Estimate.load(storage) == seen == Estimate.from_dict(json.loads(json.dumps(seen.to_dict())))
    for damaged in (b"{", b"[]", b'{"rows": 3}'):
        storage.put(PATH, damaged)
        with pytest.raises(OutputError, match="estimate"):
            Estimate.load(storage)


def test_the_text_shows_the_figures(model: Path, corpus: Path) -> None:
    seen = preview(settings_of(corpus, model, actors="3"))
    shown = estimate_text.text(seen)
    for words in (
        "files    3",
        "rows     120",
        f"{seen.tokens:,} tokens in {seen.prompts:,} prompts",
        "2 (1 empty, 1 null in the sample)",
        "with 3 actors",
        *(line.gpu or "" for line in seen.hours),
    ):
        assert words in shown
    assert max(len(line) for line in shown.splitlines()) <= 132
    assert all(item.split()[0] in shown for item in [*seen.notes, *seen.assumptions])


@pytest.mark.parametrize(
    ("values", "shown"),
    [((0.0, 0.0), "0"), ((0.001, 0.002), "<0.01"), ((0.521, 1.044), "0.52 - 1.04"), ((12.34, 56.78), "12.3 - 56.8"), ((1234.5, 99999.0), "1,234 - 99,999")],
)
def test_ranges_have_the_digits_that_matter(values: tuple[float, float], shown: str) -> None:
    assert estimate_text.between(values) == shown


def test_the_plan_refuses_what_the_run_would_refuse(tmp_path: Path, model: Path, corpus: Path) -> None:
    write(tmp_path / "in" / "a.parquet", ["x"])
    (tmp_path / "in" / "b.parquet").write_bytes(b"broken")
    with pytest.raises(InputError, match=r"b\.parquet"):
        preview(settings_of(tmp_path / "in", model))
    seen = preview(settings_of(tmp_path / "in", model, skip_bad_files=True))
    assert (seen.bad_files, any("1 files cannot be read" in note for note in seen.notes)) == (1, True)
    with pytest.raises(InputError, match=r"nowhere\.parquet; check the path"):
        preview(settings_of(tmp_path / "nowhere.parquet", model))
    with pytest.raises(ConfigError, match="H100, H200, B200"):
        preview(settings_of(corpus, model, gpu="RTX 9090"))
    for wrong in ("0", "0.6:0.3", "1.2", "half", "0.2:2"):
        with pytest.raises(ConfigError, match="utilization"):
            settings_of(corpus, model, utilization=wrong)


def test_a_corpus_without_a_usable_row_is_told_not_divided_by(tmp_path: Path, model: Path) -> None:
    seen = preview(settings_of(write(tmp_path / "in" / "a.parquet", [None, " "] * 20).parent, model))
    assert (seen.rows_rejected, seen.tokens, seen.vectors, seen.shard_bytes) == (40, 0, 0, 0)
    assert any("no row of the sample can be embedded" in note for note in seen.notes)
    assert estimate_text.text(seen)
