"""JSON as an answer must give it: nothing else around it, no key twice, no NaN.

Invariant: what is returned stood in the answer; nothing is guessed. Of a Markdown code fence around the whole answer, the inside is taken and this is said.
"""

from __future__ import annotations

import json
import re
from typing import Any

_FENCE = re.compile(r"\s*```(?:json|JSON)?[ \t]*\r?\n(.*?)\r?\n?[ \t]*```\s*", re.DOTALL)


class NotStrict(ValueError):
    """What is wrong, and where in the answer."""


def parse(text: str) -> tuple[Any, tuple[str, ...]]:
    """(value, repairs: ``fence`` or none). Raises NotStrict."""
    fenced = _FENCE.fullmatch(text)
    inside = fenced[1] if fenced else text
    try:
        return json.loads(inside, object_pairs_hook=_once, parse_constant=_no_constant), ("fence",) if fenced else ()
    except json.JSONDecodeError as error:
        near = inside[max(0, error.pos - 20) : error.pos + 20]
        raise NotStrict(f"{error}, near {near!r}") from error
    except RecursionError as error:
        raise NotStrict("nested too deep") from error
    except NotStrict:
        raise
    except ValueError as error:  # Python's limit to the digits of a number.
        raise NotStrict(str(error)) from error


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    value = dict(pairs)
    if len(value) < len(pairs):
        names = [name for name, _ in pairs]
        raise NotStrict(f"key {next(name for name in names if names.count(name) > 1)!r} stands twice")
    return value


def _no_constant(name: str) -> Any:
    raise NotStrict(f"{name} is no JSON")
