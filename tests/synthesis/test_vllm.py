"""A synthesis by the real vLLM, in actors and behind its own server: random models, but answers that follow their schemas."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
import yaml

from llmemb_ray.config import SynthesizeSettings
from llmemb_ray.synthesis.families import ASYMMETRIC, FAMILIES
from llmemb_ray.synthesis.job import synthesize
from llmemb_ray.synthesis.prompts import wanted
from llmemb_ray.synthesis.receipt import Receipt
from tests.generation.test_local import TEMPLATE, bytewise_tokenizer
from tests.small_models import make_model

pytestmark = [pytest.mark.vllm, pytest.mark.timeout(400)]

COUNT = 90
CHARACTERS = 16
START_SECONDS = 240.0

WHOLE_PROMPTS = ("--no-enable-chunked-prefill",)
"""On a CPU vLLM 0.32's engine dies where a prompt with a seed comes in two parts: it asks torch's generator there for an offset, which it has not."""

GRAMMAR = ("--structured-outputs-config", '{"backend": "guidance", "disable_any_whitespace": true}')
"""The server's own choice, xgrammar, lets control characters into strings of bounded length, which is no JSON; a random model makes much use of it."""


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model that chats, whose attention heads vLLM has CPU kernels for, with short prompts and tasks."""
    directory = tmp_path_factory.mktemp("made")
    tokenizer = bytewise_tokenizer()
    tokenizer.chat_template = TEMPLATE
    heads: dict[str, Any] = {"hidden_size": 64, "num_attention_heads": 2, "num_key_value_heads": 1, "max_position_embeddings": 1024}
    make_model(directory / "model", tokenizer=tokenizer, head=True, **heads)
    generate = {name: " ".join(f"{{{placeholder}}}" for placeholder in wanted(family)) for name, family in FAMILIES.items()}
    (directory / "prompts.yaml").write_text(yaml.safe_dump({"generate": generate}))
    (directory / "tasks.jsonl").write_text("".join(json.dumps({"family": family, "task": f"Find what fits, {family}."}) + "\n" for family in ASYMMETRIC))
    return directory


@pytest.fixture
def server(made: Path) -> Iterator[str]:
    """vLLM's own OpenAI-compatible server."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    options = ["--model", str(made / "model"), "--served-model-name", "tiny", "--dtype", "float32", "--max-model-len", "1024", "--max-num-seqs", "16"]
    with open(made / "server.log", "wb") as log:
        process = subprocess.Popen(
            [
                sys.executable,
                "-m",
                "vllm.entrypoints.openai.api_server",
                "--host",
                "127.0.0.1",
                "--port",
                str(port),
                "--enforce-eager",
                *WHOLE_PROMPTS,
                *GRAMMAR,
                *options,
            ],
            env=os.environ | {"VLLM_CPU_KVCACHE_SPACE": "1", "HF_HUB_OFFLINE": "1", "VLLM_NO_USAGE_STATS": "1"},
            stdout=log,
            stderr=subprocess.STDOUT,
        )
    try:
        deadline = time.monotonic() + START_SECONDS
        while not _answers(f"http://127.0.0.1:{port}/health"):
            assert process.poll() is None, (made / "server.log").read_text()[-3000:]
            assert time.monotonic() < deadline, (made / "server.log").read_text()[-3000:]
            time.sleep(0.5)
        yield f"http://127.0.0.1:{port}/v1"
    finally:
        process.terminate()
        try:
            process.wait(20)
        except subprocess.TimeoutExpired:
            process.kill()


def _answers(url: str) -> bool:
    try:
        with urllib.request.urlopen(url, timeout=2) as response:
            return bool(response.status == 200)
    except (urllib.error.URLError, OSError):
        return False


def require_examples(made: Path, out: Path, **values: Any) -> Receipt:
    """A run whose examples are well-formed, of all families."""
    common = {
        "count": COUNT,
        "unit_rows": 30,
        "prompts": str(made / "prompts.yaml"),
        "tasks": [str(made / "tasks.jsonl")],
        "tasks_per_family": 0,
        "families": dict.fromkeys(FAMILIES, 1),
        "languages": {"en": 1, "de": 1},
        "check_language": False,
        "max_characters": CHARACTERS,
        "max_new_tokens": 400,
    }
    receipt = synthesize(SynthesizeSettings.make({"out": str(out), **common, **values}), quiet=True)
    assert isinstance(receipt, Receipt)
    assert receipt.asked == COUNT == receipt.accepted + receipt.rejected + receipt.duplicates
    assert receipt.accepted >= 50, receipt.reasons
    assert set(receipt.families) == set(FAMILIES)
    assert receipt.prompt_tokens > COUNT
    assert receipt.completion_tokens > 10 * COUNT
    rows = [row for file in (out / "data").glob("*.parquet") for row in pq.ParquetFile(file).read().to_pylist()]
    assert len({row["row"] for row in rows}) == len(rows) == receipt.accepted
    for row in rows:
        texts = [row["query"], row["positive"], *([row["negative"]] if FAMILIES[row["family"]].negative else [])]
        assert all(1 <= len(text) <= CHARACTERS and text == text.strip() for text in texts)
        assert (row["negative"] is None) == (FAMILIES[row["family"]].negative is None)
        assert row["instruction"] == (FAMILIES[row["family"]].instruction or f"Find what fits, {row['family']}.")
    return receipt


def test_actors_that_hold_an_engine_write_examples(made: Path, tmp_path: Path) -> None:
    loaded = {"model": str(made / "model"), "engine": "vllm", "compute_dtype": "float32"}
    receipt = require_examples(made, tmp_path, **loaded, actors="1", ray_address="local")
    assert "vllm" in receipt.generator


def test_the_openai_compatible_server_writes_examples(made: Path, tmp_path: Path, server: str) -> None:
    require_examples(made, tmp_path, llm="tiny", base_url=server, concurrency=16)
