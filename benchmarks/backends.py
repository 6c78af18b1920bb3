"""How many rows a second do vLLM alone, ray.data.llm and our job make, with each backend?

    .venv-vllm/bin/python benchmarks/backends.py
    .venv-vllm/bin/python benchmarks/backends.py --rows 64 --rounds 1 --cases demo-float32 --systems encode,job-vllm     trying out; not recorded
    .venv-vllm/bin/python benchmarks/backends.py --engine-process                                        also vLLM's engine in a process of its own

A model of OPT-125M's shape with random weights, OPT's tokenizer, sentences of STS Benchmark; PromptEOL without and with one
demonstration; computed in float32 and in bfloat16. The systems:

``encode``    ``LLM.encode`` of vLLM fed the token ids, prefix caching on in blocks of 32; in this process and without storage
``embed``     ``LLM.embed`` of vLLM on the prompts as text, the same otherwise
``raydata``   ``ray.data.llm``, task ``embed``, from Parquet to Parquet
``job-vllm``  ``llmemb embed --backend vllm`` from Parquet to committed shards, one actor
``job-hf``    ``llmemb embed --backend hf``, the same otherwise

Each measurement is a process of its own with two OpenMP threads; rounds are taken in turn, so that a slow minute of the machine
meets all systems. Start-up is kept apart: the clock starts when the loaded model takes the first row. ``encode`` and ``embed`` embed
WARM_UP other sentences before that; ray.data.llm and the jobs begin several batches at once, so there those sentences count as rows
like the others (a process's first batch may take a second more than later ones). The vectors of every system are compared with
those of ``encode``. Writes benchmarks/records/backends.json.
"""

from __future__ import annotations

import argparse
import csv
import json
import os
import random
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import AsyncIterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import psutil
import pyarrow as pa
import pyarrow.parquet as pq

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

from benchmarks.memory import SAMPLE_SECONDS, write
from llmemb_ray.representation.templates import Demonstration, prompteol
from llmemb_ray.shards.run import Run
from llmemb_ray.storage import Storage

ROWS, ROUNDS = 600, 3
WARM_UP = 64
THREADS = 2
MAX_TOKENS = 256
"""Longest prompt; no sentence here is cut."""
BLOCK = 32
"""vLLM's CPU kernels take multiples of it; its default of 128 would find no shared prefix here."""
CACHE_BYTES = 2**30
"""Keys and values of vLLM alone and in ray.data.llm: more than a forward pass needs. Our job reckons its own."""
BATCH = 64
"""Rows in a batch of ray.data.llm; eight at once."""
LIMIT_SECONDS = 1800.0
"""After which a system is ended and recorded as not done."""

DEMONSTRATION = (
    "a mystic syllable, considered the most sacred mantra in hinduism and tibetan buddhism. "
    "it appears at the beginning and end of most sanskrit recitations, prayers, and texts.=>Om"
)
"""The longest of paper 1's 300: prompts share 60 tokens. Most share fewer than a block of 32, and vLLM keeps whole blocks only."""
SYSTEMS = ("encode", "embed", "raydata", "job-vllm", "job-hf")
PROCESS = "encode-process"
"""``encode`` with vLLM's engine in a process of its own."""

ENVIRONMENT = {
    "OMP_NUM_THREADS": str(THREADS),
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "VLLM_LOGGING_LEVEL": "WARNING",
    "VLLM_NO_USAGE_STATS": "1",
    "HF_HUB_OFFLINE": "1",
    "TOKENIZERS_PARALLELISM": "false",
    "PYTHONPATH": str(ROOT),
}


@dataclass(frozen=True)
class Case:
    name: str
    demonstrations: tuple[str, ...]
    dtype: str

    @property
    def template(self) -> str:
        return prompteol(tuple(Demonstration.parse(demo) for demo in self.demonstrations))


PROMPTS = ("zero", "demo")
DTYPES = ("float32", "bfloat16")
CASES = [f"{prompt}-{dtype}" for prompt in PROMPTS for dtype in DTYPES]


def case_of(name: str, demonstrations: list[str]) -> Case:
    prompt, _, dtype = name.partition("-")
    return Case(name, tuple(demonstrations) if prompt == "demo" else (), dtype)


@dataclass
class Measured:
    """One system, once. Times in seconds, memory in MB.

    rows:             that the times are of
    model_seconds:    on the model
    wall_seconds:     from the first row's start until all are where the system leaves them, and it says so
    start_seconds:    from starting the process until the model takes a row
    warm_up_seconds:  of the WARM_UP rows before; None where there is no such part
    process_seconds:  of the whole process, leaving included
    private_mb:       peak of the memory that the process and its children do not share, summed up
    rss_mb:           peak of the resident memory of the largest of them
    least_cosine:     to the vectors of ``encode`` in the same round; None for ``encode`` itself
    """

    rows: int
    model_seconds: float
    wall_seconds: float
    start_seconds: float
    warm_up_seconds: float | None
    process_seconds: float = 0.0
    private_mb: int = 0
    rss_mb: int = 0
    least_cosine: float | None = None
    details: dict[str, Any] | None = None

    @property
    def model_rate(self) -> float:
        return self.rows / self.model_seconds

    @property
    def wall_rate(self) -> float:
        return self.rows / self.wall_seconds


class Failed(Exception):
    """A system did not come to its end; the text says why."""


# -- what is embedded, and with what -----------------------------------------------------------------


def data_directory() -> Path:
    data = Path(os.environ.get("LLMEMB_DATA", ROOT.parent / "shared" / "data"))
    if not data.is_dir():
        raise SystemExit(f"no evaluation data at {data}; set LLMEMB_DATA")
    return data


def make_opt(directory: Path, data: Path) -> Path:
    """OPT-125M's shape with random weights and OPT's tokenizer, as its authors published the vocabulary."""
    from transformers import GPT2Tokenizer

    from tests.small_models import make_model

    original = directory / "tokenizer"
    original.mkdir(parents=True)
    for name in ("vocab.json", "merges.txt"):
        shutil.copy(data.parent / "models" / "opt_tokenizer" / name, original / name)
    tokenizer = GPT2Tokenizer.from_pretrained(original, bos_token="</s>", eos_token="</s>", unk_token="</s>", pad_token="<pad>", add_bos_token=True)
    shape: dict[str, Any] = {"hidden_size": 768, "word_embed_proj_dim": 768, "num_hidden_layers": 12, "num_attention_heads": 12, "ffn_dim": 3072}
    places: dict[str, Any] = {"vocab_size": 50272, "max_position_embeddings": 2048, "bos_token_id": 2, "eos_token_id": 2, "pad_token_id": 1}
    return make_model(directory / "opt", "opt", tokenizer=tokenizer, **shape, **places)


def sentences(data: Path, count: int) -> list[str]:
    """Sentences of STS Benchmark's training set, each once, shuffled."""
    with (data / "sts_raw" / "STSBenchmark" / "sts-train.csv").open(encoding="utf-8", newline="") as lines:
        found = list(dict.fromkeys(text.strip() for row in csv.reader(lines, delimiter="\t", quoting=csv.QUOTE_NONE) for text in row[5:7]))
    if len(found) < count:
        raise SystemExit(f"rows: there are {len(found)} sentences, {count} with those for warming up are wanted")
    random.Random(0).shuffle(found)
    return found[:count]


def make_corpus(case: Case, texts: list[str], model: Path, directory: Path) -> Path:
    """One file, the sentences for warming up first: id, text and the prompt's token_ids, which only ``encode`` and ``embed`` look at."""
    from llmemb_ray.config import ModelSettings
    from llmemb_ray.embedders.embedder import settle

    prompt = "prompteol-icl" if case.demonstrations else "prompteol"
    spec = settle(ModelSettings.make({"model": str(model), "prompt": prompt, "demo": list(case.demonstrations), "max_tokens": MAX_TOKENS}))
    rows, unfit = spec.prompter("document").tokenize(texts)
    assert not any(unfit), "a sentence does not fit"
    assert max(rows.lengths) < MAX_TOKENS, "a sentence is cut"
    table = pa.table({"id": np.arange(len(texts)), "text": texts, "token_ids": [rows[row].tolist() for row in range(len(texts))]})
    directory.mkdir(parents=True)
    pq.write_table(table, directory / "sentences.parquet")
    return directory


# -- systems that run in a process of this file ------------------------------------------------------


@dataclass(frozen=True)
class Task:
    """What such a process is told; JSON in its second argument."""

    system: str
    model: str
    corpus: str
    template: str
    dtype: str
    output: str
    """Directory for ``measured.json`` and vectors."""


def engine_arguments(task: Task) -> dict[str, Any]:
    """What every use of vLLM here has in common; all else is vLLM's default."""
    return {
        "dtype": task.dtype,
        "max_model_len": MAX_TOKENS,
        "block_size": BLOCK,
        "enable_prefix_caching": True,
        "kv_cache_memory_bytes": CACHE_BYTES,
        "enforce_eager": True,
    }


def alone(task: Task) -> Measured:
    """vLLM's own class ``LLM``: ``encode`` with token ids, or ``embed`` with text. start_seconds is the time of day."""
    import torch
    from vllm import LLM, PoolingParams
    from vllm.config import PoolerConfig
    from vllm.inputs import TokensPrompt

    by_tokens = task.system != "embed"
    corpus = pq.read_table(task.corpus)
    arguments = engine_arguments(task)
    if by_tokens:
        arguments["pooler_config"] = PoolerConfig(seq_pooling_type="LAST", use_activation=False)
    llm = LLM(task.model, runner="pooling", convert="embed", **arguments)
    ready = time.time()
    cached = 0

    def vectors(table: pa.Table) -> npt.NDArray[np.float32]:
        nonlocal cached
        if by_tokens:
            prompts = [TokensPrompt(prompt_token_ids=ids) for ids in table["token_ids"].to_pylist()]
            outputs = llm.encode(prompts, PoolingParams(use_activation=False), pooling_task="embed", use_tqdm=False)
            made = torch.stack([output.outputs.data for output in outputs]).float().numpy()
        else:
            texts = [task.template.format(text=text) for text in table["text"].to_pylist()]
            outputs = llm.embed(texts, use_tqdm=False)
            made = np.asarray([output.outputs.embedding for output in outputs], np.float32)
        assert [list(output.prompt_token_ids) for output in outputs] == table["token_ids"].to_pylist(), "other tokens than our own"
        cached = sum(output.num_cached_tokens for output in outputs)
        return made

    started = time.perf_counter()
    vectors(corpus[:WARM_UP])
    warm = time.perf_counter()
    made = vectors(corpus[WARM_UP:])
    seconds = time.perf_counter() - warm
    np.save(Path(task.output) / "vectors.npy", made)
    details = {"threads": torch.get_num_threads(), "tokens_cached": cached, "max_num_batched_tokens": _batched(llm)}
    return Measured(len(made), seconds, seconds, ready, round(warm - started, 2), details=details)


def _batched(llm: Any) -> int:
    return int(llm.llm_engine.vllm_config.scheduler_config.max_num_batched_tokens)


def ray_data(task: Task) -> Measured:
    """``ray.data.llm`` from Parquet to Parquet. start_seconds is the time of day."""
    import ray
    from ray.data.llm import build_processor, vLLMEngineProcessorConfig
    from ray.llm._internal.batch.stages.vllm_engine_stage import vLLMEngineStageUDF

    class TimedEngine(vLLMEngineStageUDF):  # type: ignore[misc]
        """The engine's stage, which tells when each batch was taken and done."""

        async def __call__(self, batch: dict[str, Any]) -> AsyncIterator[dict[str, Any]]:
            taken = time.time()
            async for made in super().__call__(batch):
                for row in made[self.data_column]:
                    row |= {"taken": taken, "done": time.time()}
                yield made

    template = task.template
    # Small tasks beside an engine that takes the machine: with as many CPUs as there are cores the graph would wait for ever.
    ray.init(address="local", num_cpus=2 * THREADS, include_dashboard=False, log_to_driver=False, logging_level="ERROR")
    ray.data.DataContext.get_current().enable_progress_bars = False
    config = vLLMEngineProcessorConfig(
        model_source=task.model,
        task_type="embed",
        engine_kwargs=engine_arguments(task) | {"disable_log_stats": True},
        concurrency=1,
        batch_size=BATCH,
        chat_template_stage=False,
        detokenize_stage=False,
        tokenize_stage={"enabled": True, "num_cpus": 0.5},
        placement_group_config={"bundles": [{"CPU": THREADS}]},
        log_engine_metrics=False,
    )
    processor = build_processor(
        config,
        preprocess=lambda row: {"id": row["id"], "prompt": template.format(text=row["text"])},
        postprocess=lambda row: {name: row[name] for name in ("id", "embeddings", "taken", "done")},
        preprocess_map_kwargs={"num_cpus": 0.25},
        postprocess_map_kwargs={"num_cpus": 0.25},
    )
    # Set past pydantic, whose check on assignment would forget the placement and ask for a GPU.
    processor.get_stage_by_name("vLLMEngineStage").__dict__["fn"] = TimedEngine
    output = Path(task.output) / "parquet"
    processor(ray.data.read_parquet(task.corpus, columns=["id", "text"])).write_parquet(str(output))
    written = time.time()
    made = pq.read_table(output).sort_by("id")
    ray.shutdown()
    taken, done = made["taken"].to_numpy(), made["done"].to_numpy()
    vectors = np.asarray(made["embeddings"].to_pylist(), np.float32)
    np.save(Path(task.output) / "vectors.npy", vectors[WARM_UP:])
    return Measured(len(made), float(done.max() - taken.min()), float(written - taken.min()), float(taken.min()), None)


def measure(task: Task) -> None:
    """Runs in the measured process."""
    measured = ray_data(task) if task.system == "raydata" else alone(task)
    (Path(task.output) / "measured.json").write_text(json.dumps(asdict(measured)))


# -- a measurement -----------------------------------------------------------------------------------


def job_command(case: Case, system: str, model: Path, corpus: Path, output: Path) -> list[str]:
    command = [sys.executable, "-m", "llmemb_ray.cli", "embed", str(corpus), str(output), "--model", str(model), "--backend", system.removeprefix("job-")]
    command += ["--compute-dtype", case.dtype, "--max-tokens", str(MAX_TOKENS), "--actors", "1", "--cpus-per-actor", str(THREADS)]
    command += ["--prompt", "prompteol-icl"] if case.demonstrations else ["--prompt", "prompteol"]
    return command + [part for demo in case.demonstrations for part in ("--demo", demo)]


def read_job(output: Path, started: float) -> tuple[Measured, npt.NDArray[np.float32]]:
    """What a finished job's commits and receipt say.

    Two units are under way at once, and one that waits for the model counts the wait as its own: model_seconds is the time in
    which any was there.
    """
    run = Run(Storage(str(output)))
    assert run.receipt is not None
    spans = sorted((one.finished - one.seconds_write - one.seconds_model, one.finished - one.seconds_write) for one in run.commits)
    first = busy_until = spans[0][0]
    seconds = 0.0
    for begun, left in spans:
        seconds += max(0.0, left - max(busy_until, begun))
        busy_until = max(busy_until, left)
    shards = pa.concat_tables([table for _, table in run.shards(["id", "embedding"])]).sort_by("id")
    vectors = shards["embedding"].combine_chunks().flatten().to_numpy().reshape(len(shards), -1)
    receipt = run.receipt
    details = {
        "units": len(spans),
        "receipt_seconds_model": round(receipt.seconds_model, 2),
        "tokens": receipt.tokens,
        "tokens_computed": receipt.tokens_computed,
        "token_budgets": receipt.token_budgets,
    }
    return Measured(len(shards), seconds, receipt.finished - first, first - started, None, details=details), vectors[WARM_UP:]


def watched(command: list[str], environment: dict[str, str], log: Path) -> tuple[int, int]:
    """Runs a command to its end and returns the peaks (private MB summed, resident MB of the largest). Raises Failed."""
    private = largest = 0
    with log.open("w") as lines:
        process = psutil.Popen(command, env=environment, stdout=lines, stderr=subprocess.STDOUT)
        deadline = time.monotonic() + LIMIT_SECONDS
        while process.poll() is None:
            time.sleep(SAMPLE_SECONDS)
            sizes = []
            for member in _family(process):
                try:
                    sizes.append(member.memory_info())
                except (psutil.NoSuchProcess, psutil.ZombieProcess):
                    continue
            private = max(private, sum(size.rss - size.shared for size in sizes))
            largest = max([largest, *(size.rss for size in sizes)])
            if time.monotonic() > deadline:
                for member in reversed(_family(process)):
                    member.kill()
                process.wait()
                raise Failed(f"not done after {LIMIT_SECONDS:g} s")
    if process.returncode:
        told = [line.strip() for line in log.read_text(errors="replace").splitlines() if line.strip()]
        raise Failed(f"exit code {process.returncode}: {told[-1] if told else 'nothing said'}")
    return private // 2**20, largest // 2**20


def _family(process: psutil.Process) -> list[psutil.Process]:
    try:
        return [process, *process.children(recursive=True)]
    except psutil.NoSuchProcess:
        return []


def run_system(system: str, case: Case, model: Path, corpus: Path, directory: Path) -> tuple[Measured, npt.NDArray[np.float32]]:
    """One measurement in a process of its own. Raises Failed."""
    directory.mkdir(parents=True)
    environment = os.environ | ENVIRONMENT | {"VLLM_ENABLE_V1_MULTIPROCESSING": "1" if system == PROCESS else "0"}
    environment.pop("RAY_ADDRESS", None)
    if system.startswith("job-"):
        command = job_command(case, system, model, corpus, directory / "run")
    else:
        task = Task(system, str(model), str(corpus), case.template, case.dtype, str(directory))
        command = [sys.executable, str(Path(__file__).resolve()), "measure", json.dumps(asdict(task))]
    started = time.time()
    private, largest = watched(command, environment, directory / "log")
    process_seconds = time.time() - started
    if system.startswith("job-"):
        measured, vectors = read_job(directory / "run", started)
    else:
        measured = Measured(**json.loads((directory / "measured.json").read_text()))
        measured.start_seconds -= started
        vectors = np.load(directory / "vectors.npy")
    measured.process_seconds, measured.private_mb, measured.rss_mb = process_seconds, private, largest
    return measured, vectors


def least_cosine(vectors: npt.NDArray[np.float32], wanted: npt.NDArray[np.float32]) -> float:
    a, b = vectors.astype(np.float64), wanted.astype(np.float64)
    return float(((a * b).sum(axis=1) / (np.linalg.norm(a, axis=1) * np.linalg.norm(b, axis=1))).min())


# -- record and table --------------------------------------------------------------------------------


def summary(rounds: list[Measured]) -> dict[str, float]:
    """Rows a second: of the best round and the median; medians of the rest."""

    def middle(name: str, digits: int) -> float:
        return float(round(statistics.median(getattr(one, name) for one in rounds), digits))

    return {
        "model_rows_per_s_best": round(max(one.model_rate for one in rounds), 2),
        "model_rows_per_s_median": middle("model_rate", 2),
        "wall_rows_per_s_best": round(max(one.wall_rate for one in rounds), 2),
        "wall_rows_per_s_median": middle("wall_rate", 2),
        "start_seconds_median": middle("start_seconds", 1),
        "private_mb": max(one.private_mb for one in rounds),
        "rss_mb": max(one.rss_mb for one in rounds),
    }


def record_of(case: Case, rows: int, tokens: float, rounds: dict[str, list[Measured]], failures: dict[str, str]) -> dict[str, Any]:
    systems: dict[str, Any] = {}
    for system, measured in rounds.items():
        if measured:
            systems[system] = summary(measured) | {"rounds": [_rounded(asdict(one)) for one in measured]}
        if system in failures:
            systems[system] = systems.get(system, {}) | {"failed": failures[system]}
    against = systems.get("encode", {}).get("model_rows_per_s_median")
    for values in systems.values():
        if against and "model_rows_per_s_median" in values:
            values["model_to_encode"] = round(values["model_rows_per_s_median"] / against, 3)
            values["wall_to_encode"] = round(values["wall_rows_per_s_median"] / against, 3)
    return {
        "case": case.name,
        "demonstrations": list(case.demonstrations),
        "rows": rows,
        "warm_up_rows": WARM_UP,
        "tokens_per_row": round(tokens, 1),
        "threads": THREADS,
        "systems": systems,
    }


def _rounded(values: dict[str, Any]) -> dict[str, Any]:
    return {name: round(value, 6 if name == "least_cosine" else 3) if isinstance(value, float) else value for name, value in values.items()}


def table_of(records: list[dict[str, Any]]) -> str:
    lines = [
        "| case | system | rows/s on the model, best / median | to encode | rows/s to the end, best / median | to encode | start-up, s | private MB |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for record in records:
        for system, of in record["systems"].items():
            if "model_rows_per_s_median" not in of:
                lines.append(f"| {record['case']} | {system} | failed: {of['failed']} | | | | | |")
                continue
            cells = [record["case"], system]
            for kind in ("model", "wall"):
                ratio = of.get(f"{kind}_to_encode")
                cells += [f"{of[f'{kind}_rows_per_s_best']:.1f} / {of[f'{kind}_rows_per_s_median']:.1f}", f"{ratio:.2f}" if ratio is not None else ""]
            lines.append("| " + " | ".join([*cells, f"{of['start_seconds_median']:.0f}", str(of["private_mb"])]) + " |")
    return "\n".join(lines)


def compare(cases: list[Case], systems: list[str], rows: int, rounds: int, scratch: Path) -> list[dict[str, Any]]:
    data = data_directory()
    texts = sentences(data, WARM_UP + rows)
    model = make_opt(scratch / "model", data)
    corpora = {case.name: make_corpus(case, texts, model, scratch / "corpora" / case.name) for case in cases}
    tokens = {name: _mean_tokens(corpus) for name, corpus in corpora.items()}
    taken: dict[str, dict[str, list[Measured]]] = {case.name: {system: [] for system in systems} for case in cases}
    failures: dict[str, dict[str, str]] = {case.name: {} for case in cases}
    records: list[dict[str, Any]] = []
    for number in range(rounds):
        for case in cases:
            wanted: npt.NDArray[np.float32] | None = None
            for system in systems:
                directory = scratch / "measurements" / f"{number}-{case.name}-{system}"
                try:
                    measured, vectors = run_system(system, case, model, corpora[case.name], directory)
                    if len(vectors) != rows:
                        raise Failed(f"{len(vectors)} of {rows} vectors came out")
                except Failed as error:
                    failures[case.name][system] = str(error)
                    print(f"round {number + 1}, {case.name}, {system}: failed: {error}; its output:\n{(directory / 'log').read_text(errors='replace')[-3000:]}")
                    continue
                if system == "encode":
                    wanted = vectors
                elif wanted is not None:
                    measured.least_cosine = least_cosine(vectors, wanted)
                taken[case.name][system].append(measured)
                print(f"round {number + 1}, {case.name}, {system}: {json.dumps(_rounded(asdict(measured)))}", flush=True)
                shutil.rmtree(directory)
        records = [record_of(case, rows, tokens[case.name], taken[case.name], failures[case.name]) for case in cases]
        if rows >= ROWS:
            write("backends", records)  # After each round, so that one that is cut short leaves those before it.
    return records


def _mean_tokens(corpus: Path) -> float:
    column = pq.read_table(corpus / "sentences.parquet", columns=["token_ids"])["token_ids"]
    return float(np.mean([len(ids) for ids in column]))


def chosen(text: str, allowed: list[str], option: str) -> list[str]:
    names = text.split(",")
    unknown = [name for name in names if name not in allowed]
    if unknown:
        raise SystemExit(f"{option}: there is no {', '.join(unknown)}; choose from {', '.join(allowed)}")
    return names


def main() -> None:
    if sys.argv[1:2] == ["measure"]:
        measure(Task(**json.loads(sys.argv[2])))
        return
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=ROWS, help=f"sentences measured; fewer than {ROWS} are not recorded (default: {ROWS})")
    parser.add_argument("--rounds", type=int, default=ROUNDS, help=f"measurements of each system in each case (default: {ROUNDS})")
    parser.add_argument("--systems", default=",".join(SYSTEMS), help=f"of {', '.join(SYSTEMS)}; separated by commas, taken in this order")
    parser.add_argument("--cases", default=",".join(CASES), help=f"of {', '.join(CASES)}; separated by commas")
    parser.add_argument("--demo", action="append", help="demonstration 'sentence=>Word' of the cases with one; repeatable (default: a long one)")
    parser.add_argument("--engine-process", action="store_true", help=f"also measure {PROCESS}: vLLM's engine in a process of its own")
    arguments = parser.parse_args()
    systems = chosen(arguments.systems, [*SYSTEMS, PROCESS], "systems")
    if arguments.engine_process and PROCESS not in systems:
        systems.insert(systems.index("encode") + 1 if "encode" in systems else 0, PROCESS)
    cases = [case_of(name, arguments.demo or [DEMONSTRATION]) for name in chosen(arguments.cases, CASES, "cases")]
    with tempfile.TemporaryDirectory(prefix="llmemb-backends-") as scratch:
        records = compare(cases, systems, arguments.rows, arguments.rounds, Path(scratch))
    print(table_of(records))
    if arguments.rows < ROWS:
        print(f"not recorded: fewer than {ROWS} rows")


if __name__ == "__main__":
    main()
