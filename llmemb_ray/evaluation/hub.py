"""Data sets from the Hugging Face hub, laid out in this node's cache as they are read from a directory.

Invariant: what is laid out is whole: it is made beside its place and moved there, and ``.commit`` names each file that it was made of with
the commit of the hub's repository. Only what the suites asked for is fetched.
"""

from __future__ import annotations

import gzip
import os
import shutil
import tarfile
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from llmemb_ray.errors import ConfigError, InputError
from llmemb_ray.evaluation import beir
from llmemb_ray.evaluation.data import DataPlace
from llmemb_ray.storage import cache_directory

HUB = "hub"
"""In place of a directory of data sets."""

SENTEVAL = "princeton-nlp/datasets-for-simcse", "senteval.tar"
"""SentEval's data/downstream as SimCSE published it, which paper 1's evaluation downloads."""

BEIR = "BeIR"
"""Holds NAME (corpus.jsonl.gz, queries.jsonl.gz) and NAME-qrels (SPLIT.tsv) for each of BEIR's collections."""

COMMIT = ".commit"


def place(suites: Mapping[str, Sequence[str]], split: str) -> DataPlace:
    """A directory that holds the data of ``suites`` (names of tasks by suite), fetched where it is not there yet; collections named by a path are not.

    Raises ConfigError for a suite whose files the hub does not hold, InputError for what cannot be fetched.
    """
    root = cache_directory("data")
    for suite, tasks in suites.items():
        if suite in ("sts", "transfer"):
            archive = _fetch(*SENTEVAL)
            _lay_out(root / "senteval" / "downstream", [archive], _unpack)
        elif suite == "retrieval":
            if not tasks:
                raise ConfigError("suite: name the collections to fetch from the hub, such as retrieval:scifact,nfcorpus")
            for name in tasks:
                if not beir.is_path(name):
                    files = [_fetch(f"{BEIR}/{name}", "corpus.jsonl.gz"), _fetch(f"{BEIR}/{name}", "queries.jsonl.gz")]
                    judgements = _fetch(f"{BEIR}/{name}-qrels", f"{split}.tsv")
                    _lay_out(root / name, files, _collection)
                    _add_judgements(root / name, judgements)
        else:
            instead = "--suite mteb:STS12,… has the raw pairs" if suite == "sts-raw" else "--suite mteb:Tatoeba has its own form of them"
            raise ConfigError(f"data: the hub does not hold the files of {suite} as they are read here; name a directory with --data, or {instead}")
    return DataPlace(root)


def _fetch(repository: str, name: str) -> Path:
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        return Path(hf_hub_download(repository, name, repo_type="dataset"))
    except LocalEntryNotFoundError as error:
        raise InputError(
            f"data: {name} of {repository} is not in the local cache, and the hub cannot be reached (or HF_HUB_OFFLINE is set); "
            f"fetch it where there is a network (hf download --repo-type dataset {repository} {name}) and bring HF_HOME along, or name a directory with --data"
        ) from error
    except HfHubHTTPError as error:
        raise InputError(f"data: the hub has no {name} of {repository} for you: {str(error).splitlines()[0]}") from error
    except HFValidationError as error:
        raise ConfigError(f"data: {repository} is no name of a data set on the hub; name a directory with --data") from error


def _lay_out(directory: Path, files: Sequence[Path], write: Callable[[Sequence[Path], Path], None]) -> None:
    """Makes ``directory`` of downloaded files, unless it was made of the same ones."""
    if _commits(files).items() <= _there(directory).items():
        return
    directory.parent.mkdir(parents=True, exist_ok=True)
    made = Path(tempfile.mkdtemp(prefix=f".{directory.name}-", dir=directory.parent))
    try:
        write(files, made)
        _note(made, _commits(files))
        old = made.with_name(made.name + "-old")
        if directory.exists():
            directory.rename(old)
        os.replace(made, directory)
        shutil.rmtree(old, ignore_errors=True)
    finally:
        shutil.rmtree(made, ignore_errors=True)


def _add_judgements(directory: Path, file: Path) -> None:
    """Those of one split, beside those of other splits."""
    there = _there(directory)
    if _commits([file]).items() <= there.items():
        return
    (directory / "qrels").mkdir(exist_ok=True)
    made = directory / "qrels" / f".{file.name}-{os.getpid()}"
    shutil.copy(file, made)
    os.replace(made, directory / "qrels" / file.name)
    _note(directory, there | _commits([file]))


def _note(directory: Path, commits: Mapping[str, str]) -> None:
    made = directory / f"{COMMIT}-{os.getpid()}"
    made.write_text("".join(f"{name} {commit}\n" for name, commit in commits.items()))
    os.replace(made, directory / COMMIT)


def _there(directory: Path) -> dict[str, str]:
    """What ``_note`` wrote; nothing where no one did, or an earlier version that left out the names."""
    try:
        return dict(line.split() for line in (directory / COMMIT).read_text().splitlines())
    except (FileNotFoundError, ValueError):
        return {}


def _commits(files: Sequence[Path]) -> dict[str, str]:
    """By name: the hub's cache names a snapshot's directory by its commit."""
    return {file.name: file.parent.name for file in files}


def _unpack(files: Sequence[Path], directory: Path) -> None:
    try:
        with tarfile.open(files[0]) as archive:
            archive.extractall(directory, filter="data")
    except tarfile.TarError as error:
        raise InputError(f"data: {files[0]} cannot be unpacked: {error}; delete it, so that it is fetched again") from error


def _collection(files: Sequence[Path], directory: Path) -> None:
    for file in files:
        try:
            with gzip.open(file, "rb") as packed, (directory / file.name.removesuffix(".gz")).open("wb") as plain:
                shutil.copyfileobj(packed, plain)
        except (OSError, EOFError) as error:
            raise InputError(f"data: {file} cannot be unpacked: {error}; delete it, so that it is fetched again") from error
