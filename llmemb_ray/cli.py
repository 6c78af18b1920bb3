"""The ``llmemb`` command: each subcommand takes settings (``options``), calls one function, prints.

Invariant: nothing heavy is imported before a command needs it, so that help, status and verify start at once.
"""

from __future__ import annotations

import json
import sys
import typing
from collections import Counter
from collections.abc import Sequence
from typing import Any

import rich_click as click

from llmemb_ray import __version__, config
from llmemb_ray.config import (
    DemosBuildSettings,
    DemosSelectSettings,
    EmbedSettings,
    EvaluateSettings,
    ExportModelSettings,
    ExportSettings,
    FinetuneSettings,
    MineSettings,
    ParitySettings,
    PlanSettings,
    ReportSettings,
    SearchSettings,
    StorageSettings,
    SynthesizeSettings,
    VerifySettings,
)
from llmemb_ray.errors import CheckFailed, ConfigError, LlmembError, OutputError, RunFailed, printable
from llmemb_ray.options import Commands, command

click.rich_click.TEXT_MARKUP = None
click.rich_click.MAX_WIDTH = 110

if typing.TYPE_CHECKING:
    from llmemb_ray.shards.findings import Checked
    from llmemb_ray.shards.receipt import Receipt
    from llmemb_ray.shards.run import Run
    from llmemb_ray.synthesis.record import Synthesis


class RunSettings(StorageSettings):
    """A run to look at."""

    run: str = config.setting(..., "Directory or URL prefix of a run.", panel="Run", argument=True)


@click.group(cls=Commands, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, prog_name="llmemb")
def llmemb() -> None:
    """Offline embedding of Parquet corpora with decoder LLMs on Ray."""


@command(llmemb, "embed", EmbedSettings)
def embed(settings: EmbedSettings, as_json: bool) -> None:
    """Embed the Parquet files of INPUT... into OUTPUT, or continue where a run was stopped.

    The last argument is OUTPUT, all before it are INPUT.
    """
    from llmemb_ray.pipeline import job

    receipt = job.run(settings, quiet=False)
    _print_receipt(receipt, settings.output, as_json)


@command(llmemb, "plan", PlanSettings)
def plan(settings: PlanSettings, as_json: bool) -> None:
    """Show what embed would do and cost: rows, tokens, units, sizes, GPU hours. Loads no weights, starts no Ray, writes nothing.

    Reads footers and a sample of rows, and plans the input as a new run. Every figure is an estimate; its assumptions are printed.
    `llmemb plan synthesize` estimates a synthesis; an INPUT of that name is ./synthesize.
    """
    from llmemb_ray.pipeline.estimates import estimate, text

    made = estimate.preview(settings)
    _echo(json.dumps(made.to_dict(), indent=1) if as_json else text.text(made))


@command(llmemb, "plan synthesize", SynthesizeSettings)
def plan_synthesize(settings: SynthesizeSettings, as_json: bool) -> None:
    """Show what synthesize has left to ask and what it costs: requests, tokens, money, time. Asks nobody, loads no weights, writes nothing.

    Where OUT holds a part of it, such as a pilot with --count 200, its tokens and its speed take the place of assumptions.
    """
    from llmemb_ray.synthesis import estimate

    made = estimate.preview(settings)
    _echo(json.dumps(made.to_dict(), indent=1, ensure_ascii=False) if as_json else "\n".join(made.lines()))


@command(llmemb, "status", RunSettings)
def status(settings: RunSettings, as_json: bool) -> None:
    """Show where a run or a synthesis stands, also while a job elsewhere is at work on it."""
    from llmemb_ray.synthesis.record import Synthesis

    found = _opened(settings)
    state = found.status()
    if as_json:
        _echo(json.dumps(state, indent=1))
        return
    lines = {"run": state["run"], "state": state["state"], "model": state["model"], "rows": f"{state['rows']:,}"}
    lines["units"] = f"{state['units_done']:,} of {state['units']:,} committed"
    if state["progress"]:
        progress, driver = state["progress"], state["driver"]
        lines["driver"] = f"process {driver['pid']} on {driver['host']}, heartbeat {driver['heartbeat_age_s']:.0f} s ago"
        rates = f"{progress['rows_per_s']:,.0f} rows/s, {progress['tokens_per_s']:,.0f} tokens/s"
        lines["progress"] = f"{progress['rows']:,} rows, {rates}, {progress['rejects']:,} rejects, {progress['actors']} actors"
    if state["state"] == "stopped":
        lines["to continue"] = f"run the same {'synthesize' if isinstance(found, Synthesis) else 'embed'} command again"
    if isinstance(found, Synthesis):
        lines["accounts"] = next(found.receipt.lines()) if found.receipt else None
    elif state["receipt"]:
        lines["accounts"] = _accounts(state["receipt"])
    _print_table({name: line for name, line in lines.items() if line is not None}, False)


@command(llmemb, "verify", VerifySettings)
def verify(settings: VerifySettings, as_json: bool) -> None:
    """Check a run from its files alone: checksums, counts, vectors, ids. Exit code 3 if something is wrong.

    Of a synthesis: checksums, counts, texts, that each row is what its seed draws, and that no example stands twice.
    """
    from llmemb_ray.shards.verify import verify as check
    from llmemb_ray.synthesis import verify as synthesis
    from llmemb_ray.synthesis.record import Synthesis

    found = _opened(settings)
    findings: Checked
    if isinstance(found, Synthesis):
        if settings.against or settings.allow_duplicate_ids:
            raise ConfigError(f"against and allow_duplicate_ids are for the corpus of an embedding run; {settings.run} holds a synthesis, leave them out")
        findings = synthesis.verify(found, level=settings.level)
    else:
        findings = check(found, level=settings.level, against=settings.against, allow_duplicate_ids=settings.allow_duplicate_ids)
    if as_json:
        _echo(json.dumps(findings.to_dict(), indent=1))
        if not findings.sound:
            sys.exit(CheckFailed.exit_code)
        return
    findings.require()
    for note in findings.notes:
        _echo(f"note: {note}")
    _echo(findings.summary())


@command(llmemb, "parity", ParitySettings)
def parity(settings: ParitySettings, as_json: bool) -> None:
    """Compare both backends, as configured, with one-by-one transformers inference in float32, on texts that break engines or on rows of INPUT.

    Each row goes through alone, in a batch and in shuffled batches, with and without the adapter. Exit code 3 beyond the bounds.
    """
    from llmemb_ray.pipeline.parity import parity as comparing
    from llmemb_ray.pipeline.parity import text

    made = comparing.parity(settings, say=_say)
    _echo(json.dumps(made.to_dict(), indent=1, ensure_ascii=False) if as_json else text.text(made))
    made.require()


@command(llmemb, "search", SearchSettings)
def search(settings: SearchSettings, as_json: bool) -> None:
    """Find the rows of RUN whose vectors are closest to each TEXT, or to each query of a file."""
    from llmemb_ray.search import exact, show
    from llmemb_ray.search.job import find

    found = find(settings)
    if found.output is not None:
        missing: Counter[str] | None = show.write_parquet(found.run, found.queries, found.table, found.output, text=not settings.no_text)
        lines: dict[str, Any] = {"queries": len(found.queries.texts), "results": found.table.num_rows, "out": settings.out}
        _print_table(lines, as_json)
    else:
        texts, missing = (None, None) if settings.no_text else show.texts_of(found.run, exact.hits(found.table))
        by_query = exact.hits_of(found.table, len(found.queries.texts))
        if as_json:
            _echo(json.dumps(show.to_json(found.run, found.queries, by_query, texts), indent=1, default=str, ensure_ascii=False))
        else:
            for line in show.lines(found.queries, by_query, texts):
                _echo(line)
    for note in show.notes(found.run, missing, found.table.num_rows):
        _echo(f"note: {note}", err=True)


@command(llmemb, "export", ExportSettings)
def export(settings: ExportSettings, as_json: bool) -> None:
    """Write the vectors of RUN with their ids into DEST, in the form of another program."""
    from llmemb_ray.shards.export import export as write
    from llmemb_ray.shards.run import Run
    from llmemb_ray.storage import Storage, absolute

    run = Run(Storage(absolute(settings.run), settings.access))
    chosen = {name: getattr(settings, name) for name in ("dtype", "raw", "faiss_factory", "overwrite", "allow_unfinished")}
    exported = write(run, settings.dest, to=settings.to, progress=not as_json, **chosen)
    if as_json:
        _echo(json.dumps(exported.to_dict(), indent=1))
        return
    _echo(f"{exported.rows:,} vectors of {exported.dimension} dimensions as {exported.dtype}, {exported.bytes / 1e6:,.1f} MB in {exported.dest}")
    if not exported.finished:
        _echo("note: the run is not finished; what is committed now is exported", err=True)
    _echo(f"to load it: {exported.how_to_load}")


@command(llmemb, "report", ReportSettings)
def report(settings: ReportSettings, as_json: bool) -> None:
    """Write one HTML page about RUN: accounts, throughput, tokens, rejects, health of the vectors, and a map of a sample.

    Of a synthesis: accounts, families, languages, lengths, rejects, tasks, tokens, and examples of each family; --sample says how many, by default 3.
    """
    from llmemb_ray.reporting.report import report as write
    from llmemb_ray.synthesis.record import Synthesis

    found = _opened(settings)
    if isinstance(found, Synthesis):
        _report_synthesis(settings, found, as_json)
        return
    facts = write(settings)
    if as_json:
        _echo(json.dumps({"page": settings.out} | facts.to_dict(), indent=1))
        return
    if facts.state != "finished":
        _echo(f"note: the run is {facts.state}; the page is of {facts.units_committed:,} of {facts.units:,} units")
    _echo(_accounts(facts.accounts))
    for finding in facts.health.findings:
        _echo(f"{'look' if finding.well is False else '    '}  {finding.name}: {finding.value}" + (f". {finding.says}" if finding.well is False else ""))
    for reason in facts.texts_missing:
        _echo(f"note: texts could not be read back: {reason}")
    _echo(f"{settings.out} is the page; open it in a browser")


def _report_synthesis(settings: ReportSettings, found: Synthesis, as_json: bool) -> None:
    from llmemb_ray.reporting.synthesis import page

    facts = page.report(settings, found)
    if as_json:
        _echo(json.dumps({"page": settings.out} | facts.to_dict(), indent=1, ensure_ascii=False))
        return
    for banner in page.banners(facts):
        _echo(f"note: {banner}")
    counts = facts.accounts
    _echo(f"{counts['asked']:,} asked = {counts['accepted']:,} accepted + {counts['rejected']:,} rejected + {counts['duplicates']:,} duplicates")
    _echo(f"{settings.out} is the page; open it in a browser")


@command(llmemb, "evaluate", EvaluateSettings)
def evaluate(settings: EvaluateSettings, as_json: bool) -> None:
    """Score a model and its representation on suites of tasks: STS, transfer, retrieval, bitext, passkey, MTEB.

    Every text is embedded once, by the embedding job; the vectors stay in OUT and are used again. With --compare, RUNS are
    directories that earlier evaluations wrote.
    """
    from llmemb_ray.evaluation import compare, evaluate, record, study, text
    from llmemb_ray.reporting.evaluation import page
    from llmemb_ray.storage import Storage, absolute

    if not (settings.study or settings.compare or settings.model):
        found = evaluate.contaminated(settings)
        _echo(json.dumps(found.to_dict(), indent=1, ensure_ascii=False) if as_json else "\n".join(found.lines()))
        return
    if settings.study:
        made = study.run(settings, evaluate=lambda one: evaluate.run(one, say=_say), say=_say)
        out, shown, lines = settings.out or study.OUT, made.to_dict(), compare.lines(made)
    elif settings.compare:
        made = compare.compare([record.load(run, settings.access) for run in settings.runs])
        out, shown, lines = settings.out or "evaluation/comparison", made.to_dict(), compare.lines(made)
    else:
        one = evaluate.run(settings, say=_say)
        made = compare.compare([one])
        out, shown, lines = one.out, one.to_dict(), text.lines(one)
    page.write(made, Storage(absolute(out), settings.access))
    _echo(json.dumps(shown, indent=1, ensure_ascii=False) if as_json else "\n".join(lines))
    _echo(f"{out}/{page.NAME} is the page; open it in a browser", err=True)
    if made.failed:
        raise RunFailed(f"{len(made.failed)} of the study's evaluations failed: {', '.join(made.failed)}; the same command tries them again")


@command(llmemb, "finetune", FinetuneSettings)
def finetune(settings: FinetuneSettings, as_json: bool) -> None:
    """Train a model, or a LoRA adapter of it, on pairs or triples of texts, or continue where a training was stopped.

    Batches, checkpoints, metrics and what comes out are in OUT; `llmemb embed --adapter OUT/adapter` uses it.
    """
    from llmemb_ray.reporting.training import page
    from llmemb_ray.training.finetune import finetune as run

    made = run(settings, say=_say)
    page.of(made, settings)
    _echo(json.dumps(made.to_dict(), indent=1, ensure_ascii=False) if as_json else "\n".join(made.lines()))


@command(llmemb, "export-model", ExportModelSettings)
def export_model(settings: ExportModelSettings, as_json: bool) -> None:
    """Write TRAINED, what finetune left or any adapter or model, into DEST: base and adapter as one model, or for sentence-transformers."""
    from llmemb_ray.training.export_model import export_model as write

    made = write(settings)
    _echo(json.dumps(made.to_dict(), indent=1, ensure_ascii=False) if as_json else "\n".join(made.lines()))


@command(llmemb, "mine", MineSettings)
def mine(settings: MineSettings, as_json: bool) -> None:
    """Find hard negatives for queries with known positives, by exact search over a corpus, and write training triples to OUT.

    Queries, positives and corpus are embedded by the embedding job; the vectors stay in OUT/runs. Stopped and asked again, it goes on.
    """
    from llmemb_ray.mining import mine as mining

    made = mining.mine(settings, say=_say)
    _echo(json.dumps(made.to_dict(), indent=1, ensure_ascii=False) if as_json else "\n".join(made.lines()))


@command(llmemb, "synthesize", SynthesizeSettings)
def synthesize(settings: SynthesizeSettings, as_json: bool) -> None:
    """Make training data with an LLM: tasks, then for each row a query, a positive and a hard negative, in the families of paper 2.

    Examples are in OUT/data, which finetune takes; what failed a check is in OUT/rejects with its reason. Stopped and asked again, it goes on.
    """
    from llmemb_ray.synthesis.job import synthesize as make

    made = make(settings)
    _echo(json.dumps(made.to_dict(), indent=1, ensure_ascii=False) if as_json else "\n".join(made.lines()))
    if not as_json:
        next_ = "tasks.jsonl holds the tasks; the same command without --tasks-only goes on" if settings.tasks_only else "data holds the examples"
        _echo(f"{settings.out}/{next_}")


@llmemb.group()
def demos() -> None:
    """In-context demonstrations: make candidates, and find out which are best for a model."""


@command(demos, "build", DemosBuildSettings)
def demos_build(settings: DemosBuildSettings, as_json: bool) -> None:
    """Make candidates of demonstrations, and write them to OUT.

    Sentences are summed up in one word by an LLM, an endpoint's or one that is loaded; words of a dictionary go with their definitions.
    Asked again, it does what is missing.
    """
    from llmemb_ray.demonstrations.build import build

    made = build(settings, say=_say)
    _echo(json.dumps(made.to_dict(), indent=1, ensure_ascii=False) if as_json else "\n".join(made.lines()))


@command(demos, "select", DemosSelectSettings)
def demos_select(settings: DemosSelectSettings, as_json: bool) -> None:
    """Score each candidate on dev data with a model, and write the best one's representation.

    OUT gets the leaderboard and llmemb.json, which embed --representation takes. Stopped and asked again, it goes on.
    """
    from llmemb_ray.demonstrations.select import select

    made = select(settings, say=_say)
    _echo(json.dumps(made.to_dict(), indent=1, ensure_ascii=False) if as_json else "\n".join(made.lines(settings.top)))


@llmemb.command("demo")
@click.argument("directory", default="demo-output")
@click.option("--model", default=None, help="Hub id or directory of a model; default: pocket, the package's own.")
def demo(directory: str, model: str | None) -> None:
    """Embed the documentation of Python's standard library into DIRECTORY, verify it, search it and report on it."""
    from llmemb_ray import demo as demonstration

    demonstration.run(directory, model)


def _opened(settings: RunSettings | VerifySettings | ReportSettings) -> Run | Synthesis:
    """What stands in RUN. Raises OutputError where it is neither."""
    from llmemb_ray.shards.run import Run
    from llmemb_ray.storage import Storage, absolute
    from llmemb_ray.synthesis import brainstorming
    from llmemb_ray.synthesis.record import Synthesis

    storage = Storage(absolute(settings.run), settings.access)
    if found := Synthesis.open(storage):
        return found
    try:
        return Run(storage)
    except OutputError as error:
        if storage.exists(brainstorming.ANSWERS) or storage.exists(brainstorming.ACCOUNTS):
            told = "holds tasks of a synthesis and no example is asked for yet; the same synthesize command, without --tasks-only, goes on"
            raise OutputError(f"{storage.url} {told}") from error
        raise


def _echo(text: str, *, err: bool = False) -> None:
    """Prints what may hold names and texts of a corpus; JSON stays the JSON it is."""
    click.echo(printable(text), err=err)


def _say(line: str) -> None:
    _echo(line, err=True)


def _accounts(receipt: dict[str, Any]) -> str:
    reasons = ", ".join(f"{count:,} {reason}" for reason, count in sorted(receipt["rejects_by_reason"].items()))
    rejected = f"{receipt['rows_rejected']:,} rejected" + (f" ({reasons})" if reasons else "")
    left_out = f", {receipt['rows_filtered']:,} filtered out" if receipt["rows_filtered"] else ""
    return f"{receipt['rows_read']:,} rows read = {receipt['rows_embedded']:,} embedded + {rejected}{left_out}"


def _print_receipt(receipt: Receipt, output: str, as_json: bool) -> None:
    data = receipt.to_dict()
    if as_json:
        _echo(json.dumps(data, indent=1))
        return
    _echo(_accounts(data))
    shared = f", {data['tokens_shared']:,} more shared" if data["tokens_shared"] else ""
    if data["tokens_shared"] < data["tokens_shareable"]:
        shared += f" ({data['tokens_shared'] / data['tokens_shareable']:.0%} of the {data['tokens_shareable']:,} in the shared prefix)"
    padding = data["tokens_padding"] / max(1, data["tokens_computed"])
    _echo(
        f"{data['units']:,} units, {data['dimension']} dimensions of {data['dtype']}, {data['shard_bytes'] / 1e6:,.1f} MB; "
        f"{data['tokens_computed']:,} tokens computed{shared}, {padding:.1%} padding; {data['truncated']:,} texts cut"
    )
    if data["vectors"] != data["rows_embedded"]:
        _echo(f"{data['vectors']:,} vectors, one for each chunk")
    if data["copied"] or data["reused"]:
        saved = data["tokens_copied"] / max(1, data["tokens"])
        _echo(f"not embedded again: {data['copied']:,} identical prompts, {data['reused']:,} prompts of an earlier run ({saved:.1%} of the tokens)")
    if data["reuse"].get("deleted"):
        _echo(f"{data['reuse']['deleted']:,} rows of {data['reuse']['run']} are no longer in the corpus: {output}/{data['reuse']['list']}")
    if data["clipped_share"]:
        _echo(f"{data['clipped_share']:.3%} of the values lay outside the calibration's ranges and were clipped")
    for url, problem in data["bad_files"].items():
        _echo(f"left out: {url} {problem}")
    if data["null_ids"]:
        _echo(f"note: {data['null_ids']:,} rows have a null id")
    _echo(f"{output}/data holds the vectors, {output}/_llmemb/receipt.json the accounts")


def _print_table(lines: dict[str, Any], as_json: bool) -> None:
    if as_json:
        _echo(json.dumps(lines, indent=1))
        return
    width = max(len(name) for name in lines)
    for name, value in lines.items():
        _echo(f"{name:<{width}}  {value}")


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command and returns its exit code: 0 done, 1 failed, 2 bad usage or input, 3 a check found something."""
    try:
        result = llmemb.main(args=list(sys.argv[1:] if arguments is None else arguments), prog_name="llmemb", standalone_mode=False)
        return result if isinstance(result, int) else 0
    except LlmembError as error:
        _echo(f"llmemb: {error}", err=True)
        return error.exit_code
    except click.ClickException as error:
        error.show()
        return ConfigError.exit_code
    except (click.Abort, KeyboardInterrupt):
        _echo("llmemb: stopped; what was committed stands, the same command continues", err=True)
        return 1
    except SystemExit as error:
        return error.code if isinstance(error.code, int) else 1


def entry() -> None:
    """The console script."""
    sys.exit(main())


if __name__ == "__main__":
    entry()
