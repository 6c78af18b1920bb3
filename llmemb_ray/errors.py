"""The exceptions of llmemb_ray. Every one names what went wrong, where, and the way out.

    LlmembError
    ├── ConfigError        a setting that cannot work                          exit 2
    ├── InputError         a corpus, or files of it, that cannot be read       exit 2
    ├── OutputError        an output directory that is not what is needed      exit 2
    │   ├── RunMismatch    it holds a run of another run key or vector space
    │   └── LeaseHeld      another driver is at work on it
    ├── ModelError         a model, tokenizer or adapter that cannot be used   exit 2
    ├── StorageError       a storage operation that failed for good            exit 1
    │   └── NotFound       … because nothing is there
    ├── RunFailed          a run that ended without all its units              exit 1
    │   ├── RunStopped     … because its deadline or budget was reached, or a signal came
    │   └── ItemsFailed    … because an actor failed or died at some items
    ├── EngineDied         the engine that held a model broke                  exit 1
    ├── RejectsExceeded    a finished run with more rejects than allowed       exit 1
    ├── UnhealthyVectors   more vectors that are not finite than allowed       exit 1
    └── CheckFailed        verify or parity found a discrepancy          exit 3

Each class carries the exit code of the command line in ``exit_code``.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

_UNPRINTABLE = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u200e\u200f\u2028-\u202e\u2066-\u2069]")
"""Control characters but tab and line feed: what moves a terminal's cursor, writes its title or turns the direction of a line."""


def printable(text: str) -> str:
    """The text fit for a terminal: control characters, which a corpus may bring, as JSON escapes them."""
    return _UNPRINTABLE.sub(lambda match: f"\\u{ord(match[0]):04x}", text)


class LlmembError(Exception):
    """Base of every error that llmemb_ray raises on purpose. Its text is printable, whatever names of files and columns stand in it."""

    exit_code = 1

    def __str__(self) -> str:
        return printable(super().__str__())


class ConfigError(LlmembError, ValueError):
    exit_code = 2


class InputError(LlmembError):
    exit_code = 2


class OutputError(LlmembError):
    exit_code = 2


class RunMismatch(OutputError):
    """The output belongs to another run key or vector space; the message lists the fields."""


class LeaseHeld(OutputError):
    """Another driver holds the lease on this output."""


class ModelError(LlmembError):
    exit_code = 2


class StorageError(LlmembError):
    exit_code = 1


class NotFound(StorageError):
    """The object or file does not exist."""


class RunFailed(LlmembError):
    exit_code = 1


class RunStopped(RunFailed):
    """Stopped on purpose, cleanly: the same command continues."""


class ItemsFailed(RunFailed):
    """items: numbers of what the actor at fault had been given; one of them is the cause."""

    def __init__(self, message: str, items: Sequence[int]) -> None:
        super().__init__(message)
        self.items = tuple(items)


class EngineDied(LlmembError):
    """Its process is of no use any more and must end; a job then starts another and goes on."""


class UnhealthyVectors(LlmembError):
    exit_code = 1


class RejectsExceeded(LlmembError):
    exit_code = 1


class CheckFailed(LlmembError):
    exit_code = 3
