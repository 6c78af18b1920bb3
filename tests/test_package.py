"""The package as a whole: its public names, what importing it costs, its errors, its submitted jobs."""

from __future__ import annotations

import ast
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

import llmemb_ray
from llmemb_ray import errors

ROOT = Path(__file__).parents[1]
HEAVY = ("torch", "transformers", "ray", "peft", "bitsandbytes", "pyarrow", "pydantic", "numpy", "fsspec")


def test_the_public_names_are_these() -> None:
    assert llmemb_ray.__all__ == [
        "EmbedStage",
        "Embedder",
        "LlmembError",
        "Receipt",
        "Representation",
        "Run",
        "__version__",
        "embed",
        "export",
        "open_run",
        "search_run",
        "verify",
    ]
    assert dir(llmemb_ray) == llmemb_ray.__all__


@pytest.mark.parametrize("name", llmemb_ray.__all__)
def test_each_public_name_is_there_and_documented(name: str) -> None:
    found = getattr(llmemb_ray, name)
    assert name == "__version__" or found.__doc__


def test_no_public_name_is_hidden_by_a_module_of_its_name() -> None:
    """Importing a subpackage sets its name on the package."""
    code = "import pkgutil, importlib, types, llmemb_ray\n"
    code += "for module in pkgutil.iter_modules(llmemb_ray.__path__, 'llmemb_ray.'):\n    importlib.import_module(module.name)\n"
    code += "assert not [name for name in llmemb_ray.__all__ if isinstance(getattr(llmemb_ray, name), types.ModuleType)]"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_a_name_that_is_not_there_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="no_such_name"):
        _ = llmemb_ray.no_such_name


def test_importing_the_package_loads_nothing_heavy() -> None:
    script = f"import sys, llmemb_ray; print([name for name in {HEAVY!r} if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_representation_and_embedders_never_import_ray() -> None:
    script = "import sys, llmemb_ray.embedders.embedder, llmemb_ray.embedders.transformers_backend, llmemb_ray.representation; print('ray' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"


def drawn_tree() -> dict[str, tuple[str | None, int | None]]:
    """Class -> (base, exit code) out of the drawing in the docstring of ``errors``."""
    tree: dict[str, tuple[str | None, int | None]] = {}
    parents: dict[int, str] = {}
    for line in str(errors.__doc__).splitlines():
        match = re.match(r"(?P<lead>[ │├└─]+)(?P<name>[A-Z]\w+)(?P<rest>.*)$", line)
        if not match:
            continue
        depth = (len(match["lead"]) - 4) // 4
        code = re.search(r"exit (\d)", match["rest"])
        tree[match["name"]] = (parents.get(depth - 1), int(code[1]) if code else None)
        parents[depth] = match["name"]
    return tree


def test_the_tree_of_errors_is_the_one_drawn() -> None:
    tree = drawn_tree()
    classes = {name: value for name, value in vars(errors).items() if isinstance(value, type) and issubclass(value, errors.LlmembError)}
    assert tree.keys() == classes.keys()
    for name, (base, code) in tree.items():
        assert base is None or classes[base] in classes[name].__bases__, name
        if code is not None:
            assert classes[name].exit_code == code, name
        elif base is not None:
            assert classes[name].exit_code == classes[base].exit_code, name


@pytest.mark.parametrize("path", sorted(path.relative_to(ROOT) for folder in ("llmemb_ray", "jobs") for path in (ROOT / folder).rglob("*.py")), ids=str)
def test_every_module_says_what_it_is(path: Path) -> None:
    assert ast.get_docstring(ast.parse((ROOT / path).read_bytes()))


def test_the_submitted_job_takes_the_arguments_of_the_command() -> None:
    """Printed wide, so that no option name is broken over lines."""
    shown = [
        subprocess.run(
            [sys.executable, *command, "--help"],
            capture_output=True,
            text=True,
            check=True,
            cwd=ROOT,
            env={"COLUMNS": "200", "PATH": "/usr/bin:/bin", "PYTHONPATH": str(ROOT)},
        )
        for command in (["jobs/embed.py"], ["-m", "llmemb_ray.cli", "embed"])
    ]
    assert shown[0].stdout == shown[1].stdout
    assert "--rows-per-unit" in shown[0].stdout


def test_the_wheel_installs_and_its_command_runs(tmp_path: Path) -> None:
    root = Path(__file__).parents[1]
    pip = [sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check"]
    subprocess.run([*pip, "wheel", "--no-deps", "--wheel-dir", str(tmp_path), str(root)], check=True)
    (wheel,) = tmp_path.glob("llmemb_ray-*.whl")
    site = tmp_path / "site"
    subprocess.run([*pip, "install", "--no-deps", "--target", str(site), str(wheel)], check=True)

    def files(package: Path) -> set[str]:
        return {path.relative_to(package).as_posix() for path in package.rglob("*") if path.is_file() and "__pycache__" not in path.parts}

    assert files(site / "llmemb_ray") == files(root / "llmemb_ray"), "templates too"
    code = "import llmemb_ray, sys; from llmemb_ray.cli import main; print(llmemb_ray.__file__); sys.exit(main(['--version']))"
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, env=os.environ | {"PYTHONPATH": str(site)}, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith(str(site))
