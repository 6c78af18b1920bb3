"""What does a step of fine-tuning cost: how much memory with and without gradient caching, how much time beside sentence-transformers?

    python benchmarks/finetune.py memory                                  2048 rows in micro-batches of 16 and 64 texts; 16 to 64 rows in one pass
    python benchmarks/finetune.py memory --rows 256 --micro 16 64 --plain 16 32
    python benchmarks/finetune.py steps --rows 64 --micro 32 --rounds 5   beside CachedMultipleNegativesRankingLoss

A decoder of OPT-125M's shape with random weights and OPT's tokenizer, LoRA of rank 16 on all linear layers, float32, AdamW; SNLI triples
(anchor, positive, hard negative) of at most 32 tokens a text, in PromptEOL. memory: each case is one step in a process of its own, and the figure
the peak of its resident memory during the step. steps: both systems in this process, with the same start weights, no dropout, the same rows, one
step each in turn, the order turned each round; tokenising is counted on both sides. Vectors and losses of both are compared before the clock runs.
Seconds are the clock's; processor seconds are those of the process, for the machine may do other work. Writes
benchmarks/records/finetune-memory.json or finetune-steps.json; with --try nothing.
"""

from __future__ import annotations

import argparse
import csv
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # As a training has it, for both sides; read when torch is loaded.

import pyarrow as pa
import pyarrow.parquet as pq
import torch

from benchmarks.memory import write
from llmemb_ray.config import FinetuneSettings
from llmemb_ray.embedders.embedder import settle
from llmemb_ray.representation.templates import PROMPTEOL
from llmemb_ray.storage import Storage
from llmemb_ray.training.batches import SCHEMA, SHARD, Batches
from llmemb_ray.training.checkpoints import Checkpoints
from llmemb_ray.training.loop import Loop

SHARED = Path(os.environ.get("LLMEMB_DATA", ROOT.parent / "shared" / "data"))

TEXT_TOKENS = 32
"""Of a text without its prompt: paper 1's cut-off."""

RANK, ALPHA, TEMPERATURE, RATE, LONGEST_GRADIENT = 16, 32.0, 0.05, 1e-4, 1.0


def make_model(directory: Path, layers: int) -> Path:
    """OPT-125M's shape is transformers' default OPTConfig; the tokenizer as in the model's repository."""
    from transformers import GPT2Tokenizer, OPTConfig, OPTModel

    source = directory / "tokenizer"
    source.mkdir()
    for name in ("vocab.json", "merges.txt"):
        shutil.copy(SHARED.parent / "models" / "opt_tokenizer" / name, source / name)
    special = {"bos_token": "</s>", "eos_token": "</s>", "unk_token": "</s>", "pad_token": "<pad>", "add_bos_token": True}
    tokenizer = GPT2Tokenizer.from_pretrained(source, **special)
    torch.manual_seed(0)
    model = directory / "model"
    OPTModel(OPTConfig(num_hidden_layers=layers, dropout=0.0)).save_pretrained(model)
    tokenizer.save_pretrained(model)
    return model


def triples(model: Path, wanted: int) -> list[list[str]]:
    """[anchor, positive, negative] of SNLI whose texts are short enough; again from the first where there are too few."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(model)
    rows: list[list[str]] = []
    for path in sorted((SHARED / "snli").glob("*.csv")):
        with path.open(encoding="utf-8", newline="") as file:
            rows += [[row[name].strip() for name in ("sent0", "sent1", "hard_neg")] for row in csv.DictReader(file)]
    lengths = [len(ids) for ids in tokenizer([text for row in rows for text in row], add_special_tokens=False)["input_ids"]]
    short = [row for place, row in enumerate(rows) if max(lengths[3 * place : 3 * place + 3]) <= TEXT_TOKENS]
    return [short[place % len(short)] for place in range(wanted)]


def settings_of(model: Path, out: Path, rows: int, micro: int) -> FinetuneSettings:
    given: dict[str, Any] = {"model": str(model), "out": str(out), "train": ["written by this benchmark"], "prompt": "prompteol", "compute_dtype": "float32"}
    given |= {"batch_size": rows, "micro_batch": micro, "lora_rank": RANK, "lora_alpha": ALPHA, "lora_dropout": 0.0, "learning_rate": RATE}
    return FinetuneSettings.make(
        given | {"schedule": "constant", "weight_decay": 0.0, "max_grad_norm": LONGEST_GRADIENT, "temperature": TEMPERATURE, "mask_equal": False}
    )


def loop_of(model: Path, out: Path, data: list[list[str]], *, rows: int, micro: int) -> Loop:
    """The project's own loop on batches of these triples, in their order, written as ``finetune`` prepares them."""
    settings, storage = settings_of(model, out, rows, micro), Storage(str(out))
    steps = len(data) // rows
    path = out / SHARD.format(0)
    path.parent.mkdir(parents=True)
    with pq.ParquetWriter(path, SCHEMA) as writer:
        for step in range(steps):
            part = data[step * rows : (step + 1) * rows]
            made = {"task": "snli", "symmetric": False}
            lines = [made | {"anchor": one, "positive": two, "negatives": [three], "source": f"row {place}"} for place, (one, two, three) in enumerate(part)]
            writer.write_table(pa.Table.from_pylist(lines, schema=SCHEMA))
    record = {"steps": steps, "epochs": 1, "steps_per_epoch": [steps], "batch_size": rows, "shards": [0], "heldout_pieces": 0}
    spec = settle(settings.model_settings())
    return Loop(settings, spec, Batches(storage, record), Checkpoints(storage), device=torch.device("cpu"))


# -- memory --------------------------------------------------------------------------------------------


def resident() -> tuple[float, float]:
    """MB now, and at the most since ``forget_peak``."""
    values = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    now, peak = (int(values[name].split()[0]) / 1024 for name in ("VmRSS", "VmHWM"))
    return now, peak


def forget_peak() -> None:
    Path("/proc/self/clear_refs").write_text("5")


def one_step(model: Path, rows: int, micro: int, threads: int) -> dict[str, Any]:
    """In this process. micro: texts in a forward pass; as many as the batch has for no caching."""
    torch.set_num_threads(threads)
    with tempfile.TemporaryDirectory(prefix="llmemb-finetune-") as scratch:
        loop = loop_of(model, Path(scratch) / "out", triples(model, rows), rows=rows, micro=micro)
        batch, prompts = loop._read(0)
        forget_peak()
        before, _ = resident()
        started = time.perf_counter()
        loop._step(batch, prompts)
        seconds = time.perf_counter() - started
        _, peak = resident()
    return {
        "before_mb": round(before),
        "peak_mb": round(peak),
        "step_mb": round(peak - before),
        "seconds": round(seconds, 1),
        "tokens": int(prompts.lengths.sum()),
    }


def memory(model: Path, rows: int, micro: list[int], plain: list[int], threads: int) -> list[dict[str, Any]]:
    cases = [("plain", size, 3 * size) for size in plain] + [("cached", rows, size) for size in micro]
    records = []
    for kind, batch, texts in cases:
        command = [sys.executable, __file__, "one", "--model", str(model), "--rows", str(batch), "--micro", str(texts), "--threads", str(threads)]
        told = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=False)
        record: dict[str, Any] = {"kind": kind, "rows": batch, "texts": 3 * batch, "texts_in_a_pass": texts if kind == "cached" else 3 * batch}
        record |= json.loads(told.stdout.splitlines()[-1]) if told.returncode == 0 else {"failed": f"exit code {told.returncode}"}
        print(json.dumps(record), flush=True)
        records.append(record)
    return records


# -- time ----------------------------------------------------------------------------------------------


class Theirs:
    """sentence-transformers: the same base and adapter, last-token pooling, its cached loss; a step as its trainer makes it."""

    def __init__(self, model: Path, ours: Loop, micro: int) -> None:
        from peft import LoraConfig
        from sentence_transformers import SentenceTransformer
        from sentence_transformers.sentence_transformer.losses import CachedMultipleNegativesRankingLoss
        from sentence_transformers.sentence_transformer.modules import Pooling, Transformer

        transformer = Transformer(str(model))
        pooling = Pooling(transformer.get_embedding_dimension(), pooling_mode="lasttoken")
        self.model = SentenceTransformer(modules=[transformer, pooling], device="cpu")
        targets = sorted({name.rpartition(".")[2] for name, part in ours.model.module.get_base_model().named_modules() if hasattr(part, "lora_A")})
        self.model.add_adapter(LoraConfig(r=RANK, lora_alpha=ALPHA, lora_dropout=0.0, target_modules=targets, bias="none"))
        own = {name: value for name, value in self.model.named_parameters() if value.requires_grad}
        adapter = {name.partition("layers.")[2]: value for name, value in ours.model.trainable()}
        if {name.partition("layers.")[2] for name in own} != set(adapter):
            raise SystemExit("the adapters of both sides hold other layers")
        with torch.no_grad():
            for name, value in own.items():
                value.copy_(adapter[name.partition("layers.")[2]])
        self.model.train()
        self.parameters = list(own.values())
        self.loss = CachedMultipleNegativesRankingLoss(self.model, scale=1 / TEMPERATURE, mini_batch_size=micro)
        self.optimizer = torch.optim.AdamW(self.parameters, lr=RATE, weight_decay=0.0)

    def value(self, rows: list[list[str]]) -> torch.Tensor:
        columns = [[PROMPTEOL.format(text=text) for text in column] for column in zip(*rows, strict=True)]
        value: torch.Tensor = self.loss([self.model.preprocess(column) for column in columns], torch.zeros(len(rows)))
        return value

    def step(self, rows: list[list[str]]) -> float:
        self.optimizer.zero_grad(set_to_none=True)
        value = self.value(rows)
        value.backward()  # type: ignore[no-untyped-call]
        torch.nn.utils.clip_grad_norm_(self.parameters, LONGEST_GRADIENT)
        self.optimizer.step()
        return float(value.detach())


def timed(call: Callable[[], Any]) -> tuple[float, float]:
    """Seconds of the clock and of the processor."""
    clock, processor = time.perf_counter(), time.process_time()
    call()
    return time.perf_counter() - clock, time.process_time() - processor


def steps(model: Path, rows: int, micro: int, rounds: int, threads: int) -> dict[str, Any]:
    torch.set_num_threads(threads)
    data = triples(model, rows * (rounds + 1))
    with tempfile.TemporaryDirectory(prefix="llmemb-finetune-") as scratch:
        loop = loop_of(model, Path(scratch) / "out", data, rows=rows, micro=micro)
        theirs = Theirs(model, loop, micro)
        parts = [data[number * rows : (number + 1) * rows] for number in range(rounds + 1)]
        agreement = compared(loop, theirs, parts[0])

        def our_step(number: int) -> None:
            loop._step(*loop._read(number))

        systems: dict[str, Callable[[int], Any]] = {"llmemb": our_step, "sentence-transformers": lambda number: theirs.step(parts[number])}
        for step in systems.values():
            step(0)
        found: dict[str, list[tuple[float, float]]] = {name: [] for name in systems}
        for number in range(1, rounds + 1):
            for name in list(systems)[:: 1 if number % 2 else -1]:
                found[name].append(timed(lambda name=name, number=number: systems[name](number)))  # type: ignore[misc]
            print(
                f"round {number}: " + ", ".join(f"{name} {times[-1][0]:.2f} s ({times[-1][1]:.2f} s of processor)" for name, times in found.items()), flush=True
            )
    record: dict[str, Any] = {"rows": rows, "texts": 3 * rows, "texts_in_a_pass": micro, "rounds": rounds} | agreement
    for name, times in found.items():
        for place, kind in enumerate(("seconds", "cpu_seconds")):
            values = [one[place] for one in times]
            record[f"{name} {kind}"] = {"median": round(statistics.median(values), 2), "range": [round(min(values), 2), round(max(values), 2)]}
    for place, kind in enumerate(("seconds", "cpu_seconds")):
        ratios = [other[place] / own[place] for own, other in zip(*found.values(), strict=True)]
        record[f"times faster, {kind}"] = {"median": round(statistics.median(ratios), 2), "range": [round(min(ratios), 2), round(max(ratios), 2)]}
    print(json.dumps(record, indent=1))
    return record


def compared(loop: Loop, theirs: Theirs, rows: list[list[str]]) -> dict[str, Any]:
    """How far the two sides are apart before training, on the same rows; SystemExit where they do not compute the same."""
    batch, prompts = loop._read(0)
    with torch.no_grad():
        ours = torch.nn.functional.normalize(loop.model.encode(prompts.rows.take(range(8))), dim=1)
        features = theirs.model.preprocess([PROMPTEOL.format(text=row[0]) for row in rows[:8]])
        other = torch.nn.functional.normalize(theirs.model(features)["sentence_embedding"], dim=1)
    losses = float(loop._backward(batch, prompts)[0]), float(theirs.value(rows).detach())
    loop.optimizer.zero_grad()
    vectors, loss = float((ours - other).abs().max()), abs(losses[0] - losses[1])
    if vectors > 1e-4 or loss > 1e-3:
        raise SystemExit(f"the two sides compute other things: vectors differ by {vectors:.2g}, losses are {losses}")
    return {"loss": round(losses[0], 4), "vectors_differ_by": float(f"{vectors:.1e}"), "losses_differ_by": float(f"{loss:.1e}")}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    by_memory, by_steps, one = (commands.add_parser(name) for name in ("memory", "steps", "one"))
    for each in (by_memory, by_steps, one):
        each.add_argument("--threads", type=int, default=2)
    for each in (by_memory, by_steps):
        each.add_argument("--layers", type=int, default=12, help="of the model; fewer to try out")
        each.add_argument("--try", dest="trying", action="store_true", help="write no record")
    by_memory.add_argument("--rows", type=int, default=2048, help="of the batch with gradient caching")
    by_memory.add_argument("--micro", type=int, nargs="+", default=[16, 64], help="texts in a pass")
    by_memory.add_argument("--plain", type=int, nargs="+", default=[16, 32, 64], help="rows of batches in one pass")
    by_steps.add_argument("--rows", type=int, default=64)
    by_steps.add_argument("--micro", type=int, default=32)
    by_steps.add_argument("--rounds", type=int, default=5)
    one.add_argument("--model", type=Path, required=True)
    one.add_argument("--rows", type=int, required=True)
    one.add_argument("--micro", type=int, required=True)
    chosen = parser.parse_args()
    if chosen.command == "one":
        print(json.dumps(one_step(chosen.model, chosen.rows, chosen.micro, chosen.threads)))
        return
    common = {"layers": chosen.layers, "threads": chosen.threads, "load_average": [round(load, 1) for load in os.getloadavg()]}
    with tempfile.TemporaryDirectory(prefix="llmemb-finetune-") as scratch:
        model = make_model(Path(scratch), chosen.layers)
        if chosen.command == "memory":
            records = [common | found for found in memory(model, chosen.rows, chosen.micro, chosen.plain, chosen.threads)]
        else:
            records = [common | steps(model, chosen.rows, chosen.micro, chosen.rounds, chosen.threads)]
    if not chosen.trying:
        write(f"finetune-{chosen.command}", records)


if __name__ == "__main__":
    main()
