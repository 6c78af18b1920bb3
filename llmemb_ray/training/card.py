"""The card of a trained model: README.md in the form that the Hugging Face Hub reads. Text alone; knows no files."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

import yaml

if TYPE_CHECKING:
    from llmemb_ray.representation import Representation

NAME = "README.md"


def card(*, title: str, header: dict[str, Any], sections: Sequence[tuple[str, str]]) -> str:
    """header: metadata of the Hub; what is None is left out. sections: (heading, Markdown)."""
    known = {name: value for name, value in header.items() if value is not None}
    parts = [f"---\n{yaml.safe_dump(known, sort_keys=False, allow_unicode=True)}---\n", f"# {title}\n"]
    return "\n".join([*parts, *(f"## {heading}\n\n{body.strip()}\n" for heading, body in sections if body.strip())])


def header(*, base: str | None, library: str, license_: str | None = None, adapter: bool = False) -> dict[str, Any]:
    """base: the base model as a hub id, None where it is none, since the Hub takes nothing else."""
    return {
        "base_model": base,
        "base_model_relation": None if base is None else "adapter" if adapter else "finetune",
        "library_name": library,
        "pipeline_tag": "feature-extraction",
        "tags": ["sentence-embeddings", "contrastive", "llmemb_ray", *(["lora"] if adapter else [])],
        "license": license_ or "unknown",
    }


def representation_text(representation: Representation) -> str:
    document, query = representation.document, representation.query
    rows: list[tuple[str, Any]] = [("template", document.template)] if document == query else [("documents", document.template), ("queries", query.template)]
    rows += [("cleaning", document.clean), ("EOS appended", representation.append_eos), ("longest prompt, tokens", representation.max_tokens)]
    rows += [("pooling", representation.pooling), ("layer", representation.layer), ("dimensions", representation.dimensions or "all")]
    rows += [("normalised", representation.normalize)]
    return "What decides a vector besides the weights (`llmemb.json`):\n\n" + table(("", ""), [(name, code(value)) for name, value in rows])


def code(value: Any) -> str:
    """As code in a cell of a table."""
    text = json.dumps(value, ensure_ascii=False) if not isinstance(value, str) else value
    return f"`{text}`".replace("|", "\\|").replace("\n", "⏎")


def table(names: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    return "\n".join(_line(row) for row in (names, ["---"] * len(names), *rows))


def _line(cells: Sequence[Any]) -> str:
    return "| " + " | ".join(str(cell) for cell in cells) + " |"


def block(*commands: str, language: str = "sh") -> str:
    return f"```{language}\n" + "\n".join(commands) + "\n```"


def settings_text(settings: dict[str, Any]) -> str:
    return table(("setting", "value"), [(name, code(value)) for name, value in settings.items()])


def data_text(record: dict[str, Any]) -> str:
    """The accounts of the rows: what are numbers, and tables of what stands by name."""
    return "\n\n".join(_accounts(record))


def _accounts(record: dict[str, Any]) -> Iterator[str]:
    numbers = {name: value for name, value in record.items() if isinstance(value, int | float | str) and not isinstance(value, bool)}
    if numbers:
        yield table(("", ""), [(name.replace("_", " "), value) for name, value in numbers.items()])
    for name, value in record.items():
        rows = [{"": key} | item for key, item in value.items() if isinstance(item, dict)] if isinstance(value, dict) else value
        if isinstance(rows, list) and rows and all(isinstance(row, dict) for row in rows):
            columns = list(dict.fromkeys(key for row in rows for key in row))
            yield f"{name.replace('_', ' ')}:\n\n" + table(columns, [[code(row[key]) if key in row else "" for key in columns] for row in rows])
        elif isinstance(value, dict) and value and not any(isinstance(item, dict) for item in value.values()):
            yield f"{name.replace('_', ' ')}:\n\n" + table(("", ""), [(key, code(item)) for key, item in value.items()])
