"""The demonstration: the documentation of Python's standard library, embedded, verified, searched and reported on.

Corpus and model are made on the spot, so that it runs on any machine without a network. The model is a real
LLaMA-architecture decoder of one layer whose weights are set by a seed and by word counts, not trained: its
attention gives each token weight by its rarity, so that the last position holds a weighted sum of random token
vectors. It finds shared words and knows nothing of meaning.
"""

from __future__ import annotations

import ast
import importlib.util
import inspect
import math
import shlex
import sys
import sysconfig
from collections import Counter
from collections.abc import Iterator
from importlib.machinery import EXTENSION_SUFFIXES as _SUFFIXES
from pathlib import Path

import click
import pyarrow as pa
import pyarrow.parquet as pq

from llmemb_ray import cli
from llmemb_ray.errors import LlmembError

FILES = 4
"""Parquet files of the corpus."""

LEFT_OUT = {"site-packages", "test", "tests", "idlelib", "lib2to3", "__pycache__", "ensurepip", "turtledemo"}
EXTENSION_SUFFIXES = tuple(_SUFFIXES)
QUERIES = ("read a csv file", "compress data with gzip", "send an email over smtp")

VOCABULARY = 16384
HIDDEN = 256
POSITIONS = 512
RARITY_SHARPNESS = 0.8
"""Weight of a token in the sum is rarity (in nats) to the e, times this: 0 is a plain mean."""
ATTENTION_SCALE = 50.0
"""How much the weighted sum outweighs the last token's own vector, which is the same for every text."""


def docstrings(root: Path) -> Iterator[tuple[str, str]]:
    """(qualified name, docstring) of each documented module, class and function of the library's Python sources."""
    for path in sorted(root.rglob("*.py")):
        parts = path.relative_to(root).with_suffix("").parts
        if LEFT_OUT & set(parts):
            continue
        try:
            tree = ast.parse(path.read_bytes())
        except (SyntaxError, ValueError):
            continue  # A deliberately broken or foreign file of the library.
        module = ".".join(parts[:-1] if parts[-1] == "__init__" else parts)
        yield from _documented(tree, module)


def _documented(node: ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef, name: str) -> Iterator[tuple[str, str]]:
    text = ast.get_docstring(node)
    if text:
        yield name, text
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            yield from _documented(child, f"{name}.{child.name}")


def compiled_docstrings() -> Iterator[tuple[str, str]]:
    """(qualified name, docstring) of the modules written in C and their public functions, classes and methods."""
    for name in sorted(sys.stdlib_module_names):
        if name.startswith(("_test", "_xx", "xx", "_tkinter", "_ctypes_test")):
            continue
        spec = importlib.util.find_spec(name)
        if spec is None or not (spec.origin == "built-in" or str(spec.origin).endswith(EXTENSION_SUFFIXES)):
            continue
        module = importlib.import_module(name)
        yield from _inspected(module, name)


def _inspected(holder: object, name: str) -> Iterator[tuple[str, str]]:
    text = inspect.getdoc(holder)
    if text:
        yield name, text
    for key, value in sorted(vars(holder).items()):
        if key.startswith("_"):
            continue
        if inspect.isclass(value) and inspect.ismodule(holder):
            yield from _inspected(value, f"{name}.{key}")
        elif inspect.isroutine(value) and value.__doc__:
            yield f"{name}.{key}", inspect.cleandoc(value.__doc__)


def make_corpus(directory: Path) -> list[str]:
    """Writes the corpus (columns id, text) as Parquet files and returns the texts."""
    rows = dict(compiled_docstrings()) | dict(docstrings(Path(sysconfig.get_path("stdlib"))))
    directory.mkdir(parents=True, exist_ok=True)
    names = sorted(rows)
    size = -(-len(names) // FILES)
    for number in range(FILES):
        part = names[number * size : (number + 1) * size]
        pq.write_table(pa.table({"id": part, "text": [rows[name] for name in part]}), directory / f"stdlib-{number}.parquet", row_group_size=1000)
    return [rows[name] for name in names]


def make_model(directory: Path, texts: list[str], *, seed: int = 0) -> None:
    """Makes the model and its tokenizer out of the texts and a seed, and saves them as any transformers model is."""
    import torch
    from tokenizers import Tokenizer, normalizers, pre_tokenizers, processors, trainers
    from tokenizers import models as token_models
    from transformers import LlamaConfig, LlamaModel, PreTrainedTokenizerFast

    from llmemb_ray.embedders.models import quiet_transformers

    tokenizer = Tokenizer(token_models.BPE())
    tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Punctuation(), pre_tokenizers.ByteLevel(add_prefix_space=True)])
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=VOCABULARY, special_tokens=["<s>", "</s>"], initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    seen = Counter(token for encoding in tokenizer.encode_batch(texts) for token in set(encoding.ids))
    vocabulary = tokenizer.get_vocab_size()
    rarity = torch.tensor([math.log((1 + len(texts)) / (1 + seen[token])) for token in range(vocabulary)])

    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=HIDDEN,
        intermediate_size=8,
        num_hidden_layers=1,
        num_attention_heads=1,
        num_key_value_heads=1,
        max_position_embeddings=POSITIONS,
        rope_parameters={"rope_type": "default", "rope_theta": 1e12},
        bos_token_id=0,
        eos_token_id=1,
    )
    model = LlamaModel(config)
    # The last two dimensions hold a constant and the rarity; rotary positions turn that pair by next to nothing.
    constant, rare = HIDDEN // 2 - 1, HIDDEN - 1
    embedding = torch.randn(vocabulary, HIDDEN)
    embedding[:, constant], embedding[:, rare] = 1.0, rarity
    layer = model.layers[0]
    with torch.no_grad():
        model.embed_tokens.weight.copy_(embedding)
        for parameter in layer.parameters():
            if parameter.dim() == 2:
                parameter.zero_()
        layer.self_attn.q_proj.weight[rare, constant] = math.sqrt(HIDDEN) * RARITY_SHARPNESS
        layer.self_attn.k_proj.weight[rare, rare] = 1.0
        content = torch.ones(HIDDEN)
        content[[constant, rare]] = 0.0
        layer.self_attn.v_proj.weight.copy_(torch.diag(content))
        layer.self_attn.o_proj.weight.copy_(torch.eye(HIDDEN) * ATTENTION_SCALE)
    with quiet_transformers():
        model.save_pretrained(directory)
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", model_max_length=POSITIONS).save_pretrained(directory)


def run(directory: str, model: str | None = None) -> None:
    """Makes what is missing, then runs the commands that a user would type, showing each. Raises LlmembError."""
    root = Path(directory)
    texts = make_corpus(root / "corpus")
    click.echo(f"corpus: {len(texts):,} docstrings of Python's standard library in {FILES} Parquet files ({root / 'corpus'})")
    prompt: tuple[str, ...] = ()
    if model is None:
        model = str(root / "model")
        prompt = ("--prompt", "none")  # Words of a template would outweigh those of the text: nobody taught this model to follow one.
        make_model(Path(model), texts)
        click.echo(f"model: a one-layer decoder made from a seed and word counts, not trained ({model})")
    output = str(root / "run")
    _llmemb("embed", str(root / "corpus"), output, "--model", model, *prompt, "--overwrite", "--token-budget", "4096")
    _llmemb("verify", output, "--against", str(root / "corpus"))
    for query in QUERIES:
        _llmemb("search", output, query, "--top-k", "3")
    _llmemb("report", output, "--out", str(root / "report.html"))


def _llmemb(*arguments: str) -> None:
    click.echo(f"\n$ llmemb {shlex.join(arguments)}")
    code = cli.main(arguments)
    if code:
        raise LlmembError(f"demo: 'llmemb {arguments[0]}' ended with exit code {code}")
