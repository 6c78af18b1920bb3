"""No credential stands in what a job prints, logs, writes or raises, whether it works or fails.

One set of runs: an embedding on a real S3 server, on Ray; jobs that fail for their credentials; all that reads a run; a synthesis. Every
byte that they leave is searched.
"""

from __future__ import annotations

import base64
import json
import os
import shutil
import subprocess
import sys
import tempfile
import urllib.parse
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml

from llmemb_ray.storage import Storage
from tests.generation.chat_server import ChatServer, fault
from tests.s3_server import KEY, SECRET, S3Server
from tests.small_jobs import write

IN_OPTIONS = ("OPTIONKEY7Q2XK9", "option+secret/4mZr8v=")
SESSION, OPENAI, HF = "session-token-5hWq+1/x=", "sk-openai-9f3Kd72LmQ", "hf_hub8Rt4WnZx61"
USER, PASSWORD, SIGNATURE, REQUEST_TOKEN = "user-6Yb1Qe", "password-3cVn8K", "b7d1f0signature5e", "request-token-2Gd"

SECRETS = {
    "AWS_ACCESS_KEY_ID": KEY,
    "AWS_SECRET_ACCESS_KEY": SECRET,
    "AWS_SESSION_TOKEN": SESSION,
    "OPENAI_API_KEY": OPENAI,
    "HF_TOKEN": HF,
    "key of storage_options": IN_OPTIONS[0],
    "secret of storage_options": IN_OPTIONS[1],
    "user in a URL": USER,
    "password in a URL": PASSWORD,
    "signature in a URL": SIGNATURE,
    "token in a URL": REQUEST_TOKEN,
}

SIGNED = f"https://127.0.0.1:9/b/x.parquet?X-Amz-Credential={USER}&X-Amz-Signature={SIGNATURE}&X-Amz-Security-Token={REQUEST_TOKEN}"


def found_in(data: bytes) -> set[str]:
    """Names of the secrets that stand in some bytes: as they are, in a URL, in JSON, or in base64 as HTTP's own authentication sends them."""
    found = set()
    for name, secret in SECRETS.items():
        pair = base64.b64encode(f"{USER}:{PASSWORD}".encode()) if name.startswith("password") else secret.encode()
        forms = {secret.encode(), urllib.parse.quote(secret, safe="").encode(), json.dumps(secret)[1:-1].encode(), pair}
        if any(form in data for form in forms):
            found.add(name)
    return found


JOBS = """
import json, logging, os, sys, traceback
logging.basicConfig(level=logging.INFO)
from llmemb_ray import cli
for name, words in json.load(sys.stdin):
    print("job", name, flush=True)
    code = cli.main(words)
    try:
        if code:
            cli.llmemb.main(args=words, prog_name="llmemb", standalone_mode=False)
    except Exception as error:
        print(repr(error), error, *traceback.format_exception(error), sep=chr(10), flush=True)
    print("code", name, code, flush=True)
    sys.stderr.flush()
"""
"""Each command as its user runs it, and where it fails again as a program calls it: what an exception and its causes say is printed as well."""


@pytest.fixture
def rays() -> Iterator[Path]:
    """A directory for Ray's sessions; short, since sockets lie in it."""
    directory = Path(tempfile.mkdtemp(prefix="r", dir="/tmp"))
    yield directory
    shutil.rmtree(directory, ignore_errors=True)


def test_no_credential_is_left_anywhere(s3: S3Server, rays: Path, tmp_path: Path) -> None:
    config, brief = tmp_path / "config.yaml", tmp_path / "brief.yaml"
    config.write_text(yaml.safe_dump({"storage_options": {"s3": {"key": KEY, "secret": SECRET}}}))
    brief.write_text(yaml.safe_dump({"brainstorm": {"short-short": "Tasks"}, "generate": {"short-short": "One for {task} in {language}"}}))
    corpus = write(tmp_path / "a.parquet", ["a word", None, "another word"])
    Storage(s3.url(), s3.access()).put("in/a.parquet", corpus.read_bytes())
    here, inside, out, model = str(tmp_path / "o"), s3.url("in"), s3.url("out"), ["--model", "pocket", "--actors", "0"]
    quick = ["--storage-retry-seconds", "0.1"]
    wrong = ["--set", f"storage_options.key={IN_OPTIONS[0]}", "--set", f"storage_options.secret={IN_OPTIONS[1]}", "--set", f"storage_options.token={SESSION}"]
    made = ["--llm", "tiny", "--count", "2", "--families", "{short-short: 1}", "--tasks-per-family", "2", "--retries", "0", "--prompts", str(brief)]
    refusal = (401, fault(f"Incorrect API key provided: {OPENAI}", code="invalid_api_key"))

    def reply(prompt: str, _: int) -> str:
        return json.dumps({"input": "a text", "positive_document": "its like"}) if prompt.startswith("One") else json.dumps(["Find its like", "Find another"])

    with ChatServer(reply) as accepting, ChatServer(lambda *_: refusal) as refusing:
        jobs: dict[str, tuple[int, list[str]]] = {
            "plan": (0, ["plan", inside, out, "--model", "pocket", "--config", str(config), "--gpu", "L4"]),
            "print config": (0, ["embed", inside, out, *model, *wrong, "--print-config"]),
            "embed": (0, ["embed", inside, out, "--model", "pocket", "--actors", "1", "--ray-address", "local", "--config", str(config)]),
            "verify": (0, ["verify", out]),
            "status": (0, ["status", out, "--json"]),
            "search": (0, ["search", out, "word"]),
            "report": (0, ["report", out, "--out", str(tmp_path / "report.html")]),
            "export": (0, ["export", out, str(tmp_path / "npy"), "--to", "npy"]),
            "wrong key": (1, ["embed", inside, s3.url("other"), *model, *wrong, *quick]),
            "no bucket": (1, ["embed", inside, "s3://nowhere-at-all/x", *model, *quick]),
            "password of a corpus": (2, ["embed", f"s3://{USER}:{PASSWORD}@bucket/x", here, *model]),
            "password of a model": (2, ["embed", str(corpus), here, "--model", f"https://{USER}:{PASSWORD}@127.0.0.1:9/m", *quick]),
            "password of an endpoint": (1, ["verify", out, "--endpoint-url", f"http://{USER}:{PASSWORD}@127.0.0.1:9", *quick]),
            "signed corpus": (2, ["embed", SIGNED, here, *model]),
            "signed queries": (2, ["search", out, "--queries", SIGNED, *quick]),
            "gated model": (2, ["embed", str(corpus), here, "--model", "nobody/gated"]),
            "synthesis refused": (2, ["synthesize", "--out", str(tmp_path / "none"), "--base-url", refusing.url, *made]),
            "synthesis": (0, ["synthesize", "--out", str(tmp_path / "made"), "--base-url", accepting.url, *made]),
        }
        environment = os.environ | s3.environment | {"OPENAI_API_KEY": OPENAI, "HF_TOKEN": HF, "AWS_SESSION_TOKEN": SESSION, "RAY_TMPDIR": str(rays)}
        given = json.dumps([(name, words) for name, (_, words) in jobs.items()])
        done = subprocess.run([sys.executable, "-c", JOBS], input=given.encode(), env=environment, capture_output=True, check=True, timeout=300)
        assert {request["authorization"] for server in (accepting, refusing) for request, _ in server.requests} == {f"Bearer {OPENAI}"}
    printed = done.stdout.decode()
    for name, (code, _) in jobs.items():
        assert f"code {name} {code}\n" in printed, (name, printed, done.stderr.decode())
    assert b"Traceback" not in done.stderr
    left = {"stdout": done.stdout, "stderr": done.stderr}
    left |= {str(path): path.read_bytes() for root in (tmp_path, rays, s3.path()) for path in root.rglob("*") if path.is_file() and path != config}
    assert [name for name in left if name.startswith(str(rays)) and name.endswith(".log")], "Ray's logs are among them"
    assert {name.removeprefix(f"{s3.path()}/") for name in left} >= {"out/_llmemb/plan/plan.json", "out/_llmemb/receipt.json"}
    assert found_in(config.read_bytes()) == {"AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"}, "what is looked for is found where it is"
    leaked = {name: found for name, data in left.items() if (found := found_in(data))}
    assert not leaked
