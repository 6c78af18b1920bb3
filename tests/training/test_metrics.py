"""What is shown of a training: lines, JSON lines, TensorBoard events, the page."""

from __future__ import annotations

import html
import json
import math
import struct
from pathlib import Path
from typing import Any

import markupsafe

from llmemb_ray.reporting.training import page
from llmemb_ray.reporting.training.charts import best, charts, smoothed
from llmemb_ray.reporting.training.page import render
from llmemb_ray.storage import Storage
from llmemb_ray.training import metrics
from llmemb_ray.training.finetune import PAGE

HOSTILE = "<b>t</b></script><script>document.title='taken'</script>"


def row(step: int, **changes: Any) -> dict[str, Any]:
    made = {"step": step, "epoch": step / 100, "task": "snli", "loss": 2.0, "contrastive": 2.0, "distillation": None, "accuracy": 0.612, "masked": 3}
    made |= {"learning_rate": 4.5e-4, "gradient_norm": 1.5, "tokens": 1000 * step, "tokens_per_second": 12_345.0, "seconds": step / 4}
    return made | {"memory_bytes": 1_288_490_189} | changes


def score(step: int, value: float, name: str = "STS-B dev") -> dict[str, Any]:
    return {"step": step, "evaluation": name, "score": value}


def test_a_line_of_the_log() -> None:
    assert metrics.line(row(120, loss=1.2341), 460) == "step 120/460, loss 1.234, accuracy 61.2 %, lr 4.5e-4, 12.3 k tokens/s, 1.2 GiB, ETA 1m25s"
    whole = row(1200, loss=1.5, contrastive=1.25, distillation=0.25, learning_rate=0.0, tokens_per_second=950.0, memory_bytes=300 * 2**20)
    shown = "step 1,200/1,200, loss 1.500 (contrastive 1.250, distillation 0.250), accuracy 61.2 %, lr 0, 950 tokens/s, 300 MiB"
    assert metrics.line(whole, 1200) == shown
    assert metrics.line(row(1, loss=math.nan, learning_rate=1e-3), 2).startswith("step 1/2, loss nan, accuracy 61.2 %, lr 1e-3, ")
    assert metrics.line(score(100, 61.234), 460) == "step 100/460, STS-B dev 61.23"


def test_json_lines_are_json_and_read_back(tmp_path: Path) -> None:
    rows = [row(1, task="naïve\n数据"), score(1, 40.0), row(2, loss=math.nan, gradient_norm=math.inf)]

    def refuse(constant: str) -> None:
        raise AssertionError(f"{constant} is no JSON")

    lines = metrics.jsonl(rows).decode().splitlines()
    assert [json.loads(line, parse_constant=refuse) for line in lines] == [rows[0], rows[1], rows[2] | {"loss": "nan", "gradient_norm": "inf"}]
    storage = Storage(str(tmp_path))
    storage.put(metrics.JSONL, metrics.jsonl([row(1, task="nan"), *rows]))
    back = metrics.read(storage)
    assert back[:3] == [row(1, task="nan"), *rows[:2]]
    assert math.isnan(back[3]["loss"])
    assert back[3]["gradient_norm"] == math.inf


def events(data: bytes) -> list[tuple[str, int, float, float]]:
    """(name, step, time, value) of an event file: records of length, its checksum, content, its checksum."""
    from tensorboardX.proto.event_pb2 import Event

    found = []
    while data:
        (length,) = struct.unpack("<Q", data[:8])
        event = Event.FromString(data[12 : 12 + length])
        found += [(value.tag, event.step, event.wall_time, value.simple_value) for value in event.summary.value]
        data = data[16 + length :]
    return found


def test_tensorboard_events() -> None:
    rows = [score(0, 38.5), row(10, masked=0), score(10, 40.25), row(20, contrastive=None, loss=math.nan)]
    found = events(metrics.tensorboard(rows, started=1000.0))
    names = ["train/" + name for name in row(1) if name not in ("step", "task", "seconds", "distillation")]
    assert sorted({name for name, *_ in found}) == sorted([*names, "eval/STS-B_dev"])
    assert [one[1:] for one in found if one[0] == "eval/STS-B_dev"] == [(0, 1000.0, 38.5), (10, 1002.5, 40.25)]
    assert [one[1:] for one in found if one[0] == "train/tokens"] == [(10, 1002.5, 10_000.0), (20, 1005.0, 20_000.0)]
    assert [one[1:] for one in found if one[0] == "train/contrastive"] == [(10, 1002.5, 2.0)]
    assert [math.isnan(one[3]) for one in found if one[0] == "train/loss"] == [False, True]


def test_each_writing_replaces_the_one_before(tmp_path: Path) -> None:
    for rows in ([row(1), row(2)], [row(1)]):  # A training that goes on from a checkpoint has fewer.
        metrics.write(rows, Storage(str(tmp_path)))
        page.write(rows, Storage(str(tmp_path)), "A training")
    files = sorted(path.relative_to(tmp_path).as_posix() for path in tmp_path.rglob("*") if path.is_file())
    assert files == [metrics.JSONL, metrics.EVENTS, PAGE]
    assert len((tmp_path / metrics.JSONL).read_text().splitlines()) == 1
    assert {step for _, step, *_ in events((tmp_path / metrics.EVENTS).read_bytes())} == {1}


def test_smoothing_passes_over_gaps() -> None:
    # By hand: 4; (4/2 + 1) / (1/2 + 1); a gap; (4/4 + 1/2 + 2) / (1/4 + 1/2 + 1).
    assert smoothed([4.0, 1.0, None, 2.0], 0.5) == [4.0, 2.0, None, 2.0]


def test_the_best_is_one_that_was_trained() -> None:
    rows = [score(0, 70.0), score(10, 50.0), score(20, math.nan), score(30, 60.0), score(40, 60.0), score(10, math.nan, "other")]
    assert best(rows) == {"STS-B dev": rows[3]}
    shown = render([row(10), *rows], "A training")
    assert "60.00 best" in shown
    assert shown.count(" best</strong>") == 1
    assert "at step 30, 70.00 before" in shown


def test_a_long_training_makes_no_large_page_and_ends_with_its_last_step() -> None:
    made = json.loads(charts([row(step) for step in range(1, 5001)], [])["chart-loss"])
    steps = made["data"][0]["x"]
    assert 1000 < len(steps) <= 2000
    assert steps[-1] == 5000


def test_what_the_page_says_of_a_strange_training() -> None:
    rows = [row(1, task=HOSTILE), row(2, loss=math.nan, gradient_norm=math.inf), row(3), score(2, math.nan), score(3, 33.0, HOSTILE)]
    shown = render(rows, HOSTILE, steps=9, settings={"train": [{"path": [HOSTILE], "weight": None}]}, result={"score": 33.0})
    assert "The loss is no finite number at step 2: gaps in the curve." in shown
    assert "The score of an evaluation is no finite number at step 2: gaps in the curve." in shown
    assert "of 9, epoch 0.03" in shown
    assert f"path {markupsafe.escape(HOSTILE)}" in shown
    assert "<b>t</b>" not in shown
    assert "taken'</script>" not in shown
    losses = json.loads(charts(rows[:3], [])["chart-loss"])["data"]
    assert [(trace["name"], trace["y"]) for trace in losses] == [
        (html.escape(HOSTILE, quote=False), [2.0, None, None]),
        ("snli", [None, None, 2.0]),
        ("smoothed", [2.0, None, 2.0]),
    ]


def test_a_single_step_is_seen_as_a_point() -> None:
    drawn = charts([row(1)], [])
    assert sorted(drawn) == ["chart-accuracy", "chart-loss", "chart-memory", "chart-norm", "chart-rate", "chart-speed"]
    for made in drawn.values():
        assert all(trace["mode"] == "lines+markers" and trace["x"] == [1] for trace in json.loads(made)["data"])
    assert "No step is logged yet." in render([], "A training")
