"""``ray job submit`` against a real cluster of several nodes, with the corpus and the run on a real S3 server."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

import llmemb_ray
from llmemb_ray.config import EvaluateSettings
from llmemb_ray.evaluation import evaluate, record
from llmemb_ray.shards.run import Run
from llmemb_ray.shards.verify import verify
from llmemb_ray.storage import Storage
from llmemb_ray.synthesis.record import Synthesis
from llmemb_ray.synthesis.verify import verify as verify_synthesis
from tests.generation.test_local import bytewise_tokenizer
from tests.ray_cluster import ENVIRONMENT, RAY, RayCluster
from tests.s3_server import S3Server
from tests.small_jobs import vectors_of, write
from tests.small_models import make_model

pytestmark = pytest.mark.timeout(300)

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def cluster() -> Iterator[RayCluster]:
    cluster = RayCluster(workers=2)
    yield cluster
    cluster.stop()


def submit(cluster: RayCluster, server: S3Server, *arguments: str, job: str = "embed") -> subprocess.CompletedProcess[str]:
    """Submits a job from this checkout, as the README says; what git ignores stays behind."""
    runtime_env = json.dumps({"env_vars": server.environment | {"HF_HUB_OFFLINE": "1"}})
    command = [RAY, "job", "submit", "--address", cluster.dashboard, "--working-dir", str(ROOT), "--runtime-env-json", runtime_env]
    command += ["--", sys.executable, f"jobs/{job}.py", *arguments]
    for _ in range(30):
        done = subprocess.run(command, capture_output=True, text=True, timeout=200, env=ENVIRONMENT)
        if "No available agent to submit job" not in done.stderr:
            break
        time.sleep(1)  # The nodes are up, but the agent that takes jobs is not yet.
    return done


def test_the_job_runs_on_the_cluster_and_is_verified(cluster: RayCluster, s3: S3Server, model: Path) -> None:
    s3.path("corpus").mkdir(parents=True)
    s3.path("model").mkdir()
    for file in model.iterdir():
        s3.path(f"model/{file.name}").write_bytes(file.read_bytes())
    for number in range(3):
        rows = range(number * 200, (number + 1) * 200)
        pq.write_table(pa.table({"id": list(rows), "text": [f"document {row}" for row in rows]}), s3.path(f"corpus/{number}.parquet"), row_group_size=100)
    arguments = [s3.url("corpus"), s3.url("out"), "--model", s3.url("model"), "--actors", "2", "--cpus-per-actor", "1", "--rows-per-unit", "25"]
    done = submit(cluster, s3, *arguments)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "600 rows read = 600 embedded + 0 rejected" in done.stdout
    run = Run(Storage(s3.url("out"), s3.access()))
    assert verify(run, against=[s3.url("corpus")]).problems == []
    assert run.receipt is not None
    assert run.receipt.units == 24


@pytest.mark.vllm
def test_the_job_runs_on_vllm(cluster: RayCluster, s3: S3Server, tmp_path: Path) -> None:
    wide = make_model(tmp_path / "wide", hidden_size=64, num_attention_heads=2, num_key_value_heads=1)
    for file in wide.iterdir():
        Storage(s3.url("model"), s3.access()).put(file.name, file.read_bytes())
    texts = [f"document {row}" for row in range(300)]
    pq.write_table(pa.table({"id": list(range(300)), "text": texts}), tmp_path / "in.parquet", row_group_size=50)
    Storage(s3.url("corpus"), s3.access()).put("in.parquet", (tmp_path / "in.parquet").read_bytes())
    arguments = [s3.url("corpus"), s3.url("out"), "--model", s3.url("model"), "--backend", "vllm", "--actors", "2", "--cpus-per-actor", "1"]
    done = submit(cluster, s3, *arguments, "--rows-per-unit", "25")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "300 rows read = 300 embedded + 0 rejected" in done.stdout
    run = Run(Storage(s3.url("out"), s3.access()))
    assert verify(run, against=[s3.url("corpus")]).problems == []
    plain = llmemb_ray.Embedder.load(str(wide), backend="hf").encode(texts)
    ours = {id_: vector for _, table in run.shards() for id_, vector in zip(table["id"].to_pylist(), vectors_of(table["embedding"]), strict=True)}
    assert max(float(np.abs(ours[row] - plain[row]).max()) for row in range(300)) <= 1e-5
    assert run.receipt is not None
    assert run.receipt.backends == {"vllm": 12}


def test_a_model_is_evaluated_on_the_cluster(cluster: RayCluster, s3: S3Server, model: Path, tmp_path: Path) -> None:
    path = tmp_path / "data" / "STSBenchmark" / "sts-test.csv"
    path.parent.mkdir(parents=True)
    path.write_text("".join(f"g\tf\ty\t{row}\t{row % 6}\ta man number {row}\ta boy number {row * 7 % 50}\n" for row in range(50)))
    arguments = ["--model", str(model), "--suite", "sts:STS-B", "--data", str(tmp_path / "data")]
    done = submit(cluster, s3, *arguments, "--out", s3.url("evaluation"), "--actors", "2", "--cpus-per-actor", "1", job="evaluate")
    assert done.returncode == 0, done.stdout + done.stderr
    made = record.load(s3.url("evaluation"), s3.access())
    here = evaluate.run(
        EvaluateSettings.make({"model": str(model), "suite": ["sts:STS-B"], "data": str(path.parents[1]), "out": str(tmp_path / "out"), "actors": "0"})
    )
    assert made.suites["sts"] == pytest.approx(here.suites["sts"], abs=0.01)
    assert made.counts == here.counts
    assert Storage(s3.url("evaluation"), s3.access()).exists("evaluation.html")


def test_a_failing_job_fails_in_plain_words(cluster: RayCluster, s3: S3Server, model: Path) -> None:
    done = submit(cluster, s3, s3.url("nothing-here"), s3.url("out"), "--model", str(model))
    assert done.returncode == 1, "ray job submit exits 1 for any failed job"
    assert "nothing found at" in done.stdout or "no Parquet files" in done.stdout, done.stdout


def test_many_queries_are_searched_on_the_cluster(cluster: RayCluster, s3: S3Server, model: Path, tmp_path: Path) -> None:
    access = {"endpoint_url": s3.endpoint_url, "storage_options": s3.storage_options}
    texts = [f"document {row}" for row in range(200)]
    write(tmp_path / "in.parquet", texts, id=list(range(200)))
    llmemb_ray.embed(str(tmp_path / "in.parquet"), s3.url("out"), model=str(model), actors="0", quiet=True, rows_per_unit=20, prompt="none", **access)
    queries = [f"document {row}" for row in range(0, 200, 7)]
    storage = Storage(s3.url(), s3.access())
    storage.put("queries.txt", "\n".join(queries).encode())
    done = submit(cluster, s3, s3.url("out"), "--queries", s3.url("queries.txt"), "--out", s3.url("hits.parquet"), "--top-k", "3", job="search")
    assert done.returncode == 0, done.stdout + done.stderr
    hits = pq.read_table(pa.BufferReader(storage.read("hits.parquet"))).to_pylist()
    assert len(hits) == 3 * len(queries)
    best = [hit for hit in hits if hit["rank"] == 1]
    assert [texts[hit["id"]] for hit in best] == queries
    here = llmemb_ray.search_run(Run(Storage(s3.url("out"), s3.access())), queries, top_k=3)
    assert [hit["id"] for hit in hits] == [hit.id for found in here for hit in found]


def test_the_plan_job_prints_what_the_command_prints(model: Path, tmp_path: Path) -> None:
    write(tmp_path / "in.parquet", ["one text", "another"], id=[1, 2])
    arguments = [str(tmp_path / "in.parquet"), str(tmp_path / "out"), "--model", str(model), "--json"]
    done = subprocess.run([sys.executable, str(ROOT / "jobs" / "plan.py"), *arguments], capture_output=True, text=True, check=True, cwd=ROOT)
    assert json.loads(done.stdout)["rows"] == 2
    assert not (tmp_path / "out").exists()


def test_fine_tuning_runs_on_the_cluster_with_data_and_checkpoints_on_s3(cluster: RayCluster, s3: S3Server, model: Path) -> None:
    """On two workers; the adapter then embeds by its own representation."""
    s3.path("texts").mkdir()
    pq.write_table(pa.table({"text": ["a dog runs", "a cat"]}), s3.path("texts/a.parquet"))
    s3.path("train").mkdir()
    rows = [{"sent0": f"a dog runs {n}", "sent1": f"dog {n}", "hard_neg": f"a cat sleeps {n}"} for n in range(64)]
    pq.write_table(pa.Table.from_pylist(rows), s3.path("train/a.parquet"))
    s3.path("base").mkdir()
    for file in model.iterdir():
        s3.path(f"base/{file.name}").write_bytes(file.read_bytes())
    arguments = ["--model", s3.url("base"), "--train", s3.url("train"), "--out", s3.url("tuned"), "--batch-size", "8", "--epochs", "2"]
    done = submit(cluster, s3, *arguments, "--workers", "2", "--cpus-per-worker", "1", "--pooling", "mean", "--checkpoint-steps", "5", job="finetune")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "step 16/16, loss" in done.stdout
    assert s3.path("tuned/checkpoints/step-000016/complete.json").exists()
    assert s3.path("tuned/training.html").exists()
    embedded = submit(cluster, s3, s3.url("texts"), s3.url("vectors"), "--model", s3.url("base"), "--adapter", s3.url("tuned/adapter"), "--actors", "1")
    assert embedded.returncode == 0, embedded.stdout + embedded.stderr
    assert Run(Storage(s3.url("vectors"), s3.access())).plan.space["representation"]["pooling"] == "mean"


def test_training_data_is_made_on_the_cluster(cluster: RayCluster, s3: S3Server, tmp_path: Path) -> None:
    """By a model that a node loads, whose answers the schema holds to JSON; families that need no tasks."""
    for file in make_model(tmp_path / "llm", tokenizer=bytewise_tokenizer(), head=True, max_position_embeddings=1024).iterdir():
        Storage(s3.url("llm"), s3.access()).put(file.name, file.read_bytes())
    arguments = ["--model", s3.url("llm"), "--out", s3.url("made"), "--families", "{sts: 1, bitext: 1}", "--tasks-per-family", "0", "--no-check-language"]
    small = ["--count", "12", "--unit-rows", "2", "--max-new-tokens", "160", "--max-characters", "16"]
    done = submit(cluster, s3, *arguments, *small, "--actors", "1", "--cpus-per-actor", "1", job="synthesize")
    assert done.returncode == 0, done.stdout + done.stderr
    made = Synthesis.open(Storage(s3.url("made"), s3.access()))
    assert made is not None
    assert made.receipt is not None
    assert (made.receipt.units, made.receipt.asked) == (6, 12)
    assert made.receipt.accepted > 0
    examples, rejects = (sum(table.num_rows for _, table in made.tables(kind)) for kind in ("shard", "rejects"))
    assert (examples, rejects) == (made.receipt.accepted, 12 - made.receipt.accepted)
    assert verify_synthesis(made).problems == []
