"""The ``llmemb`` command. Options are made from the settings models; a command parses, calls one function, prints.

Invariant: nothing heavy is imported before a command needs it, so that help, status and verify start at once.
"""

from __future__ import annotations

import json
import sys
import typing
from collections.abc import Callable, Sequence
from typing import Any, Literal, get_args, get_origin

import rich_click as click
import yaml

from llmemb_ray import __version__, config
from llmemb_ray.config import EmbedSettings, SearchSettings, Settings, StorageSettings, VerifySettings
from llmemb_ray.errors import CheckFailed, ConfigError, LlmembError

click.rich_click.TEXT_MARKUP = None
click.rich_click.MAX_WIDTH = 110

if typing.TYPE_CHECKING:
    from llmemb_ray.shards.receipt import Receipt


class RunSettings(StorageSettings):
    """A run to look at."""

    run: str = config.setting(..., "Directory or URL prefix of a run.", panel="Run", argument=True)


Decorator = Callable[[Callable[..., Any]], Any]


def options_of(settings: type[Settings]) -> Decorator:
    """Adds an option, or an argument, for each field of a settings model, and the options that every such command has."""

    def decorate(command: Callable[..., Any]) -> Callable[..., Any]:
        parameters = [_parameter(name, field) for name, field in settings.model_fields.items()]
        general: list[Decorator] = [
            click.option("--config", "config_file", metavar="FILE", help="YAML file of settings; options given on the command line win."),
            click.option("--set", "assignments", metavar="KEY=VALUE", multiple=True, help="Any setting by its dotted name, value in YAML."),
            click.option("--print-config", is_flag=True, help="Print the settings in force, secrets masked, and stop."),
            click.option("--json", "as_json", is_flag=True, help="Print the result as JSON."),
        ]
        for decorator in reversed([*parameters, *general]):
            command = decorator(command)
        return command

    return decorate


def _parameter(name: str, field: Any) -> Decorator:
    extra = _extra(field)
    many = get_origin(field.annotation) is list
    if extra.get("argument"):
        return click.argument(name, nargs=-1 if many else 1, required=False, metavar=name.upper() + ("..." if many else ""))
    flag = "--" + name.replace("_", "-")
    help_ = field.description
    kind = field.annotation
    choices = get_args(kind) if get_origin(kind) is Literal else ()
    if extra.get("flags"):
        return _one_flag_a_choice(name, choices, help_, field.default)
    if bool in (kind, *get_args(kind)):
        declaration = flag if field.default is False else f"{flag}/--no-{name.replace('_', '-')}"
        return click.option(declaration, name, default=None, is_flag=True, help=help_)
    if many and not extra.get("commas"):
        return click.option(flag, name, multiple=True, metavar="TEXT", help=help_)
    if kind == dict[str, Any]:
        return click.option(flag, name, metavar="YAML", default=None, help=help_)
    default = field.get_default()
    if not field.is_required() and default not in (None, [], {}):
        help_ += f" [default: {default}]"
    if choices:
        return click.option(flag, name, type=click.Choice(choices), default=None, help=help_)
    numbers: dict[Any, Any] = {int: int, float: float}
    bare = next((part for part in get_args(kind) if part in numbers), kind)
    return click.option(flag, name, type=numbers.get(bare, str), default=None, help=help_)


def _one_flag_a_choice(name: str, choices: Sequence[str], help_: str, default: str) -> Decorator:
    texts = dict(part.strip().split(": ", 1) for part in help_.rstrip(".").split("; "))

    def decorate(command: Callable[..., Any]) -> Callable[..., Any]:
        for choice in reversed(choices):
            command = click.option(
                f"--{choice}", name, flag_value=choice, type=str, default=None, help=f"Check {texts[choice]}." + (" [default]" if choice == default else "")
            )(command)
        return command

    return decorate


def _extra(field: Any) -> dict[str, Any]:
    return field.json_schema_extra if isinstance(field.json_schema_extra, dict) else {}


def _require_arguments(settings: type[Settings], values: dict[str, Any]) -> None:
    """Raises ConfigError that shows all arguments in their order if one of them is given nowhere."""
    names = [name for name, field in settings.model_fields.items() if _extra(field).get("argument")]
    missing = [name.upper() for name in names if name not in values]
    if missing:
        usage = " ".join(name.upper() + ("..." if get_origin(settings.model_fields[name].annotation) is list else "") for name in names)
        given = "".join(f"; {name.upper()} is {values[name]!r}" for name in names if name in values and isinstance(values[name], str))
        raise ConfigError(f"{' and '.join(missing)} must be given: the arguments are {usage}, on the command line or as settings of a --config file{given}")


def gather(settings: type[Settings], given: dict[str, Any]) -> Any:
    """The settings from file, ``--set`` and command line, the later winning. Raises ConfigError."""
    values = config.read_file(given.pop("config_file")) if given.get("config_file") else {}
    given.pop("config_file", None)
    values = config.override(values, list(given.pop("assignments", ())))
    for name, value in given.items():
        if value is None or value == ():
            continue
        if settings.model_fields[name].annotation == dict[str, Any]:
            try:
                value = config.parse_yaml(value)
            except yaml.YAMLError:
                raise ConfigError(f"{name}: the value is not YAML; write it as '{{name: value}}'") from None
        values[name] = list(value) if isinstance(value, tuple) else value
    for name, field in settings.model_fields.items():
        if get_origin(field.annotation) is list and isinstance(values.get(name), str):
            commas = _extra(field).get("commas")
            values[name] = [part.strip() for part in values[name].split(",") if part.strip()] if commas else [values[name]]
    _require_arguments(settings, values)
    return settings.make(values)


def command(group: click.RichGroup, name: str, settings: type[Settings]) -> Callable[[Callable[[Any, bool], None]], Any]:
    """Registers ``function(settings, as_json)`` as a command with the options of ``settings``."""

    def decorate(function: Callable[[Any, bool], None]) -> Any:
        @group.command(name, help=function.__doc__)
        @options_of(settings)
        def run(print_config: bool, as_json: bool, **given: Any) -> None:
            made = gather(settings, given)
            if print_config:
                click.echo(yaml.safe_dump(config.masked(made.model_dump(mode="json")), sort_keys=False, allow_unicode=True), nl=False)
                return
            function(made, as_json)

        panels: dict[str, list[str]] = {}
        for field_name, field in settings.model_fields.items():
            extra = _extra(field)
            if not extra.get("argument"):
                names = [f"--{choice}" for choice in get_args(field.annotation)] if extra.get("flags") else ["--" + field_name.replace("_", "-")]
                panels.setdefault(str(extra.get("panel")), []).extend(names)
        panels["General"] = ["--config", "--set", "--print-config", "--json", "--help"]
        click.rich_click.OPTION_GROUPS[f"llmemb {name}"] = [{"name": panel, "options": names} for panel, names in panels.items()]
        return run

    return decorate


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
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


@command(llmemb, "plan", EmbedSettings)
def plan(settings: EmbedSettings, as_json: bool) -> None:
    """Show what embed would do: files, rows, units, sizes. Loads no weights, starts no Ray, writes nothing."""
    from llmemb_ray.pipeline import preview

    summary = preview.preview(settings)
    _print_table(summary, as_json)


@command(llmemb, "status", RunSettings)
def status(settings: RunSettings, as_json: bool) -> None:
    """Show where a run stands, also while a job elsewhere is at work on it."""
    from llmemb_ray.shards.run import Run
    from llmemb_ray.storage import Storage, absolute

    state = Run(Storage(absolute(settings.run), settings.access)).status()
    if as_json:
        click.echo(json.dumps(state, indent=1))
        return
    lines = {"run": state["run"], "state": state["state"], "model": state["model"], "rows": f"{state['rows']:,}"}
    lines["units"] = f"{state['units_done']:,} of {state['units']:,} committed"
    if state["progress"]:
        progress, driver = state["progress"], state["driver"]
        lines["driver"] = f"process {driver['pid']} on {driver['host']}, heartbeat {driver['heartbeat_age_s']:.0f} s ago"
        rates = f"{progress['rows_per_s']:,.0f} rows/s, {progress['tokens_per_s']:,.0f} tokens/s"
        lines["progress"] = f"{progress['rows']:,} rows, {rates}, {progress['rejects']:,} rejects, {progress['actors']} actors"
    if state["state"] == "stopped":
        lines["to continue"] = "run the same embed command again"
    if state["receipt"]:
        lines["accounts"] = _accounts(state["receipt"])
    _print_table(lines, False)


@command(llmemb, "verify", VerifySettings)
def verify(settings: VerifySettings, as_json: bool) -> None:
    """Check a run from its files alone: checksums, counts, vectors, ids. Exit code 3 if something is wrong."""
    from llmemb_ray.shards.run import Run
    from llmemb_ray.shards.verify import verify as check
    from llmemb_ray.storage import Storage, absolute

    run = Run(Storage(absolute(settings.run), settings.access))
    findings = check(run, level=settings.level, against=settings.against, allow_duplicate_ids=settings.allow_duplicate_ids)
    if as_json:
        click.echo(json.dumps(findings.to_dict(), indent=1))
        if not findings.sound:
            sys.exit(CheckFailed.exit_code)
        return
    findings.require()
    for note in findings.notes:
        click.echo(f"note: {note}")
    read = {"quick": "names, sizes and counts", "sample": f"contents of {findings.units_read} units", "full": "all contents"}[findings.level]
    ids = "" if findings.duplicate_ids is None else ", ids unique" if findings.duplicate_ids == 0 else ""
    corpus = "" if findings.against_rows is None else f", {findings.against_rows:,} rows of the corpus all found"
    click.echo(f"sound: {findings.units:,} units, {findings.rows_embedded:,} rows embedded, {findings.rows_rejected:,} rejected; checked {read}{ids}{corpus}")


@command(llmemb, "search", SearchSettings)
def search(settings: SearchSettings, as_json: bool) -> None:
    """Find the rows of RUN whose vectors are closest to each TEXT."""
    from llmemb_ray.search.exact import load_embedder
    from llmemb_ray.search.exact import search as find
    from llmemb_ray.shards.run import Run
    from llmemb_ray.storage import Storage, absolute

    run = Run(Storage(absolute(settings.run), settings.access))
    results = find(run, settings.text, top_k=settings.top_k, embedder=load_embedder(run, settings.access, model=settings.model))
    if as_json:
        rows = [{"query": text, "hits": [hit.to_dict() for hit in hits]} for text, hits in zip(settings.text, results, strict=True)]
        click.echo(json.dumps(rows, indent=1, default=str))
        return
    for text, hits in zip(settings.text, results, strict=True):
        click.echo(text)
        for hit in hits:
            name = hit.id if hit.id is not None else f"file {hit.source_file} row {hit.source_row}"
            click.echo(f"  {hit.score:.4f}  {name}")


@llmemb.command("demo")
@click.argument("directory", default="demo-output")
@click.option("--model", default=None, help="Hub id or directory of a model; default: a small seeded decoder made on the spot.")
def demo(directory: str, model: str | None) -> None:
    """Embed the documentation of Python's standard library into DIRECTORY, verify it, and search it."""
    from llmemb_ray import demo as demonstration

    demonstration.run(directory, model)


def _accounts(receipt: dict[str, Any]) -> str:
    reasons = ", ".join(f"{count:,} {reason}" for reason, count in sorted(receipt["rejects_by_reason"].items()))
    rejected = f"{receipt['rows_rejected']:,} rejected" + (f" ({reasons})" if reasons else "")
    left_out = f", {receipt['rows_filtered']:,} filtered out" if receipt["rows_filtered"] else ""
    return f"{receipt['rows_read']:,} rows read = {receipt['rows_embedded']:,} embedded + {rejected}{left_out}"


def _print_receipt(receipt: Receipt, output: str, as_json: bool) -> None:
    data = receipt.to_dict()
    if as_json:
        click.echo(json.dumps(data, indent=1))
        return
    click.echo(_accounts(data))
    shared = f", {data['tokens_shared']:,} more shared" if data["tokens_shared"] else ""
    padding = data["tokens_padding"] / max(1, data["tokens_computed"])
    click.echo(
        f"{data['units']:,} units, {data['dimension']} dimensions of {data['dtype']}, {data['shard_bytes'] / 1e6:,.1f} MB; "
        f"{data['tokens_computed']:,} tokens computed{shared}, {padding:.1%} padding; {data['truncated']:,} texts cut"
    )
    for url, problem in data["bad_files"].items():
        click.echo(f"left out: {url} {problem}")
    if data["null_ids"]:
        click.echo(f"note: {data['null_ids']:,} rows have a null id")
    click.echo(f"{output}/data holds the vectors, {output}/_llmemb/receipt.json the accounts")


def _print_table(lines: dict[str, Any], as_json: bool) -> None:
    if as_json:
        click.echo(json.dumps(lines, indent=1))
        return
    width = max(len(name) for name in lines)
    for name, value in lines.items():
        click.echo(f"{name:<{width}}  {value}")


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command and returns its exit code: 0 done, 1 failed, 2 bad usage or input, 3 a check found something."""
    try:
        result = llmemb.main(args=list(sys.argv[1:] if arguments is None else arguments), prog_name="llmemb", standalone_mode=False)
        return result if isinstance(result, int) else 0
    except LlmembError as error:
        click.echo(f"llmemb: {error}", err=True)
        return error.exit_code
    except click.ClickException as error:
        error.show()
        return ConfigError.exit_code
    except (click.Abort, KeyboardInterrupt):
        click.echo("llmemb: stopped; what was committed stands, the same command continues", err=True)
        return 1
    except SystemExit as error:
        return error.code if isinstance(error.code, int) else 1


def entry() -> None:
    """The console script."""
    sys.exit(main())


if __name__ == "__main__":
    entry()
