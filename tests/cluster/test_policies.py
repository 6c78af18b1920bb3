"""The rights that ``cluster/`` gives: enough for what a run really asks of S3, and each of them needed."""

from __future__ import annotations

import copy
import fnmatch
import json
from pathlib import Path
from typing import Any

import pytest
import s3fs

import llmemb_ray
from llmemb_ray.shards.run import Run
from llmemb_ray.storage import Storage
from tests.cluster.files import CLUSTER, service
from tests.s3_server import S3Server
from tests.small_jobs import write


@pytest.mark.parametrize("path", sorted(CLUSTER.glob("*-policy.json")), ids=lambda path: path.stem)
def test_policies_name_actions_of_the_services(path: Path) -> None:
    """An action that does not exist allows nothing, without a word."""
    permissions = {"s3:ListBucket", "iam:PassRole"}  # Not named as an operation is.
    for statement in json.loads(path.read_text())["Statement"]:
        for action in as_list(statement["Action"]):
            of, name = action.split(":")
            assert action in permissions or name in service(of).operation_names, action


def as_list(value: Any) -> list[Any]:
    return value if isinstance(value, list) else [value]


def allowed(policy: Any, action: str, resource: str, prefix: str | None = None) -> bool:
    """Whether a policy of Allow statements lets one request through, as IAM reckons."""
    for statement in policy["Statement"]:
        assert statement["Effect"] == "Allow"
        conditions = statement.get("Condition", {}).get("StringLike", {}).get("s3:prefix")
        if (
            action in as_list(statement["Action"])
            and any(fnmatch.fnmatchcase(resource, pattern) for pattern in as_list(statement["Resource"]))
            and (conditions is None or (prefix is not None and any(fnmatch.fnmatchcase(prefix, pattern) for pattern in as_list(conditions))))
        ):
            return True
    return False


ACTIONS = {
    "get_object": ["s3:GetObject"],
    "head_object": ["s3:GetObject"],
    "put_object": ["s3:PutObject"],
    "delete_object": ["s3:DeleteObject"],
    "create_multipart_upload": ["s3:PutObject"],
    "upload_part": ["s3:PutObject"],
    "complete_multipart_upload": ["s3:PutObject"],
    "abort_multipart_upload": ["s3:AbortMultipartUpload"],
}


def refused(policy: Any, method: str, request: dict[str, Any]) -> str | None:
    """Why the policy would not do for a request, or None."""
    bucket = f"arn:aws:s3:::{request['Bucket']}"
    if method in ("list_objects_v2", "get_paginator"):
        return None if allowed(policy, "s3:ListBucket", bucket, request.get("Prefix", "")) else f"list {request.get('Prefix')!r}"
    missing = [action for action in ACTIONS[method] if not allowed(policy, action, f"{bucket}/{request['Key']}")]
    # Of what is not there S3 says so only to who may list it; s3:prefix is then the key. To others it is forbidden, and a run would not begin.
    if method in ("get_object", "head_object") and not allowed(policy, "s3:ListBucket", bucket, request["Key"]):
        missing.append("s3:ListBucket")
    return f"{method} {request['Key']!r}: {', '.join(missing)}" if missing else None


def test_the_policy_is_enough_for_a_run_and_no_more(s3: S3Server, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every request of a job with corpus, model and output on a real server, run again, begun anew, verified; and an object beyond 4 GiB."""
    requests: list[tuple[str, dict[str, Any]]] = []
    call, pages = s3fs.S3FileSystem._call_s3, s3fs.S3FileSystem._iterdir

    async def recorded(self: Any, method: str, *arguments: Any, **request: Any) -> Any:
        requests.append((method, {name: request[name] for name in ("Bucket", "Key", "Prefix") if name in request}))
        return await call(self, method, *arguments, **request)

    async def listed(self: Any, bucket: str, *arguments: Any, **options: Any) -> Any:
        requests.append(("list_objects_v2", {"Bucket": bucket, "Prefix": options.get("prefix", "")}))
        async for entry in pages(self, bucket, *arguments, **options):
            yield entry

    monkeypatch.setattr(s3fs.S3FileSystem, "_call_s3", recorded)
    monkeypatch.setattr(s3fs.S3FileSystem, "_iterdir", listed)
    source = Storage(s3.url(), s3.access())
    source.put("corpus/a.parquet", write(tmp_path / "a.parquet", ["one text", None, "another"], id=[1, 2, 3]).read_bytes())
    for file in model.iterdir():
        source.put(f"models/small/{file.name}", file.read_bytes())
    requests.clear()
    monkeypatch.setenv("LLMEMB_CACHE", str(tmp_path / "cache"))
    access = {"endpoint_url": s3.endpoint_url, "storage_options": s3.storage_options}
    settings = {"model": s3.url("models/small"), "actors": "0", "quiet": True, "rows_per_unit": 2} | access
    for more in ({}, {}, {"overwrite": True}):
        llmemb_ray.embed(s3.url("corpus/"), s3.url("runs/vectors/"), **(settings | more))
    run = Run(Storage(s3.url("runs/vectors"), s3.access()))
    assert llmemb_ray.verify(run, against=[s3.url("corpus/")]).problems == []
    llmemb_ray.embed(s3.url("corpus/*.parquet"), s3.url("runs/glob"), **settings)

    assert {"get_object", "head_object", "put_object", "delete_object", "list_objects_v2"} <= {method for method, _ in requests}
    text = (CLUSTER / "bucket-policy.json").read_text().replace("CHANGE-ME-bucket", s3.bucket)
    policy = json.loads(text)
    too_large = [(method, {"Bucket": s3.bucket, "Key": "runs/vectors/data/x.parquet"}) for method in ACTIONS]  # Beyond 4 GiB: by parts.
    assert [reason for method, request in requests + too_large if (reason := refused(policy, method, request))] == []
    less = copy.deepcopy(policy)
    for statement in less["Statement"]:
        for place in (statement, statement.get("Condition", {}).get("StringLike", {})):
            for key in place.keys() & {"Action", "Resource", "s3:prefix"}:
                parts = place[key] = as_list(place[key])
                for part in parts:
                    place[key] = [other for other in parts if other != part]
                    assert any(refused(less, method, request) for method, request in requests + too_large), f"{part} is needed by nothing"
                    place[key] = parts
    for action, key in (("s3:PutObject", "corpus/a.parquet"), ("s3:DeleteObject", "models/small/config.json"), ("s3:GetObject", "other/a")):
        assert not allowed(policy, action, f"arn:aws:s3:::{s3.bucket}/{key}")
    assert not allowed(policy, "s3:ListBucket", f"arn:aws:s3:::{s3.bucket}", "")
