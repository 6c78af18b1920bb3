"""Fixtures that several tests share. Real models, real files; nothing here stands in for an engine."""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

from llmemb_ray import cli, engines
from tests.small_models import SENTENCES, make_model

pytest_plugins = ["tests.s3_server"]

SHARED = Path(os.environ.get("LLMEMB_DATA", Path(__file__).parents[2] / "shared" / "data"))


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if engines.vllm_version() is None:
        missing = pytest.mark.skip(reason="vLLM is not installed in this environment; make test builds one that has it")
        for item in items:
            if item.get_closest_marker("vllm"):
                item.add_marker(missing)


@pytest.fixture(scope="session")
def data() -> Path:
    """Real evaluation data."""
    if not SHARED.is_dir():
        pytest.skip(f"no evaluation data at {SHARED}; set LLMEMB_DATA")
    return SHARED


@pytest.fixture(scope="session")
def real_models() -> Path:
    """Small real models and tokenizers, beside the data."""
    models = SHARED.parent / "models"
    if not models.is_dir():
        pytest.skip(f"no real models at {models}; set LLMEMB_DATA to a data directory with 'models' beside it")
    return models


@pytest.fixture(scope="session")
def tokenizers(real_models: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Directories with real tokenizers, saved by transformers from the vocabularies as their authors published them."""
    from transformers import GPT2Tokenizer, LlamaTokenizer

    sources: dict[str, tuple[Any, dict[str, str], dict[str, Any]]] = {
        "opt": (
            GPT2Tokenizer,
            {"opt_tokenizer/vocab.json": "vocab.json", "opt_tokenizer/merges.txt": "merges.txt"},
            {"bos_token": "</s>", "eos_token": "</s>", "unk_token": "</s>", "pad_token": "<pad>", "add_bos_token": True},
        ),
        "gpt2": (GPT2Tokenizer, {"gpt2_tokenizer/encoder.json": "vocab.json", "gpt2_tokenizer/vocab.bpe": "merges.txt"}, {}),
        "llama2": (LlamaTokenizer, {"llama2_tokenizer/tokenizer.model": "tokenizer.model"}, {"add_bos_token": True}),
        "mistral": (LlamaTokenizer, {"mistral_tokenizer/tokenizer.model.v1": "tokenizer.model"}, {"add_bos_token": True}),
    }
    directories = {"tinystories": real_models / "TinyStories-656K"}
    for kind, (class_, files, options) in sources.items():
        original, directories[kind] = tmp_path_factory.mktemp(f"{kind}-original"), tmp_path_factory.mktemp(kind)
        for source, name in files.items():
            shutil.copy(real_models / source, original / name)
        class_.from_pretrained(original, **options).save_pretrained(directories[kind])
    return directories


@pytest.fixture(scope="session")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A LLaMA-style model of a few thousand parameters."""
    return make_model(tmp_path_factory.mktemp("models") / "llama")


@pytest.fixture
def corpus(tmp_path: Path) -> Path:
    """Three files of 40 rows in row groups of 15, ids unique, text of many kinds; one null and one blank text."""
    directory = tmp_path / "corpus"
    directory.mkdir()
    for file in range(3):
        texts: list[str | None] = [f"{SENTENCES[(file + row) % len(SENTENCES)]} ({row})" for row in range(40)]
        if file == 1:
            texts[7], texts[23] = None, "   "
        pq.write_table(pa.table({"id": [f"{file}-{row}" for row in range(40)], "text": texts}), directory / f"part-{file}.parquet", row_group_size=15)
    return directory


class Shown:
    """What a command printed, and its exit code."""

    def __init__(self, code: int, out: str, err: str) -> None:
        self.code, self.out, self.err = code, out, err


@pytest.fixture
def llmemb(capsys: pytest.CaptureFixture[str]) -> Any:
    def run(*arguments: object) -> Shown:
        code = cli.main([str(argument) for argument in arguments])
        shown = capsys.readouterr()
        return Shown(code, shown.out, shown.err)

    return run
