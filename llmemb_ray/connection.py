"""The Ray that a command works on: one that is up, one at an address, or one of its own on this machine."""

from __future__ import annotations

import logging
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import ray

from llmemb_ray.errors import ConfigError, LlmembError, RunFailed

ANSWER_SECONDS = 20.0
"""How long a cluster's head may take to answer."""


@contextmanager
def connected(address: str | None = None) -> Iterator[None]:
    """A Ray to work on: the one that is up, else the cluster at ``address`` or RAY_ADDRESS, else one of this machine's own.

    A Ray that was up before stays up. Raises ConfigError if none answers.
    """
    ours = not ray.is_initialized()
    if ours:
        address = address or os.environ.get("RAY_ADDRESS") or "local"
        _require_answer(address)
        local = {"include_dashboard": False} if address == "local" else {}
        # Ray's warnings about its own workings would drown our lines; its log files keep them.
        os.environ.setdefault("RAY_BACKEND_LOG_LEVEL", "fatal")
        logging.getLogger("ray.data").setLevel(logging.ERROR)
        try:
            ray.init(address=address, logging_level="ERROR", log_to_driver=False, **local)
        except (ConnectionError, ValueError) as error:
            raise ConfigError(f"ray_address: no Ray cluster answers at {address}: {error}") from error
    try:
        yield
    finally:
        if ours:
            ray.shutdown()


def result_of(reference: Any, task: str) -> Any:
    """The result of a task; its own error, if it has one, without Ray's wrapping. task: as RunFailed names it."""
    try:
        return ray.get(reference)
    except ray.exceptions.RayTaskError as error:
        if isinstance(error.cause, LlmembError):
            raise error.cause from None
        raise RunFailed(f"{task} failed: {type(error.cause).__name__}: {error.cause}") from error
    except ray.exceptions.RayError as error:
        raise RunFailed(f"{task} was lost: {type(error).__name__}; run the command again") from error


def _require_answer(address: str) -> None:
    """Raises ConfigError if nothing listens at ``host:port``: Ray itself would try for minutes."""
    host, colon, port = address.rpartition(":")
    if not colon or "://" in address or not port.isdigit():
        return
    try:
        socket.create_connection((host, int(port)), timeout=ANSWER_SECONDS).close()
    except OSError as error:
        raise ConfigError(f"ray_address: no Ray cluster answers at {address}: {error.strerror or error}") from error
