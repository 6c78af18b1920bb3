"""What does the search among paper 1's 300 demonstrations cost, in full and by halving, and what does sharing prefixes save?

    python benchmarks/demonstrations.py --keep /tmp/search             scores stay there: the same command goes on where it was stopped
    python benchmarks/demonstrations.py --keep /tmp/search --every 10  every tenth candidate; to try out

TinyStories-656K, STS-B dev (tokenised), in this process with one thread. Full search and halving work in one directory, so that
what both need is scored once; the time of each is the sum over its own trials, each timed by itself, without start-up. Sharing is
measured on every so-manieth candidate: scored with and without it, one after the other, the order turned each time. Seconds are the
clock's; processor seconds are those of the process, for the machine may do other work. Writes benchmarks/records/demonstrations.json.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import tempfile
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

import torch

from benchmarks.memory import write
from llmemb_ray.config import DemosSelectSettings
from llmemb_ray.demonstrations.halving import sizes
from llmemb_ray.demonstrations.leaderboard import Leaderboard
from llmemb_ray.demonstrations.scoring import Examiner, Outcome, Trial, sts_exam, tokenize
from llmemb_ray.demonstrations.select import select
from llmemb_ray.embedders.embedder import Embedder, settle
from llmemb_ray.evaluation.data import DataPlace
from llmemb_ray.representation import Demonstration
from llmemb_ray.storage import Storage

THREADS = 1


def cost(outcomes: list[Outcome]) -> dict[str, float]:
    return {
        "trials": len(outcomes),
        "seconds": round(sum(one.seconds for one in outcomes), 1),
        "cpu_seconds": round(sum(one.cpu_seconds for one in outcomes), 1),
        "tokens": sum(one.tokens for one in outcomes),
        "computed": sum(one.computed for one in outcomes),
        "retokenized": sum(one.retokenized for one in outcomes),
    }


def search(settings: DemosSelectSettings, prompts: list[tuple[Demonstration, ...]]) -> dict[str, Any]:
    """Both searches; times from what their trials recorded."""
    full = select(settings, say=print)
    halved = select(settings.model_copy(update={"halving": True}), say=print)
    exam = sts_exam(DataPlace.of(settings.data), raw=False, seed=settings.seed)
    board = Leaderboard(Storage(settings.out), size=exam.size, seed=settings.seed)
    whole = [board.outcome(prompt, exam.size) for prompt in prompts]
    rounds, left = [], prompts
    for size in sizes(exam.size, settings.halving_first):
        outcomes = {prompt: board.outcome(prompt, size) for prompt in left}
        rounds.append({"items": size} | cost(list(outcomes.values())))
        left = sorted(left, key=lambda prompt: -(outcomes[prompt].score or 0.0))[: (len(left) + 1) // 2]
    print("\n".join(halved.lines(10)))
    return {
        "candidates": len(prompts),
        "sentences": len(exam.texts),
        "zero_shot": round(full.zero_shot, 2),
        "better_than_zero_shot": sum((place.gain or 0.0) > 0 for place in full.ranking),
        "best": full.ranking[0].to_dict(),
        "worst": full.ranking[-1].to_dict(),
        "full": cost(whole),
        "halving": {name: round(sum(one[name] for one in rounds), 1) for name in ("trials", "seconds", "cpu_seconds", "computed")} | {"rounds": rounds},
        "agreement": halved.agreement.to_dict() if halved.agreement else None,
    }


def sharing(settings: DemosSelectSettings, prompts: list[tuple[Demonstration, ...]]) -> dict[str, Any]:
    exam = sts_exam(DataPlace.of(settings.data), raw=False, seed=settings.seed)
    spec = settle(settings)
    embedder, rows = Embedder(spec), tokenize(spec, exam.texts)
    arms = {share: Examiner(exam=exam, base=spec.representation, rows=rows, share=share) for share in (True, False)}
    for examiner in arms.values():  # The token budget is found here.
        examiner(embedder, Trial(prompts[0], exam.size))
    found: dict[bool, list[Outcome]] = {True: [], False: []}
    for number, prompt in enumerate(prompts):
        for share in (True, False) if number % 2 else (False, True):
            found[share].append(arms[share](embedder, Trial(prompt, exam.size)))
        print(f"{number + 1} of {len(prompts)}: {found[True][-1].cpu_seconds:.2f} s with sharing, {found[False][-1].cpu_seconds:.2f} s without")
    ratios = [alone.cpu_seconds / shared.cpu_seconds for shared, alone in zip(found[True], found[False], strict=True)]
    differences = [abs((shared.score or 0.0) - (alone.score or 0.0)) for shared, alone in zip(found[True], found[False], strict=True)]
    return {
        "with": cost(found[True]),
        "without": cost(found[False]),
        "cpu_ratio_median": round(statistics.median(ratios), 2),
        "cpu_ratio_range": [round(min(ratios), 2), round(max(ratios), 2)],
        "largest_difference_of_scores": round(max(differences), 4),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--keep", help="directory of the scores")
    parser.add_argument("--every", type=int, default=1, help="take every so-manieth candidate")
    parser.add_argument("--sharing-every", type=int, default=20, help="of these, measure sharing on every so-manieth")
    chosen = parser.parse_args()
    torch.set_num_threads(THREADS)
    data = Path(os.environ.get("LLMEMB_DATA", ROOT.parent / "shared" / "data"))
    lines = (data / "icl_demos" / "demos.jsonl").read_text(encoding="utf-8").splitlines()[:: chosen.every]
    with tempfile.TemporaryDirectory(prefix="llmemb-demonstrations-") as scratch:
        candidates = Path(scratch) / "candidates.jsonl"
        candidates.write_text("\n".join(lines) + "\n", encoding="utf-8")
        settings = DemosSelectSettings.make(
            {
                "model": str(data.parent / "models" / "TinyStories-656K"),
                "actors": "0",
                "data": str(data),
                "candidates": str(candidates),
                "out": chosen.keep or f"{scratch}/search",
            }
        )
        prompts: list[tuple[Demonstration, ...]] = list(
            dict.fromkeys((Demonstration(record["sentence"], record["word"]),) for record in map(json.loads, lines))
        )
        record = {"threads": THREADS, "load_average": [round(one, 1) for one in os.getloadavg()]}
        record |= {"sharing": sharing(settings, prompts[:: chosen.sharing_every])} | search(settings, prompts)
    print(json.dumps({name: value for name, value in record.items() if name not in ("best", "worst")}, indent=1))
    write("demonstrations", [record])


if __name__ == "__main__":
    main()
