"""The documentation: every ``llmemb`` command in it runs as written, its Python compiles, its links lead somewhere.

Commands run in the order of their page, with an S3 server that has the buckets they name, a hub cache that has the models they name, and a
Ray cluster, so that nothing in them is changed.
"""

from __future__ import annotations

import ast
import json
import re
import shlex
import shutil
import subprocess
import sys
import textwrap
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.ray_cluster import ENVIRONMENT, RayCluster
from tests.s3_server import S3Server
from tests.small_jobs import embed, write
from tests.small_models import SENTENCES, make_model

pytestmark = pytest.mark.timeout(300)

ROOT = Path(__file__).parents[1]
PAGES = sorted([ROOT / "README.md", *(ROOT / "docs").glob("*.md"), ROOT / "cluster" / "README.md", ROOT / "benchmarks" / "README.md"])
COMMIT = "0123456789abcdef0123456789abcdef01234567"
MODELS = ("facebook/opt-125m", "facebook/opt-1.3b")


def blocks(page: Path, language: str) -> list[str]:
    return [textwrap.dedent(body) for body in re.findall(rf"^```{language}\n(.*?)^```$", page.read_text(encoding="utf-8"), re.DOTALL | re.MULTILINE)]


def commands(page: Path) -> list[list[str]]:
    """The words of each ``$ llmemb`` line; blocks that show a make target's output are that target's to test."""
    found = []
    for block in blocks(page, "console"):
        if block.startswith("$ make "):
            continue
        for line in block.replace("\\\n", " ").splitlines():
            if line.startswith("$ llmemb "):
                found.append(shlex.split(line.removeprefix("$ "), comments=True))
    return found


@pytest.fixture(scope="module")
def hub(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A hub cache as transformers leaves it, with a small OPT under each name that the pages use."""
    home = tmp_path_factory.mktemp("hub")
    made = make_model(tmp_path_factory.mktemp("model") / "opt", "opt")
    for name in MODELS:
        directory = home / "hub" / f"models--{name.replace('/', '--')}"
        shutil.copytree(made, directory / "snapshots" / COMMIT)
        (directory / "refs").mkdir()
        (directory / "refs" / "main").write_text(COMMIT)
    return home


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[S3Server]:
    server = S3Server(tmp_path_factory.mktemp("s3"))
    server.bucket = "bucket"
    yield server
    server.kill()


@pytest.fixture(scope="module")
def environment(server: S3Server, hub: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """What a user of the pages has set, on the nodes as where the commands are typed."""
    cache = tmp_path_factory.mktemp("cache")
    return server.environment | {"HF_HOME": str(hub), "HF_HUB_OFFLINE": "1", "LLMEMB_CACHE": str(cache), "PYTHONPATH": str(ROOT), "COLUMNS": "160"}


@pytest.fixture(scope="module")
def cluster(environment: dict[str, str]) -> Iterator[RayCluster]:
    cluster = RayCluster(workers=2, environment=environment)
    yield cluster
    cluster.stop()


@pytest.fixture
def bucket(server: S3Server) -> S3Server:
    """The server with nothing but the corpora that the pages name; started anew, since it remembers what it has listed."""
    server.kill()
    shutil.rmtree(server.path(), ignore_errors=True)
    texts = [f"{SENTENCES[row % len(SENTENCES)]} ({row // 3})" for row in range(60)]
    for name, rows in (("corpus", range(60)), ("corpus-today", range(10, 60))):
        write(server.path(f"{name}/part-0.parquet"), [texts[row] for row in rows], id=list(rows))
    write(server.path("articles/part-0.parquet"), [" ".join(SENTENCES) * 3, "A short one."], id=[1, 2])
    server.start()
    return server


def runnable() -> list[Path]:
    return [page for page in PAGES if commands(page)]


@pytest.mark.parametrize("page", runnable(), ids=lambda page: str(page.relative_to(ROOT)))
@pytest.mark.usefixtures("bucket")
def test_the_commands_of_a_page_run_as_written(page: Path, cluster: RayCluster, environment: dict[str, str], tmp_path: Path, model: Path) -> None:
    variables = ENVIRONMENT | environment | {"RAY_ADDRESS": cluster.address}
    here = tmp_path / "here"
    here.mkdir()

    def run(words: list[str]) -> subprocess.CompletedProcess[str]:
        assert words[0] == "llmemb"
        return subprocess.run([sys.executable, "-m", "llmemb_ray.cli", *words[1:]], cwd=here, env=variables, capture_output=True, text=True, check=False)

    wanted = commands(page)
    used, made = {word for words in wanted for word in words}, {words[3] for words in wanted if words[1] == "embed"}
    if "OUT" in used:
        embed(write(tmp_path / "in" / "a.parquet", SENTENCES, id=list(range(len(SENTENCES)))), here / "OUT", model)
    if "s3://bucket/vectors/" in used - made or page.name == "corpora.md":
        assert run(["llmemb", "embed", "s3://bucket/corpus/", "s3://bucket/vectors/", "--model", MODELS[0], "--actors", "0"]).returncode == 0
    for words in wanted:
        if "DEST" in words:
            shutil.rmtree(here / "DEST", ignore_errors=True)
        done = run(words)
        assert done.returncode == 0, f"{page.name}: {shlex.join(words)}\n{done.stdout}{done.stderr}"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_the_python_of_a_page_compiles(page: Path) -> None:
    for block in blocks(page, "python"):
        ast.parse(block)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_the_links_of_a_page_lead_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\(([^)#\s]+)(?:#[^)]*)?\)", page.read_text(encoding="utf-8")):
        assert target.startswith(("http://", "https://")) or (page.parent / target).exists(), f"{page.name}: {target}"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_the_anchors_that_a_page_links_to_are_there(page: Path) -> None:
    for target, anchor in re.findall(r"\]\(([^)#\s]*)#([^)]+)\)", page.read_text(encoding="utf-8")):
        there = (page.parent / target) if target else page
        headings = re.findall(r"^#+ (.+)$", there.read_text(encoding="utf-8"), re.MULTILINE)
        assert anchor in {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}, f"{page.name}: {target}#{anchor}"


def test_every_page_is_linked_from_the_readme() -> None:
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    assert [page.name for page in PAGES if page.name != "README.md" and f"]({page.relative_to(ROOT)})" not in text] == []


def test_the_page_on_scale_is_that_of_its_record() -> None:
    """And the lines of it that the README shows stand in it."""
    from benchmarks import scale_text

    record = json.loads((ROOT / "benchmarks" / "records" / "scale.json").read_text(encoding="utf-8"))
    page = (ROOT / "docs" / "scale.md").read_text(encoding="utf-8")
    assert page == scale_text.page(record["parts"]), "write it again: python benchmarks/scale.py --page"
    section = (ROOT / "README.md").read_text(encoding="utf-8").partition("## A billion rows")[2].partition("## ")[0]
    shown = [line for line in section.splitlines() if line.startswith("|")]
    assert len(shown) == 8
    assert set(shown) <= set(page.splitlines())
