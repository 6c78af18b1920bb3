"""Settings in writing: read from YAML and from ``dotted.key=value``, printed with secrets masked, written as a command.

Invariant: nothing that looks like a secret is printed. What a setting may be is for ``config`` to say.
"""

from __future__ import annotations

import json
import math
import re
import shlex
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import yaml

from llmemb_ray.config import Settings, is_duration
from llmemb_ray.errors import ConfigError
from llmemb_ray.storage import redact

SECRET_WORDS = ("key", "secret", "token", "password", "passphrase", "credential", "sas", "signature", "auth", "connection_string")


class _Loader(yaml.SafeLoader):
    """YAML without the numbers to base 60 of its version 1.1: ``actors: 1:8`` is a text, not 68."""


_Loader.yaml_implicit_resolvers = {
    first: [(tag, re.compile("(?![^:]*:)" + pattern.pattern, re.VERBOSE) if tag.endswith((":int", ":float")) else pattern) for tag, pattern in resolvers]
    for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}


def parse_yaml(text: str) -> Any:
    """Raises yaml.YAMLError."""
    return yaml.load(text, _Loader)  # noqa: S506 - a SafeLoader


def read_file(path: str) -> dict[str, Any]:
    """Settings from a YAML file. Raises ConfigError."""
    try:
        data = parse_yaml(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"config {path}: {error.strerror}") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        # Not the error's own text: it quotes the file, which may hold secrets.
        mark = getattr(error, "problem_mark", None)
        where = f", line {mark.line + 1}: {getattr(error, 'problem', None)}" if mark else ""
        raise ConfigError(f"config {path} is not YAML{where}") from None
    if data is None:
        return {}
    if not isinstance(data, dict):
        raise ConfigError(f"config {path}: holds no mapping of settings to values")
    return {str(key).replace("-", "_"): value for key, value in data.items()}


def override(values: dict[str, Any], assignments: list[str]) -> dict[str, Any]:
    """``values`` with ``dotted.key=value`` assignments applied, values read as YAML. Raises ConfigError."""
    for assignment in assignments:
        name, equals, text = assignment.partition("=")
        if not equals or not name:
            raise ConfigError(f"set {name}: write it as dotted.key=value")
        *parents, last = name.replace("-", "_").split(".")
        place = values
        for parent in parents:
            place = place.setdefault(parent, {})
            if not isinstance(place, dict):
                raise ConfigError(f"set {name}: {parent} is not a mapping")
        try:
            place[last] = parse_yaml(text)
        except yaml.YAMLError as error:
            raise ConfigError(f"set {name}: its value is not YAML") from error
    return values


def json_lines(records: Iterable[dict[str, Any]]) -> bytes:
    """A line each. What is no Unicode text, half a surrogate pair, is escaped."""
    return b"".join(_json_line(record) for record in records)


def _json_line(record: dict[str, Any]) -> bytes:
    try:
        return (json.dumps(record, ensure_ascii=False) + "\n").encode()
    except UnicodeEncodeError:
        return (json.dumps(record) + "\n").encode()


def masked(values: dict[str, Any]) -> dict[str, Any]:
    """A copy of settings fit for printing: URLs redacted, and of the storage options whatever looks like a secret by its name hidden."""
    return {name: _without_secrets(value) if name == "storage_options" else _of_arguments(name, _redacted(value)) for name, value in values.items()}


def given_settings(settings: Settings) -> dict[str, Any]:
    """What was set, for a record: without storage options, URLs redacted."""
    values = settings.model_dump(mode="json", exclude={"storage_options"})
    return masked({name: value for name, value in values.items() if name in settings.model_fields_set})


def _of_arguments(name: str, value: Any) -> Any:
    """Of ``engine_arg`` the values that look like secrets by their keys hidden."""
    if name != "engine_arg" or not isinstance(value, list):
        return value
    pairs = (str(item).partition("=") for item in value)
    return [f"{key}{equals}{_without_secrets(text, key)}" for key, equals, text in pairs]


def _redacted(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _redacted(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_redacted(item) for item in value]
    return redact(value) if isinstance(value, str) else value


def _without_secrets(value: Any, name: str = "") -> Any:
    if value is not None and any(word in name.lower() for word in SECRET_WORDS):
        return "***"
    if isinstance(value, dict):
        return {key: _without_secrets(item, str(key)) for key, item in value.items()}
    if isinstance(value, list):
        return [_without_secrets(item) for item in value]
    return _redacted(value)


def flag_of(name: str) -> str:
    """The option of a setting; the name of one that would be a word of Python's ends in a line."""
    return "--" + name.rstrip("_").replace("_", "-")


def command_line(settings: Settings, command: str = "embed") -> str:
    """The command that continues a job with these settings: without overwrite, a deadline that has passed, and storage options."""
    left_out = {"overwrite", "storage_options"}
    deadline = getattr(settings, "deadline", None)
    if deadline and not is_duration(deadline):
        left_out.add("deadline")
    words, assignments = ["llmemb", *command.split()], list[str]()
    fields = type(settings).model_fields
    for name, field in fields.items():
        if isinstance(field.json_schema_extra, dict) and field.json_schema_extra.get("argument"):
            left_out.add(name)
            value = getattr(settings, name)
            words += [str(item) for item in value] if isinstance(value, list) else [str(value)]
    for name, field in fields.items():
        value = getattr(settings, name)
        if name in left_out or name not in settings.model_fields_set or value == field.get_default(call_default_factory=True):
            continue
        flag = flag_of(name)
        extra = field.json_schema_extra if isinstance(field.json_schema_extra, dict) else {}
        if value is None:
            assignments += ["--set", f"{name}=null"]
        elif isinstance(value, bool):
            words.append(flag if value else f"--no-{flag[2:]}")
        elif isinstance(value, list) and not all(_is_plain(item) for item in value):
            assignments += ["--set", f"{name}={_in_flow_style(value)}"]
        elif isinstance(value, list) and not extra.get("commas"):
            words += [word for item in _of_arguments(name, value) for word in (flag, str(item))]
        else:
            words += [flag, ",".join(map(str, value)) if isinstance(value, list) else str(value)]
    return shlex.join([*map(redact, words), *assignments])


def _is_plain(item: Any) -> bool:
    """Whether its option can say the item of a list: what is no mapping, or of one the path alone."""
    return not isinstance(item, Settings) or item.model_dump(exclude_unset=True) == {"path": [str(item)]}


def _in_flow_style(items: list[Settings]) -> str:
    """YAML on one line, what is given alone; redacted text by text, since a URL in one would swallow the next."""
    values = _redacted([item.model_dump(mode="json", exclude_unset=True) for item in items])
    return yaml.safe_dump(values, default_flow_style=True, sort_keys=False, allow_unicode=True, width=math.inf).rstrip()
