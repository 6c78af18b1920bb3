"""The embedding job on the real vLLM: the same rows, counts and vectors as on transformers, whatever is killed."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

import llmemb_ray
from llmemb_ray import engines
from llmemb_ray.errors import CheckFailed, ConfigError, RunMismatch
from llmemb_ray.shards import commits as commit_records
from llmemb_ray.shards.receipt import PATH as RECEIPT
from llmemb_ray.shards.verify import verify
from llmemb_ray.storage import Storage
from tests.pipeline.conftest import ROOT
from tests.pipeline.killing import Driver, assert_as_undisturbed, kill
from tests.pipeline.poison import BREAKS, POISON
from tests.s3_server import S3Server
from tests.small_jobs import decoded, embed, opened
from tests.small_models import SENTENCES, make_model

pytestmark = [pytest.mark.vllm, pytest.mark.timeout(400)]


@pytest.fixture(scope="module")
def wide(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A LLaMA-style model whose attention heads vLLM has CPU kernels for."""
    return make_model(tmp_path_factory.mktemp("models") / "wide", hidden_size=64, num_attention_heads=2, num_key_value_heads=1)


def test_both_backends_write_the_same(corpus: Path, wide: Path, tmp_path: Path) -> None:
    settings = {"rows_per_unit": 7, "prompt": "prompteol-icl", "demo": ["A jockey riding a horse.=>Equestrian"], "dedup": "exact"}
    receipts = {backend: embed(corpus, tmp_path / backend, wide, backend=backend, **settings) for backend in ("hf", "vllm")}
    ours, theirs = decoded(tmp_path / "vllm"), decoded(tmp_path / "hf")
    assert ours.keys() == theirs.keys()
    assert max(float(np.abs(ours[key] - theirs[key]).max()) for key in ours) <= 1e-5
    for name in ("space", "rows_read", "rows_embedded", "rejects_by_reason", "tokens", "tokens_shareable", "copied", "truncated"):
        assert getattr(receipts["vllm"], name) == getattr(receipts["hf"], name)
    assert receipts["vllm"].run_key != receipts["hf"].run_key
    assert (receipts["vllm"].backends, receipts["hf"].backends) == ({"vllm": 24}, {"hf": 24})
    assert receipts["vllm"].versions["vllm"].startswith("0.32")
    assert 0 < receipts["vllm"].tokens_shared <= receipts["vllm"].tokens_shareable
    assert verify(opened(tmp_path / "vllm"), against=[str(corpus)]).problems == []


def test_a_search_embeds_its_query_in_the_same_space(corpus: Path, wide: Path, tmp_path: Path) -> None:
    embed(corpus, tmp_path / "out", wide, backend="vllm", prompt="none")
    (hit,) = llmemb_ray.search_run(opened(tmp_path / "out"), [f"{SENTENCES[13]} (13)"], top_k=1)[0]
    assert hit.id == "0-13"
    assert hit.score == pytest.approx(1, abs=1e-5)


def test_an_actor_and_a_driver_killed_in_the_middle_cost_nothing(server: S3Server, wide: Path) -> None:
    """vLLM's engine runs in the actor's process: this is also what its death looks like."""
    driver = Driver(server, wide, "--backend", "vllm")
    snapshots = [driver.wait_for_commits(4)]
    actors = driver.workers("EmbedUnits")
    assert actors, "the embedder actor was not found"
    kill(actors)
    snapshots.append(driver.wait_for_commits(len(snapshots[-1]) + 20))
    driver.process.kill()
    driver.process.wait()
    snapshots.append(driver.commits())
    Driver(server, wide).finish()  # Without a backend: the run goes on with its own.
    assert_as_undisturbed(server, wide, snapshots)


def interrupted(output: Path, keep: int) -> None:
    """Makes of a finished run one that was stopped after ``keep`` of its units."""
    storage = Storage(str(output))
    commits = opened(output).commits
    storage.delete([RECEIPT, commit_records.COMPACTED])
    for commit in commits[:keep]:
        commit_records.write(storage, commit)


def test_a_run_goes_on_with_another_backend_once_they_agree(corpus: Path, wide: Path, tmp_path: Path) -> None:
    settings: dict[str, Any] = {"rows_per_unit": 10, "actors": "0"}
    embed(corpus, tmp_path / "plain", wide, backend="hf", **settings)
    begun = embed(corpus, tmp_path / "out", wide, backend="vllm", **settings)
    interrupted(tmp_path / "out", keep=6)
    with pytest.raises(RunMismatch, match=r"begun with backend vllm, asked for now is hf.*--accept-backend-change --check-parity"):
        embed(corpus, tmp_path / "out", wide, backend="hf", **settings)
    with pytest.raises(ConfigError, match="accept_backend_change: needs check_parity"):
        embed(corpus, tmp_path / "out", wide, backend="hf", accept_backend_change=True, **settings)
    receipt = embed(corpus, tmp_path / "out", wide, backend="hf", accept_backend_change=True, check_parity=8, **settings)
    assert receipt.backends == {"vllm": 6, "hf": begun.units - 6}
    assert (receipt.rows_read, receipt.rows_embedded, receipt.generation) == (begun.rows_read, begun.rows_embedded, 1)
    assert verify(opened(tmp_path / "out"), against=[str(corpus)]).problems == []
    ours, theirs = decoded(tmp_path / "out"), decoded(tmp_path / "plain")
    assert ours.keys() == theirs.keys()
    assert max(float(np.abs(ours[key] - theirs[key]).max()) for key in ours) <= 1e-5
    assert embed(corpus, tmp_path / "out", wide, **settings).run_key == receipt.run_key, "auto keeps to the backend the run has now"


def test_a_backend_that_was_told_to_round_is_another_run(corpus: Path, wide: Path, tmp_path: Path) -> None:
    settings: dict[str, Any] = {"rows_per_unit": 10, "actors": "0", "compute_dtype": "bfloat16"}
    embed(corpus, tmp_path / "out", wide, backend="hf", **settings)
    interrupted(tmp_path / "out", keep=6)
    with pytest.raises(RunMismatch, match=r"engine_args.*kv_cache_dtype"):
        embed(*(corpus, tmp_path / "out", wide), backend="vllm", engine_arg=["kv_cache_dtype=fp8"], accept_backend_change=True, check_parity=8, **settings)


def test_a_run_whose_backend_cannot_be_compared_stays_as_it_is(corpus: Path, wide: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    settings: dict[str, Any] = {"rows_per_unit": 10, "actors": "0"}
    embed(corpus, tmp_path / "out", wide, backend="vllm", **settings)
    interrupted(tmp_path / "out", keep=6)
    key = opened(tmp_path / "out").plan.run_key
    monkeypatch.setattr(engines, "vllm_version", lambda: None)
    with pytest.raises(CheckFailed, match="backend vllm, which the run was begun with, could not be compared here: vLLM is not installed"):
        embed(corpus, tmp_path / "out", wide, backend="hf", accept_backend_change=True, check_parity=8, **settings)
    assert opened(tmp_path / "out").plan.run_key == key


@pytest.fixture
def ray_with_poison() -> Iterator[None]:
    import ray

    environment = {"PYTHONPATH": ROOT, "HF_HUB_OFFLINE": "1", BREAKS: "1"}
    runtime_env = {"worker_process_setup_hook": "tests.pipeline.poison.install", "env_vars": environment}
    ray.init(address="local", num_cpus=2, include_dashboard=False, log_to_driver=False, logging_level="ERROR", runtime_env=runtime_env)
    yield
    ray.shutdown()


@pytest.mark.usefixtures("ray_with_poison")
def test_a_row_that_breaks_its_engine_is_found_and_rejected_with_what_the_engine_said(wide: Path, tmp_path: Path) -> None:
    pq.write_table(pa.table({"text": ["one", "two", POISON, "four"]}), tmp_path / "in.parquet")
    receipt = llmemb_ray.embed(
        *(str(tmp_path / "in.parquet"), str(tmp_path / "out")), model=str(wide), backend="vllm", actors="1", max_attempts=1, retry_wait=0.1, quiet=True
    )
    assert receipt.rejects_by_reason == {"kills_engine": 1}
    assert receipt.rows_embedded == 3
    (rejects,) = opened(tmp_path / "out").rejects()
    assert rejects["source_row"].to_pylist() == [2]
    assert "an illegal memory access was encountered" in rejects["detail"][0].as_py()
