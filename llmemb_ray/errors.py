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
    │   └── RunStopped     … because its deadline or budget was reached
    ├── EngineDied         the engine that held a model broke                  exit 1
    ├── RejectsExceeded    a finished run with more rejects than allowed       exit 1
    ├── UnhealthyVectors   more vectors that are not finite than allowed       exit 1
    └── CheckFailed        verify or parity found a discrepancy          exit 3

Each class carries the exit code of the command line in ``exit_code``.
"""

from __future__ import annotations


class LlmembError(Exception):
    """Base of every error that llmemb_ray raises on purpose."""

    exit_code = 1


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


class EngineDied(LlmembError):
    """Its process is of no use any more and must end; a job then starts another and goes on."""


class UnhealthyVectors(LlmembError):
    exit_code = 1


class RejectsExceeded(LlmembError):
    exit_code = 1


class CheckFailed(LlmembError):
    exit_code = 3
