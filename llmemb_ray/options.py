"""From a settings model to a command: an option or argument for each field, and the settings gathered back from
file, ``--set`` and command line.

Invariant: an option's name, type, default and help are its field's; nothing is said twice. Knows no command.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Literal, get_args, get_origin

import rich_click as click
import yaml

from llmemb_ray import written
from llmemb_ray.config import Settings
from llmemb_ray.errors import ConfigError

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
    flag = written.flag_of(name)
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
    return click.option(flag, name, type=str if many else numbers.get(bare, str), default=None, help=help_)


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
    missing = [name.upper() for name in names if name not in values and settings.model_fields[name].is_required()]
    if missing:
        usage = " ".join(name.upper() + ("..." if get_origin(settings.model_fields[name].annotation) is list else "") for name in names)
        given = "".join(f"; {name.upper()} is {values[name]!r}" for name in names if name in values and isinstance(values[name], str))
        raise ConfigError(f"{' and '.join(missing)} must be given: the arguments are {usage}, on the command line or as settings of a --config file{given}")


def gather(settings: type[Settings], given: dict[str, Any]) -> Any:
    """The settings from file, ``--set`` and command line, the later winning. Raises ConfigError."""
    values = written.read_file(given.pop("config_file")) if given.get("config_file") else {}
    given.pop("config_file", None)
    values = written.override(values, list(given.pop("assignments", ())))
    for name, value in given.items():
        if value is None or value == ():
            continue
        if settings.model_fields[name].annotation == dict[str, Any]:
            try:
                value = written.parse_yaml(value)
            except yaml.YAMLError:
                raise ConfigError(f"{name}: the value is not YAML; write it as '{{name: value}}'") from None
        values[name] = list(value) if isinstance(value, tuple) else value
    values = {f"{name}_" if f"{name}_" in settings.model_fields else name: value for name, value in values.items()}
    for name, field in settings.model_fields.items():
        if get_origin(field.annotation) is list and isinstance(values.get(name), str):
            commas = _extra(field).get("commas")
            values[name] = [part.strip() for part in values[name].split(",") if part.strip()] if commas else [values[name]]
    _require_arguments(settings, values)
    return settings.make(values)


class Commands(click.RichGroup):
    """Commands by one word or two: ``plan synthesize`` beside ``plan``, which takes arguments."""

    def resolve_command(self, ctx: Any, args: list[str]) -> tuple[str | None, Any, list[str]]:
        both = " ".join(args[:2])
        if len(args) > 1 and both in self.commands:
            return both, self.commands[both], args[2:]
        return super().resolve_command(ctx, args)


def command(group: click.RichGroup, name: str, settings: type[Settings]) -> Callable[[Callable[[Any, bool], None]], Any]:
    """Registers ``function(settings, as_json)`` as a command with the options of ``settings``."""

    def decorate(function: Callable[[Any, bool], None]) -> Any:
        @group.command(name, help=function.__doc__)
        @options_of(settings)
        def run(print_config: bool, as_json: bool, **given: Any) -> None:
            made = gather(settings, given)
            if print_config:
                click.echo(yaml.safe_dump(written.masked(made.model_dump(mode="json")), sort_keys=False, allow_unicode=True), nl=False)
                return
            function(made, as_json)

        panels: dict[str, list[str]] = {}
        for field_name, field in settings.model_fields.items():
            extra = _extra(field)
            if not extra.get("argument"):
                names = [f"--{choice}" for choice in get_args(field.annotation)] if extra.get("flags") else [written.flag_of(field_name)]
                panels.setdefault(str(extra.get("panel")), []).extend(names)
        panels["General"] = ["--config", "--set", "--print-config", "--json", "--help"]
        place = "llmemb" if group.name in (None, "llmemb") else f"llmemb {group.name}"
        click.rich_click.OPTION_GROUPS[f"{place} {name}"] = [{"name": panel, "options": names} for panel, names in panels.items()]
        return run

    return decorate
