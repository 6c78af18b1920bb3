"""Data from the hub: fetched by the hub's own client, from a cache as it leaves one, and read by the suites."""

from __future__ import annotations

import gzip
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest

from llmemb_ray.errors import ConfigError
from llmemb_ray.evaluation import hub

COMMIT = "0123456789abcdef0123456789abcdef01234567"


def cached(home: Path, repository: str) -> Path:
    """The snapshot directory of a repository in a new cache."""
    directory = home / "hub" / f"datasets--{repository.replace('/', '--')}"
    (directory / "refs").mkdir(parents=True)
    (directory / "refs" / "main").write_text(COMMIT)
    (directory / "snapshots" / COMMIT).mkdir(parents=True)
    return directory / "snapshots" / COMMIT


@pytest.fixture
def home(tmp_path: Path) -> Path:
    """What the hub's client leaves: SentEval's archive with STS-B, and a collection of BEIR's."""
    home = tmp_path / "home"
    (tmp_path / "STS" / "STSBenchmark").mkdir(parents=True)
    (tmp_path / "STS" / "STSBenchmark" / "sts-dev.csv").write_text("g\tf\ty\t1\t4.0\ta man\ta boy\ng\tf\ty\t1\t1.0\ta cat\ta bus\n")
    with tarfile.open(cached(home, hub.SENTEVAL[0]) / hub.SENTEVAL[1], "w") as archive:
        archive.add(tmp_path / "STS", "STS")
    snapshot = cached(home, "BeIR/tiny")
    (snapshot / "corpus.jsonl.gz").write_bytes(gzip.compress(b'{"_id": "d", "title": "", "text": "a bus"}\n'))
    (snapshot / "queries.jsonl.gz").write_bytes(gzip.compress(b'{"_id": "q", "text": "which bus"}\n'))
    qrels = cached(home, "BeIR/tiny-qrels")
    for split in ("test", "train"):
        (qrels / f"{split}.tsv").write_text("query-id\tcorpus-id\tscore\nq\td\t1\n")
    return home


def test_archives_of_the_hub_are_laid_out_and_read(home: Path, tmp_path: Path) -> None:
    # In a process of its own: the hub's client reads its environment when it is imported.
    script = (
        "from llmemb_ray.errors import ConfigError, InputError\n"
        "from llmemb_ray.evaluation import beir, hub, sts\n"
        "for split in ('test', 'test', 'train', 'train'):\n"
        "    place = hub.place({'sts': [], 'retrieval': ['tiny', '/a/directory']}, split)\n"
        "print(sts.read(place, 'STS-B-dev').needs()[0].texts)\n"
        "print(sorted(path.relative_to(place.root / 'tiny').as_posix() for path in (place.root / 'tiny').rglob('*.*')))\n"
        "print((place.root / 'tiny' / '.commit').read_text().split())\n"
        "for name in ('none', 'no name'):\n"
        "    try:\n"
        "        hub.place({'retrieval': [name]}, 'test')\n"
        "    except (ConfigError, InputError) as error:\n"
        "        print(error)\n"
    )
    variables = {"HF_HOME": str(home), "HF_HUB_OFFLINE": "1", "LLMEMB_CACHE": str(tmp_path / "cache"), "PATH": "/usr/bin:/bin"}
    done = subprocess.run([sys.executable, "-c", script], env=variables, capture_output=True, text=True, check=False, cwd=Path(__file__).parents[2])
    assert done.returncode == 0, done.stderr
    texts, files, made_of, missing, no_name = done.stdout.splitlines()
    assert texts == "['a man', 'a cat', 'a boy', 'a bus']"
    assert files == "['.commit', 'corpus.jsonl', 'qrels/test.tsv', 'qrels/train.tsv', 'queries.jsonl']"
    assert made_of == str([word for name in ("corpus.jsonl.gz", "queries.jsonl.gz", "test.tsv", "train.tsv") for word in (name, COMMIT)])
    assert "corpus.jsonl.gz of BeIR/none is not in the local cache" in missing
    assert "BeIR/no name is no name of a data set on the hub" in no_name


def test_files_that_the_hub_does_not_hold_are_told_with_the_way_out() -> None:
    with pytest.raises(ConfigError, match=r"name a directory with --data, or --suite mteb:Tatoeba"):
        hub.place({"bitext": []}, "test")
