"""The documented way from nothing to vectors of a fine-tuned model, as its script has it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pyarrow.parquet as pq
import pytest
import yaml

from llmemb_ray.config import SynthesizeSettings
from llmemb_ray.synthesis.families import ASYMMETRIC, FAMILIES
from llmemb_ray.synthesis.prompts import wanted
from tests.generation.test_local import bytewise_tokenizer
from tests.small_models import make_model

REPRODUCE = Path(__file__).parents[2] / "jobs" / "reproduce" / "synthesis"


def short_prompts(path: Path) -> Path:
    """Prompts for models that see a token a character."""
    generate = {name: " ".join(f"{{{placeholder}}}" for placeholder in wanted(family)) for name, family in FAMILIES.items()}
    path.write_text(yaml.safe_dump({"brainstorm": {family: f"Tasks of {family}:" for family in ASYMMETRIC}, "generate": generate}))
    return path


@pytest.mark.timeout(300)
def test_the_script_goes_from_nothing_to_the_vectors_of_a_model_that_was_trained_on_what_it_wrote(tmp_path: Path) -> None:
    model = make_model(tmp_path / "model", tokenizer=bytewise_tokenizer(), head=True, max_position_embeddings=1024)
    given = {
        "LLM": str(model),
        "COUNT": "48",
        "TASKS": "2",
        "SYNTHESIZE": f"--prompts {short_prompts(tmp_path / 'prompts.yaml')} --max-characters 16 --max-new-tokens 400 --no-check-language --actors 0",
        "FINETUNE": "--batch-size 8 --micro-batch 8",
        "EMBED": "--actors 0",
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
        "HF_HUB_OFFLINE": "1",
    }
    ran = subprocess.run(["sh", str(REPRODUCE / "small.sh"), "out"], cwd=tmp_path, env=os.environ | given, capture_output=True, text=True, timeout=280)
    assert ran.returncode == 0, ran.stderr[-3000:]
    receipt = json.loads((tmp_path / "out/examples/_llmemb/receipt.json").read_text())
    assert receipt["asked"] == 48
    assert receipt["accepted"] > 40
    assert (tmp_path / "out/examples.html").stat().st_size > 10_000
    steps = json.loads((tmp_path / "out/tuned/adapter/training.json").read_text())["steps"]["done"]
    assert steps >= 3
    vectors = [pq.ParquetFile(path).metadata.num_rows for path in (tmp_path / "out/vectors/data").glob("*.parquet")]
    assert sum(vectors) == receipt["accepted"]


def test_the_papers_settings_are_settings() -> None:
    settings = SynthesizeSettings.make(yaml.safe_load((REPRODUCE / "paper2.yaml").read_text()))
    assert (settings.temperature, settings.top_p, settings.tasks_per_family * len(ASYMMETRIC)) == (1.0, 1.0, 112_500)
