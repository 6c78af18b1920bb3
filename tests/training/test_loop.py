"""The loop on prepared batches, in this process: what it trains, that it goes on exactly, and what it refuses."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from llmemb_ray.config import FinetuneSettings
from llmemb_ray.embedders.embedder import Embedder, settle
from llmemb_ray.errors import ConfigError, InputError, RunFailed
from llmemb_ray.storage import Storage
from llmemb_ray.training import batches as prepared
from llmemb_ray.training.batches import Batches
from llmemb_ray.training.checkpoints import Checkpoints
from llmemb_ray.training.judging import HeldOut
from llmemb_ray.training.loop import Loop
from llmemb_ray.training.prompting import Prompting, under
from llmemb_ray.training.schedule import learning_rate
from tests.small_models import SENTENCES, make_damaged_model, make_model, tokenizer_of

STEPS, ROWS = 6, 4


def rows_of(step: int, **more: Any) -> list[dict[str, Any]]:
    """Sentences as anchors, their first words as positives and other sentences as negatives, the same for a step wherever it is made."""
    chosen = np.random.default_rng(step).permutation(len(SENTENCES))[: 2 * ROWS]
    sentences = [SENTENCES[number] for number in chosen]
    return [
        {
            "task": "t",
            "instruction": None,
            "symmetric": False,
            "anchor": sentences[row],
            "positive": " ".join(sentences[row].split()[:3]) or "a",
            "negatives": [sentences[ROWS + row]],
            "source": f"rows.csv row {step * ROWS + row}",
            **more,
        }
        for row in range(ROWS)
    ]


def write_batches(out: Path, steps: list[list[dict[str, Any]]]) -> Batches:
    """Batches in the form that prepare writes, without Ray."""
    buffer = io.BytesIO()
    with pq.ParquetWriter(buffer, prepared.SCHEMA) as writer:
        for rows in steps:
            writer.write_table(pa.Table.from_pylist(rows, schema=prepared.SCHEMA))
    storage = Storage(str(out))
    storage.put(prepared.SHARD.format(0), buffer.getvalue())
    record = {"steps": len(steps), "epochs": 1, "batch_size": ROWS, "shards": [0], "heldout_pieces": 0}
    storage.put(prepared.RECORD, json.dumps(record).encode())
    return Batches.open(storage)


def settings_of(model: Path, **more: Any) -> FinetuneSettings:
    values = {"model": str(model), "train": ["rows.csv"], "out": "out", "batch_size": ROWS, "learning_rate": 1e-2, "log_steps": 2, "checkpoint_steps": 3}
    lora = {} if more.get("method") == "full" else {"lora_dropout": 0.1, "lora_rank": 4}
    return FinetuneSettings.make(values | lora | more)


def loop_of(model: Path, out: Path, steps: int = STEPS, **more: Any) -> Loop:
    settings = settings_of(model, **more)
    made = write_batches(out, [rows_of(step) for step in range(steps)])
    return Loop(settings, settle(settings.model_settings()), made, Checkpoints(Storage(str(out))), device=torch.device("cpu"))


def test_a_training_that_was_stopped_ends_with_the_weights_of_one_that_was_not(model: Path, tmp_path: Path) -> None:
    """With dropout; the second one is stopped after a step that no checkpoint has."""
    whole = loop_of(model, tmp_path / "whole")
    whole.run()
    stopped = loop_of(model, tmp_path / "stopped")
    true = stopped._after_step

    def until_the_fifth(task: str) -> None:
        true(task)
        if stopped.standing.step == 5:
            raise KeyboardInterrupt

    stopped._after_step = until_the_fifth  # type: ignore[method-assign]
    with pytest.raises(KeyboardInterrupt):
        stopped.run()
    again = loop_of(model, tmp_path / "stopped")
    standing = again.run()
    assert standing.step == STEPS
    ours, theirs = again.model.state(), whole.model.state()
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    assert [row["step"] for row in standing.rows] == [2, 3, 4, 6], "before each checkpoint too"
    assert [row["tokens"] for row in standing.rows] == [row["tokens"] for row in whole.standing.rows]
    assert [row["loss"] for row in standing.rows] == [row["loss"] for row in whole.standing.rows]
    untrained = loop_of(model, tmp_path / "new").model.state()
    assert not any(torch.equal(theirs[name], value) for name, value in untrained.items() if "lora_B" in name)


def test_micro_batches_change_nothing_but_memory(model: Path, tmp_path: Path) -> None:
    """The gradients of a step in one pass and in pieces of five texts, all weights trained; losses in double precision are in test_loss.py."""
    gradients = []
    for size in (100, 5):
        loop = loop_of(model, tmp_path / str(size), micro_batch=size, method="full")
        loop.model.eval()
        loop._backward(*loop._read(0))
        gradients.append({name: weight.grad for name, weight in loop.model.trainable()})
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], gradient, atol=1e-5, rtol=1e-4)
    assert max(float(gradient.abs().max()) for gradient in gradients[0].values() if gradient is not None) > 1e-2


def test_what_was_trained_embeds_as_it_did_in_the_loop(model: Path, tmp_path: Path) -> None:
    loop = loop_of(model, tmp_path / "out")
    loop.run()
    loop.model.save(tmp_path / "adapter")
    prompting = Prompting(loop.spec)
    with torch.no_grad():
        inside = torch.nn.functional.normalize(loop.model.eval().encode(prompting.tokens(prompting.prompter("document"), SENTENCES)), dim=1)
    outside = Embedder.load(str(model), adapter=str(tmp_path / "adapter")).encode(SENTENCES)
    np.testing.assert_allclose(inside.numpy(), outside, atol=1e-5)
    assert np.abs(outside - Embedder.load(str(model)).encode(SENTENCES)).max() > 1e-3


def test_vectors_that_are_no_numbers_stop_it_and_name_the_row(tmp_path: Path) -> None:
    broken = make_damaged_model(tmp_path / "model")
    settings = settings_of(broken)
    steps = [rows_of(0), rows_of(1)]
    steps[1][2]["negatives"] = ["# " + SENTENCES[0]]
    loop = Loop(settings, settle(settings.model_settings()), write_batches(tmp_path, steps), Checkpoints(Storage(str(tmp_path))), device=torch.device("cpu"))
    with pytest.raises(RunFailed, match=r"step 2: 1 vectors of 1 rows are not finite \(rows\.csv row 6\)"):
        loop.run()


def test_a_text_without_tokens_is_named(tmp_path: Path) -> None:
    bare = make_model(tmp_path / "model", tokenizer=tokenizer_of(bos=None))
    settings = settings_of(bare, prompt="none")
    made = write_batches(tmp_path, [[row | {"anchor": ""} for row in rows_of(0)]])
    loop = Loop(settings, settle(settings.model_settings()), made, Checkpoints(Storage(str(tmp_path))), device=torch.device("cpu"))
    with pytest.raises(InputError, match=r"rows\.csv row 0: '' cannot be embedded"):
        loop.run()


def test_distillation_moves_vectors_to_the_teachers(model: Path, tmp_path: Path) -> None:
    """Vectors of the anchors alone, no positives; the loss falls on the rows it sees again and again."""
    generator = np.random.default_rng(0)
    teacher = {text: generator.normal(size=8).astype(np.float32).tolist() for text in SENTENCES}
    rows = [row | {"positive": None, "negatives": [], "teacher": teacher[row["anchor"]]} for row in rows_of(0)]
    settings = settings_of(model, method="full", distill="vectors", learning_rate=3e-3, log_steps=1)
    loop = Loop(
        settings, settle(settings.model_settings()), write_batches(tmp_path, [rows] * 30), Checkpoints(Storage(str(tmp_path))), device=torch.device("cpu")
    )
    losses = [row["distillation"] for row in loop.run().rows]
    assert losses[-1] < losses[0] / 3


def test_the_best_checkpoint_is_taken_and_patience_ends_it(model: Path, tmp_path: Path) -> None:
    """A judge whose scores are given: the figure of step 2 is the best."""

    class Given:
        name = "given"
        scores = iter([10.0, 5.0, 9.0, 8.0, 7.0])

        def score(self, encode: Any) -> float:
            return next(self.scores)

    loop = loop_of(model, tmp_path, eval_steps=1, patience=2, evaluate="sts-dev")
    loop.judge = Given()
    standing = loop.run()
    assert (standing.step, standing.best_step, standing.best_score) == (4, 2, 9.0)
    last = loop.model.state()
    loop.load_best()
    at_two = Checkpoints(Storage(str(tmp_path))).read(2).state
    assert all(torch.equal(value, at_two[name]) for name, value in loop.model.state().items())
    assert not all(torch.equal(value, at_two[name]) for name, value in last.items())


def test_held_out_rows_are_judged_by_rank(tmp_path: Path) -> None:
    """Two anchors: the first one's positive is nearest, the second one's negative is nearer."""
    rows = [
        {"task": "t", "instruction": None, "symmetric": False, "anchor": f"a{n}", "positive": f"p{n}", "negatives": [f"n{n}"], "source": str(n)} for n in (0, 1)
    ]
    batch = write_batches(tmp_path, [rows]).read(0, 0, 1)
    vectors = {"a0": [1, 0, 0], "p0": [0.9, 0.1, 0], "n0": [0, 0, 1], "a1": [0, 1, 0], "p1": [0, 0.5, 0.5], "n1": [0, 0.9, 0.1]}
    judge = HeldOut([batch])
    assert judge.score(lambda asked: np.array([vectors[text] for text in asked.texts], np.float32)) == 50.0


def test_instructions_reach_the_prompts_of_their_side(model: Path) -> None:
    settings = settings_of(model, prompt="e5")
    prompting = Prompting(settle(settings.model_settings()))
    assert prompting.prompter("query", "Find it").prompt("x") == "Instruct: Find it\nQuery: x"
    assert prompting.prompter("document", "Find it").prompt("x") == "x"
    assert prompting.prompter("document", "Find it", symmetric=True).prompt("x") == "Instruct: Find it\nQuery: x"
    prompteol = settle(settings_of(model).model_settings())
    assert Prompting(prompteol).prompter("query", "Find it").prompt("x") == Embedder(prompteol).prompter("query").prompt("x")
    assert under(prompteol.representation, None) == prompteol.representation


def test_texts_are_cut_before_the_prompt(model: Path) -> None:
    spec = settle(settings_of(model).model_settings())
    whole, cut = Prompting(spec), Prompting(spec, text_tokens=2)
    prompter = whole.prompter("query")
    offsets = next(prompter.text_offsets([SENTENCES[0]]))
    expected = whole.tokens(prompter, [SENTENCES[0][: int(offsets[1, 1])]])
    assert cut.tokens(cut.prompter("query"), [SENTENCES[0]])[0].tolist() == expected[0].tolist()
    assert len(expected[0]) < len(whole.tokens(prompter, [SENTENCES[0]])[0])


def test_learning_rates() -> None:
    linear = [learning_rate(step, steps=10, warmup=4, highest=1.0, schedule="linear") for step in range(11)]
    assert linear[:5] == [0.25, 0.5, 0.75, 1.0, 1.0]
    assert linear[7] == pytest.approx(0.5)
    assert linear[10] == 0
    assert learning_rate(7, steps=10, warmup=4, highest=2.0, schedule="cosine") == pytest.approx(1.0)
    assert learning_rate(9, steps=10, warmup=4, highest=2.0, schedule="constant") == 2.0


def test_matryoshka_trains_the_whole_vector_too(model: Path, tmp_path: Path) -> None:
    loop = loop_of(model, tmp_path / "out", matryoshka=[4, 8])
    assert loop._loss.dimensions == (4, 8, loop.model.size)
    with pytest.raises(ConfigError, match=r"matryoshka: 4096 are more than the \d+ dimensions"):
        loop_of(model, tmp_path / "wide", matryoshka=[4096])
