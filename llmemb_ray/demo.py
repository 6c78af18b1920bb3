"""The demonstration: the documentation of Python's standard library, embedded, verified, searched and reported on.

The corpus is made on the spot and the model is the package's own, so that it runs on any machine without a network.
"""

from __future__ import annotations

import ast
import importlib.util
import inspect
import shlex
import sys
import sysconfig
from collections.abc import Iterator
from importlib.machinery import EXTENSION_SUFFIXES as _SUFFIXES
from pathlib import Path

import click
import pyarrow as pa
import pyarrow.parquet as pq

from llmemb_ray import cli
from llmemb_ray.embedders.models import POCKET
from llmemb_ray.errors import LlmembError

FILES = 4
"""Parquet files of the corpus."""

LEFT_OUT = {"site-packages", "test", "tests", "idlelib", "lib2to3", "__pycache__", "ensurepip", "turtledemo"}
EXTENSION_SUFFIXES = tuple(_SUFFIXES)
QUERIES = ("how do I read a csv file", "pick a random element of a list", "translate a host name into an ip address")


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


def run(directory: str, model: str | None = None) -> None:
    """Makes the corpus, then runs the commands that a user would type, showing each. model: the package's own if None. Raises LlmembError."""
    root = Path(directory)
    texts = make_corpus(root / "corpus")
    click.echo(f"corpus: {len(texts):,} docstrings of Python's standard library in {FILES} Parquet files ({root / 'corpus'})")
    output = str(root / "run")
    _llmemb("embed", str(root / "corpus"), output, "--model", model or POCKET, "--overwrite", "--token-budget", "4096")
    _llmemb("verify", output, "--against", str(root / "corpus"))
    for query in QUERIES:
        _llmemb("search", output, query, "--top-k", "3")
    _llmemb("report", output, "--out", str(root / "report.html"))


def _llmemb(*arguments: str) -> None:
    click.echo(f"\n$ llmemb {shlex.join(arguments)}")
    code = cli.main(arguments)
    if code:
        raise LlmembError(f"demo: 'llmemb {arguments[0]}' ended with exit code {code}")
