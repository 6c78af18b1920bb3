"""What the pocket model learns from: the teacher's vectors, reduced, beside their texts; and the first token embeddings.

Invariant: row i of the targets belongs to row i of the corpus; the reduction keeps products of vectors as well as so many dimensions can.
"""

from __future__ import annotations

from pathlib import Path

import click
import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq

from pocket_model import start, teacher

FILES = 8

SAMPLE = 4000
"""Texts on which the loss by reduction is told."""

RIDGE = 4.0
"""Pull of a token's embedding towards the teacher's vector of its string, in occurrences: a token in few texts stays near it."""

ITERATIONS = 40
"""Of conjugate gradients; the residual is told."""

Floats = npt.NDArray[np.float32]


def write(corpus: Path, parts: Path, out: Path) -> Floats:
    """Writes the targets as Parquet (columns anchor, teacher: float32 list of ``start.TARGET``) and returns the reduction [T, start.TARGET]."""
    texts = pq.read_table(corpus, columns=["text"])["text"].combine_chunks()
    vectors_NT = teacher.read(parts)
    if len(vectors_NT) != len(texts):
        raise click.ClickException(f"{parts} holds vectors of {len(vectors_NT):,} texts, {corpus} has {len(texts):,}; run the step 'teach' to its end")
    basis = teacher.reduction(vectors_NT, start.TARGET)
    reduced = vectors_NT @ basis
    some, less = vectors_NT[:SAMPLE], reduced[:SAMPLE] / np.linalg.norm(reduced[:SAMPLE], axis=1, keepdims=True)
    above = np.triu_indices(len(some), 1)
    agree = np.corrcoef((some @ some.T)[above], (less @ less.T)[above])[0, 1]
    click.echo(f"targets: {basis.shape[0]} to {basis.shape[1]} dimensions, correlation of the cosines of all pairs of {len(some):,} texts {agree:.4f}")
    out.mkdir(parents=True, exist_ok=True)
    size = -(-len(texts) // FILES)
    for number in range(FILES):
        rows = slice(number * size, min((number + 1) * size, len(texts)))
        flat = pa.array(np.ascontiguousarray(reduced[rows]).ravel())
        column = pa.FixedSizeListArray.from_arrays(flat, start.TARGET).cast(pa.list_(pa.float32()))
        pq.write_table(pa.table({"anchor": texts[rows], "teacher": column}), out / f"targets-{number}.parquet")
    return basis


def embeddings(corpus: Path, targets: Path, tokenizer_json: Path, strings_VD: Floats) -> Floats:
    """float32 [V, D]: token embeddings whose mean over a text comes nearest to its target, by least squares.

    strings_VD: the teacher's reduced vectors of the tokens' strings; the solution starts from them and is pulled towards them.
    """
    from scipy import sparse
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(tokenizer_json))
    texts = pq.read_table(corpus, columns=["text"])["text"].to_pylist()
    rows = [encoding.ids for encoding in tokenizer.encode_batch(texts)]
    counts = np.array([len(row) for row in rows])
    wanted_ND = pq.read_table(targets, columns=["teacher"])["teacher"].combine_chunks().flatten().to_numpy().reshape(-1, start.TARGET)
    weights = np.repeat(1.0 / counts, counts).astype(np.float32)
    indices = np.concatenate([np.asarray(row, np.int32) for row in rows])
    texts_NV = sparse.csr_matrix((weights, indices, np.concatenate([[0], np.cumsum(counts)])), shape=(len(rows), len(strings_VD)), dtype=np.float32)
    pull = RIDGE / float(np.mean(counts)) ** 2
    gram_VV = (texts_NV.T @ texts_NV).tocsr()
    start_VD = strings_VD * float((texts_NV @ strings_VD * wanted_ND).sum() / np.square(texts_NV @ strings_VD).sum())
    found, residual = start_VD.copy(), texts_NV.T @ wanted_ND - gram_VV @ start_VD
    direction, size = residual.copy(), np.square(residual).sum(axis=0)
    first = size.sum()
    for _ in range(ITERATIONS):
        product = gram_VV @ direction + pull * direction
        step = size / np.maximum((direction * product).sum(axis=0), 1e-20)
        found += step * direction
        residual -= step * product
        now = np.square(residual).sum(axis=0)
        direction = residual + (now / np.maximum(size, 1e-20)) * direction
        size = now
    click.echo(f"embeddings: least squares over {len(rows):,} texts, residual {np.sqrt(size.sum() / first):.4f} of the first")
    return np.asarray(found, np.float32)
