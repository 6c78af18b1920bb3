"""What is done to a text before it enters a template.

``none`` leaves it alone. ``senteval`` is the preparation of paper 1's evaluation (its ``evaluation.py``,
``batcher``): a sentence is closed with a full stop, double quotes become single ones so that the
template's own quotes stay unambiguous, and a closing question mark becomes a full stop.
"""

from __future__ import annotations

from typing import Literal, get_args

Cleaning = Literal["none", "senteval"]
CLEANINGS: tuple[str, ...] = get_args(Cleaning)

_CLOSED = (".", "?", '"', "'")


def clean(text: str, cleaning: Cleaning) -> str:
    """The text as it goes into the template. Keeps the length of the text, but for an added full stop."""
    if cleaning == "none" or not text:
        return text
    if not text.endswith(_CLOSED):
        text += "."
    text = text.replace('"', "'")
    return text[:-1] + "." if text.endswith("?") else text
