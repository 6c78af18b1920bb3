"""What the tests of ``cluster/`` read: its files, and what AWS's own client knows."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import yaml
from botocore.session import get_session

ROOT = Path(__file__).parents[2]
CLUSTER = ROOT / "cluster"


def load(path: Path) -> Any:
    """The one document of a file. What YAML leaves to chance, a key given twice, is refused."""

    class Strict(yaml.SafeLoader):
        def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
            keys = [self.construct_object(key, deep=True) for key, _ in node.value]
            assert len(keys) == len(set(keys)), f"{path.name}: a key stands twice in line {node.start_mark.line + 1}: {keys}"
            return super().construct_mapping(node, deep)

    return yaml.load(path.read_text(encoding="utf-8"), Loader=Strict)


@functools.cache
def service(name: str) -> Any:
    """What AWS's own client knows of a service."""
    return get_session().get_service_model(name)
