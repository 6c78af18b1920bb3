"""Checkpoints of a training, on any storage: weights, the optimiser's state, and what the loop must remember.

Invariant: a checkpoint counts only if its marker, written last, is there and every file has the size and digest that the marker gives it; so a
process killed while it writes leaves the checkpoint before. No file is pickled: reading one runs no code. Knows no model.

    checkpoints/step-000100/state.safetensors      trained weights by name
    checkpoints/step-000100/optimizer.safetensors  the optimiser's tensors
    checkpoints/step-000100/state.json             its settings and the loop's own values
    checkpoints/step-000100/complete.json          the marker
"""

from __future__ import annotations

import hashlib
import json
import logging
import re
from collections.abc import Iterable
from dataclasses import dataclass
from itertools import zip_longest
from typing import TYPE_CHECKING, Any

from llmemb_ray.errors import CheckFailed, NotFound
from llmemb_ray.storage import Storage

if TYPE_CHECKING:
    import torch

logger = logging.getLogger(__name__)

ROOT = "checkpoints"
MARKER = "complete.json"
KEPT = 2
"""Newest checkpoints that ``keep`` leaves: one more than needed, in case a file of the last one is damaged."""
SEPARATOR = "\t"
"""Between a weight's name and the name of a value that the optimiser keeps of it."""


@dataclass(frozen=True, kw_only=True)
class Checkpoint:
    """A training after so many steps."""

    step: int
    state: dict[str, torch.Tensor]
    """Trained weights by name, as ``TrainedModel.state`` gives them."""
    optimizer: dict[str, Any]
    """As ``TrainedModel.optimizer_state`` gives it."""
    info: dict[str, Any]
    """What else the loop must remember, in values that JSON has."""


class Checkpoints:
    """The checkpoints below ``checkpoints/`` of a storage. Only one process may write."""

    def __init__(self, storage: Storage) -> None:
        self.storage = storage

    def write(self, checkpoint: Checkpoint) -> int:
        """Writes all files, then the marker; returns their bytes. Raises StorageError."""
        from safetensors.torch import save

        directory = _directory(checkpoint.step)
        values = {
            f"{name}{SEPARATOR}{key}": value.contiguous() for name, values in checkpoint.optimizer.get("state", {}).items() for key, value in values.items()
        }
        rest = {"step": checkpoint.step, "groups": checkpoint.optimizer.get("groups", []), "info": checkpoint.info}
        files = {
            "state.safetensors": save({name: value.contiguous() for name, value in checkpoint.state.items()}),
            "optimizer.safetensors": save(values),
            "state.json": json.dumps(rest, indent=1, ensure_ascii=False).encode(),
        }
        self.storage.delete([f"{directory}/{MARKER}"])
        for name, data in files.items():
            self.storage.put(f"{directory}/{name}", data)
        marker = {"step": checkpoint.step, "files": {name: {"size": len(data), "sha256": _sha256(data)} for name, data in files.items()}}
        self.storage.put(f"{directory}/{MARKER}", json.dumps(marker, indent=1).encode())
        return sum(map(len, files.values()))

    def steps(self) -> list[int]:
        """Steps of the checkpoints with a marker, ascending; their files are not looked at."""
        found = (re.fullmatch(rf"{ROOT}/step-(\d+)/{re.escape(MARKER)}", entry.path) for entry in self.storage.list(ROOT))
        return sorted(int(match[1]) for match in found if match)

    def latest(self) -> int | None:
        """Step of the last checkpoint whose files are those of its marker. One that is damaged is passed over, with a warning."""
        steps = self.steps()[::-1]
        for step, before in zip_longest(steps, steps[1:]):
            try:
                self._files(step)
            except (CheckFailed, NotFound) as error:
                way = "there is none before it: training starts anew" if before is None else f"the one before it, of step {before}, is taken"
                logger.warning("%s; %s", error, way)
            else:
                return step
        return None

    def read(self, step: int) -> Checkpoint:
        """The tensors lie in host memory. Raises CheckFailed for one that is damaged, NotFound for one that is not there."""
        from safetensors.torch import load

        files = self._files(step)
        state: dict[str, dict[str, torch.Tensor]] = {}
        for name, value in load(files["optimizer.safetensors"]).items():
            weight, _, key = name.partition(SEPARATOR)
            state.setdefault(weight, {})[key] = value
        rest = json.loads(files["state.json"])
        return Checkpoint(step=step, state=load(files["state.safetensors"]), optimizer={"state": state, "groups": rest["groups"]}, info=rest["info"])

    def keep(self, steps: Iterable[int] = ()) -> None:
        """Deletes all checkpoints but these, the newest two and unfinished newer ones; markers first."""
        complete = self.steps()
        newest = complete[-KEPT:]
        spared = {*steps, *newest}
        found = (re.match(rf"{ROOT}/step-(\d+)/", entry.path) for entry in self.storage.list(ROOT))
        everything = {int(match[1]) for match in found if match}
        for step in sorted(everything - spared):
            if not newest or step > newest[-1]:
                continue
            self.storage.delete([f"{_directory(step)}/{MARKER}"])
            self.storage.delete_tree(_directory(step))

    def _files(self, step: int) -> dict[str, bytes]:
        """The content of a checkpoint's files, each as its marker says."""
        directory = _directory(step)
        where = f"checkpoint {self.storage.display(directory)}"
        try:
            files = json.loads(self.storage.read(f"{directory}/{MARKER}"))["files"]
            wanted = {name: (int(file["size"]), str(file["sha256"])) for name, file in files.items()}
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise CheckFailed(f"{where}: {MARKER} cannot be read") from error
        found: dict[str, bytes] = {}
        for name, (size, sha256) in wanted.items():
            try:
                data = self.storage.read(f"{directory}/{name}")
            except NotFound as error:
                raise CheckFailed(f"{where}: {name} is missing") from error
            if len(data) != size:
                raise CheckFailed(f"{where}: {name} has {len(data)} bytes where its marker says {size}")
            if _sha256(data) != sha256:
                raise CheckFailed(f"{where}: {name} is not what its marker says (SHA-256)")
            found[name] = data
        return found


def _directory(step: int) -> str:
    return f"{ROOT}/step-{step:06d}"


def _sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()
