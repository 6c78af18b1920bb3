"""What a live job exports to Prometheus: it agrees with the receipt, with the dashboard's and alerts' queries, and with the documentation."""

from __future__ import annotations

import json
import re
import sys
import threading
import time
import urllib.request
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import yaml
from prometheus_client.parser import text_string_to_metric_families
from prometheus_client.samples import Sample

from llmemb_ray.embedders.work import Work
from llmemb_ray.pipeline import metrics
from llmemb_ray.pipeline.metrics import CATALOGUE, OF_RUN, Meter
from llmemb_ray.shards.commits import Commit
from llmemb_ray.shards.receipt import Receipt
from llmemb_ray.synthesis.commits import Made
from tests.ray_cluster import free_port
from tests.small_jobs import embed, write

ROOT = Path(__file__).parents[2]
DASHBOARD = json.loads((ROOT / "cluster" / "grafana" / "llmemb.json").read_text())
ALERTS = yaml.safe_load((ROOT / "cluster" / "prometheus" / "alerts.yml").read_text())
PAGE = (ROOT / "cluster" / "prometheus" / "README.md").read_text()

PREFIX = "What follows is a sentence of a large corpus of English text, to be put into one word: "

REPORT_MS = 1000
"""The shortest that Ray takes, in place of 10 s."""

COMMIT = Commit(
    unit="u",
    attempt="a",
    file=0,
    start=0,
    rows=3,
    embedded=1,
    rejected=1,
    filtered=1,
    reasons={"null": 1},
    copied=1,
    reused=1,
    truncated=1,
    tokens=9,
    tokens_computed=8,
    tokens_padding=2,
    tokens_shared=1,
    shard_bytes=7,
    out_of_memory=1,
    storage_retries=1,
    seconds_model=1.0,
    seconds_wait=1.0,
    seconds_write=1.0,
)
MADE = Made(unit="u", attempt="a", start=0, rows=2, accepted=1, rejected=1, prompt_tokens=5, completion_tokens=3, seconds=1.0)
ROW = {"step": 3, "loss": 0.5, "score": 0.7, "learning_rate": 1e-5, "gradient_norm": 1.0, "tokens_per_second": 10.0}


OF_WORKERS = {"read", "tokenize", "load", "input"}

OURS_OR_ASKED = re.compile(r"(# TYPE )?ray_(llmemb|node|object_store|data_operator)_")
"""Of some two thousand lines of a page."""


@dataclass
class Exporter:
    """A node's page for Prometheus, and all that it ever showed."""

    url: str
    kinds: dict[str, str] = field(default_factory=dict)
    seen: dict[tuple[str, frozenset[tuple[str, str]]], Sample] = field(default_factory=dict)

    def look(self) -> None:
        with urllib.request.urlopen(self.url, timeout=10) as page:
            lines = [line for line in page.read().decode().splitlines() if OURS_OR_ASKED.match(line)]
            for family in text_string_to_metric_families("\n".join(lines) + "\n"):
                for sample in family.samples:
                    self.kinds[sample.name] = family.type
                    self.seen[sample.name, frozenset(sample.labels.items())] = sample

    def samples(self, name: str, run: str | None = None) -> list[Sample]:
        return [sample for (found, _), sample in self.seen.items() if found == name and (run is None or sample.labels["run"] == run)]

    def wait_for(self, condition: Callable[[], Any], what: str) -> None:
        deadline = time.monotonic() + 30
        while not condition():
            assert time.monotonic() < deadline, f"the exporter did not show {what}"
            time.sleep(0.3)
            self.look()


@dataclass
class Watched:
    exporter: Exporter
    receipt: Receipt

    @property
    def run(self) -> str:
        return self.receipt.run_key[: metrics.RUN_DIGITS]

    def total(self, name: str, **labels: str) -> float:
        return sum(sample.value for sample in self.exporter.samples(f"ray_{name}", self.run) if labels.items() <= sample.labels.items())

    def phases(self) -> set[str]:
        return {sample.labels["phase"] for sample in self.exporter.samples("ray_llmemb_seconds_total", self.run)}


@pytest.fixture(scope="module")
def watched(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Watched]:
    """A job that was watched while it ran, and then one more of everything that it had no cause to tell."""
    import ray

    directory, port = tmp_path_factory.mktemp("watched"), free_port()
    texts = [None if row % 9 == 3 else f"sentence number {row}" for row in range(40)]
    write(directory / "in.parquet", texts, id=list(range(40)))
    ray.init(
        address="local",
        num_cpus=2,
        include_dashboard=False,
        log_to_driver=False,
        logging_level="ERROR",
        _metrics_export_port=port,
        _system_config={"metrics_report_interval_ms": REPORT_MS},
    )
    exporter, ended = Exporter(f"http://127.0.0.1:{port}/metrics"), threading.Event()

    def look() -> None:
        while not ended.wait(1.0):
            exporter.look()

    watch = threading.Thread(target=look, daemon=True)
    try:
        exporter.look()
        watch.start()
        settings = {"prompt": PREFIX + "{text}", "max_tokens": 64, "rows_per_unit": 10, "max_reject_rate": 1.0, "actors": "1", "cpus_per_actor": 1}
        receipt = embed(directory / "in.parquet", directory / "out", model, **settings)
        ended.set()
        watch.join()
        job = Watched(exporter, receipt)
        exporter.wait_for(lambda: job.total("llmemb_units_committed_total") >= receipt.units, "all commits")
        exporter.wait_for(lambda: job.total("llmemb_batch_seconds_count") >= receipt.units, "what the actor told")
        exporter.wait_for(lambda: job.total("llmemb_units_prepared_total") >= receipt.units, "what the tasks that prepare units told")
        exporter.wait_for(lambda: job.phases() >= OF_WORKERS, "where their time went")
        tell_all()
        exporter.wait_for(lambda: all(f"ray_{exported(name)}" in exporter.kinds for name in CATALOGUE), "every metric")
        exporter.wait_for(lambda: "ray_node_mem_total" in exporter.kinds, "the node's own metrics")
        yield job
    finally:
        ended.set()
        ray.shutdown()


def tell_all() -> None:
    meter = Meter("embed", "another run")
    meter.committed(COMMIT)
    meter.standing(units={"planned": 1}, rows={"planned": 3})
    meter.unit_failed()
    meter.unit_retried()
    meter.loaded(restarted=True)
    Meter("synthesize", "a synthesis").ended(MADE)
    Meter("finetune", "a training").trained(ROW)


def exported(name: str) -> str:
    return f"{name}_count" if CATALOGUE[name].kind == "histogram" else name


def test_the_accounts_are_those_of_the_receipt(watched: Watched) -> None:
    receipt, total = watched.receipt, watched.total
    assert (receipt.units, receipt.rows_read, receipt.rows_rejected) == (4, 40, 5)
    assert total("llmemb_units_committed_total") == receipt.units
    assert total("llmemb_units_prepared_total") == receipt.units
    assert total("llmemb_unit_seconds_count") == receipt.units
    assert total("llmemb_batch_seconds_count") == receipt.units
    assert total("llmemb_rows_total", status="embedded") == receipt.rows_embedded
    assert total("llmemb_rows_total", status="rejected") == receipt.rows_rejected
    assert total("llmemb_rows_total") == receipt.rows_read
    assert {sample.labels["reason"]: sample.value for sample in watched.exporter.samples("ray_llmemb_rejects_total", watched.run)} == receipt.rejects_by_reason
    assert total("llmemb_tokens_total") == receipt.tokens
    assert total("llmemb_tokens_passed_total") == receipt.tokens
    assert total("llmemb_tokens_computed_total") == receipt.tokens_computed
    assert total("llmemb_prefix_tokens_reused_total") == receipt.tokens_shared > 0
    assert total("llmemb_shard_bytes_total") == receipt.shard_bytes
    assert total("llmemb_seconds_total", phase="model") == pytest.approx(receipt.seconds_model, abs=1e-3)
    assert total("llmemb_engine_restarts_total") == total("llmemb_units_failed_total") == 0
    assert watched.phases() >= OF_WORKERS


def test_while_it_ran_it_said_where_it_stood(watched: Watched) -> None:
    states = {sample.labels["state"]: sample.value for sample in watched.exporter.samples("ray_llmemb_run_units", watched.run)}
    assert states.keys() == {"planned", "committed", "failed", "at work"}
    assert (states["planned"], states["failed"]) == (watched.receipt.units, 0)
    assert {sample.labels["state"] for sample in watched.exporter.samples("ray_llmemb_actors", watched.run)} == {"ready", "loading"}


def test_every_metric_is_exported_with_its_type_and_labels_and_documented(watched: Watched) -> None:
    documented = {
        name: (kind, tuple(re.findall(r"`(\w+)`", labels))) for name, kind, labels in re.findall(r"^\| `(llmemb_\w+)` \| (\w+) \|([^|]*)\|", PAGE, re.M)
    }
    assert documented == {name: (metric.kind, metric.labels) for name, metric in CATALOGUE.items()}
    own = {name for name in watched.exporter.kinds if name.startswith("ray_llmemb_")}
    parts = {f"ray_{name}_{part}" for name, metric in CATALOGUE.items() if metric.kind == "histogram" for part in ("bucket", "count", "sum")}
    assert own == parts | {f"ray_{name}" for name, metric in CATALOGUE.items() if metric.kind != "histogram"}
    for name, metric in CATALOGUE.items():
        assert watched.exporter.kinds[f"ray_{exported(name)}"] == metric.kind
        for sample in watched.exporter.samples(f"ray_{exported(name)}"):
            assert sample.labels.keys() >= {*OF_RUN, *metric.labels}
            assert "job" not in sample.labels, "Prometheus has a label of this name"


def queries() -> list[tuple[str, str]]:
    found = [(panel["title"], target["expr"]) for panel in DASHBOARD["panels"] for target in panel.get("targets", [])]
    return found + [(rule["alert"], rule["expr"]) for group in ALERTS["groups"] for rule in group["rules"]]


NEEDS_GPU = {"ray_node_gpus_utilization": {"ip", "GpuIndex"}}


def test_queries_ask_for_what_is_exported(watched: Watched) -> None:
    from ray.dashboard.modules.reporter.reporter_agent import METRICS_GAUGES

    for title, query in queries():
        for name, selector in re.findall(r"\b(ray_\w+)(?:\{([^}]*)\})?", query):
            if name in NEEDS_GPU:
                assert name.removeprefix("ray_") in METRICS_GAUGES
                continue
            samples = watched.exporter.samples(name)
            for label, operator, value in re.findall(r'(\w+)(=~?)"([^"]*)"', selector):
                pattern = value.replace("$run", ".+") if operator == "=~" else re.escape(value)
                samples = [sample for sample in samples if re.fullmatch(pattern, sample.labels.get(label, ""))]
            assert samples, f"{title}: nothing answers {name}{{{selector}}}"
        for labels, name in re.findall(r"by \(([^)]*)\) \((?:\w+\()*(\w+)", query):
            there = NEEDS_GPU.get(name) or watched.exporter.samples(name)[0].labels.keys()
            assert {label.strip() for label in labels.split(",")} <= there, f"{title}: {name} has not all of the labels {labels}"


def test_every_metric_is_on_the_dashboard() -> None:
    asked = {name for _, query in queries() for name in re.findall(r"ray_(llmemb_\w+)", query)}
    assert {name.removesuffix("_bucket") for name in asked} == CATALOGUE.keys()


def test_an_actor_tells_of_its_waiting_while_it_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    meter, told = Meter("embed", "key"), []
    monkeypatch.setattr(meter, "_spent", lambda phase, seconds: told.append((phase, seconds)))
    started = time.monotonic()
    time.sleep(0.05)
    assert meter.waited(), "before any unit came"
    with meter.call():
        assert not meter.waited()
        time.sleep(0.05)
    assert meter.waited()
    assert {phase for phase, _ in told} == {"input"}
    assert 0.05 <= sum(seconds for _, seconds in told) <= time.monotonic() - started - 0.05, "each second once, and none with a unit"


def test_without_ray_nothing_is_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(sys.modules, "ray", raising=False)
    monkeypatch.setattr(metrics, "_made", {})
    meter = Meter("embed", "key")
    meter.committed(COMMIT)
    meter.computed(Work(packs=1, seconds=1.0))
    assert metrics._made == {}
    assert "ray" not in sys.modules
