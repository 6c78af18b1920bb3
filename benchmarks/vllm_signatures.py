"""Would our vLLM backend meet another version of vLLM as it met this one?

    python benchmarks/vllm_signatures.py WHEEL_OR_DIR            against the vLLM of this environment
    python benchmarks/vllm_signatures.py WHEEL_OR_DIR OTHER      one against the other; OTHER is the one we know

Compares, from source alone (nothing is imported, so a wheel for CUDA can be read anywhere), the classes, functions and choices of
vLLM that llmemb_ray uses, and looks up every name that our code imports from vllm. Prints a line for each: same, changed (and how)
or gone. Exit code 1 if something that we use is gone, or a parameter that we do not pass has come without a default.
"""

from __future__ import annotations

import argparse
import ast
import importlib.util
import sys
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

OURS = Path(__file__).parents[1] / "llmemb_ray"

ARGUMENTS = "chosen"
"""The variable in which our backend gathers what it passes to ``EngineArgs``."""


@dataclass(frozen=True)
class Used:
    """What we use of a module: a class's fields, a function's parameters, or the text of a function or assignment.

    name:   Class, function, Class.method or variable
    passed: parameters or fields that we name, besides those that our calls are seen to pass; they must exist
    text:   compare its source, not its parameters
    """

    module: str
    name: str
    passed: tuple[str, ...] = ()
    text: bool = False


USED = (
    Used("engine/arg_utils.py", "EngineArgs", ("model", "enable_lora", "max_loras", "max_lora_rank")),
    Used("engine/arg_utils.py", "EngineArgs.create_engine_config"),
    Used("v1/engine/llm_engine.py", "LLMEngine.from_engine_args", ("engine_args",)),
    Used("v1/engine/llm_engine.py", "LLMEngine.add_request", ("request_id", "prompt", "params", "lora_request")),
    Used("v1/engine/llm_engine.py", "LLMEngine.step"),
    Used("v1/engine/llm_engine.py", "LLMEngine.has_unfinished_requests"),
    Used("v1/engine/llm_engine.py", "LLMEngine.abort_request", ("request_ids",)),
    Used("v1/engine/llm_engine.py", "LLMEngine.add_lora", ("lora_request",)),
    Used("v1/engine/llm_engine.py", "LLMEngine.reset_prefix_cache"),
    Used("inputs/engine.py", "tokens_input", ("prompt_token_ids",)),
    Used("pooling_params.py", "PoolingParams", ("task", "use_activation")),
    Used("config/pooler.py", "PoolerConfig", ("seq_pooling_type", "use_activation")),
    Used("config/pooler.py", "SequencePoolingType", text=True),
    Used("lora/request.py", "LoRARequest", ("lora_name", "lora_int_id", "lora_path")),
    Used("outputs.py", "PoolingRequestOutput.__init__", ("request_id", "outputs", "num_cached_tokens", "finished", "error")),
    Used("outputs.py", "PoolingOutput", ("data",)),
    Used("config/scheduler.py", "SchedulerConfig", ("max_num_batched_tokens", "max_num_seqs")),
    Used("config/cache.py", "CacheConfig", ("block_size", "enable_prefix_caching")),
    Used("platforms/interface.py", "Platform.is_cpu"),
    Used("platforms/interface.py", "Platform.device_type", text=True),
    Used("platforms/interface.py", "Platform.get_device_total_memory"),
    Used("exceptions.py", "VLLMClientError"),
    Used("exceptions.py", "VLLMValidationError.__init__"),
    Used("v1/engine/exceptions.py", "EngineDeadError.__init__"),
    Used("v1/engine/exceptions.py", "EngineGenerateError"),
    Used("config/lora.py", "MaxLoRARanks", text=True),
    Used("config/lora.py", "LoRAConfig.verify_with_model_config", text=True),
    Used("model_executor/layers/quantization/__init__.py", "QuantizationMethods", text=True),
    Used("model_executor/layers/quantization/__init__.py", "DEPRECATED_QUANTIZATION_METHODS", text=True),
    Used("model_executor/model_loader/__init__.py", "LoadFormats", text=True),
    Used("config/model.py", "ModelDType", text=True),
    Used("config/model.py", "RunnerOption", text=True),
    Used("config/model.py", "ConvertOption", text=True),
    Used("v1/attention/backends/flash_attn.py", "FlashAttentionBackend.get_supported_kernel_block_sizes", text=True),
    Used("v1/attention/backends/flash_attn.py", "FlashAttentionBackend.get_preferred_block_size", text=True),
    Used("v1/attention/backends/flashinfer.py", "FlashInferBackend.get_supported_kernel_block_sizes", text=True),
    Used("v1/attention/backends/triton_attn.py", "TritonAttentionBackend.get_supported_kernel_block_sizes", text=True),
    Used("v1/attention/backends/cpu_attn.py", "CPUAttentionBackend.get_supported_kernel_block_sizes", text=True),
    Used("v1/attention/backends/cpu_attn.py", "CPUAttentionBackend.get_supported_head_sizes", text=True),
    Used("platforms/cpu.py", "CpuPlatform.update_block_size_for_backend", text=True),
    Used("config/vllm.py", "VllmConfig.use_v2_model_runner", text=True),
    Used("model_executor/models/adapters.py", "as_embedding_model", text=True),
    Used("entrypoints/llm.py", "LLM.__init__", ("model",)),
    Used("entrypoints/pooling/offline.py", "PoolingOfflineMixin.encode", ("prompts", "pooling_params", "use_tqdm", "lora_request", "pooling_task")),
    Used("entrypoints/pooling/offline.py", "PoolingOfflineMixin.embed", ("prompts", "use_tqdm", "pooling_params", "lora_request")),
)

VARIABLES = (
    *("VLLM_ENABLE_V1_MULTIPROCESSING", "VLLM_CPU_OMP_THREADS_BIND", "VLLM_CPU_KVCACHE_SPACE", "VLLM_LOGGING_LEVEL", "VLLM_USE_V2_MODEL_RUNNER"),
    *("VLLM_WORKER_MULTIPROC_METHOD", "VLLM_NO_USAGE_STATS"),
)
"""Environment variables that must still be read."""

Definition = ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef | ast.Assign | ast.AnnAssign


class Package:
    """The source of a ``vllm`` package: a wheel, the package's directory, or one that holds it."""

    def __init__(self, place: Path) -> None:
        self._wheel = zipfile.ZipFile(place) if place.is_file() else None
        self._root = place if (place / "envs.py").is_file() else place / "vllm"
        if self._wheel is None and not self._root.is_dir():
            raise SystemExit(f"{place}: no vllm package here; give a wheel, or a directory that holds one")
        self._trees: dict[str, ast.Module | None] = {}
        self.version = self._read_version(place)

    def _read_version(self, place: Path) -> str:
        if self._wheel is not None:
            return place.name.split("-")[1]
        return next((path.stem.split("-")[1] for path in sorted(self._root.parent.glob("vllm*.dist-info"))), str(place))

    def read(self, module: str) -> str | None:
        if self._wheel is not None:
            return self._wheel.read(f"vllm/{module}").decode() if f"vllm/{module}" in self._wheel.namelist() else None
        path = self._root / module
        return path.read_text(encoding="utf-8") if path.is_file() else None

    def tree(self, module: str) -> ast.Module | None:
        if module not in self._trees:
            text = self.read(module)
            self._trees[module] = ast.parse(text) if text is not None else None
        return self._trees[module]

    def find(self, module: str, name: str) -> Definition | None:
        """The definition of a (dotted) name at a module's top or in a class's body."""
        body: list[ast.stmt] = getattr(self.tree(module), "body", [])
        found: Definition | None = None
        for part in name.split("."):
            found = next((node for node in _flat(body) if isinstance(node, Definition) and part in _names(node)), None)
            if found is None:
                return None
            body = getattr(found, "body", [])
        return found

    def exports(self, module: str, name: str) -> bool:
        """Whether ``from vllm.module import name`` would find it: defined, imported there, named as a lazy import, or a submodule."""
        for path in (f"{module}.py" if module else "__init__.py", f"{module}/__init__.py"):
            tree = self.tree(path)
            for node in ast.walk(tree) if tree is not None else ():
                if isinstance(node, ast.ImportFrom) and any(name == (alias.asname or alias.name) for alias in node.names):
                    return True
                if isinstance(node, ast.Constant) and node.value == name and path == "__init__.py":
                    return True
                if name in _names(node):
                    return True
        return any(self.read(f"{module}/{name}{end}".lstrip("/")) is not None for end in (".py", "/__init__.py"))


def _flat(body: list[ast.stmt]) -> Iterator[ast.stmt]:
    """Statements with those under ``if`` and ``try``, where definitions often stand."""
    for node in body:
        yield node
        if isinstance(node, ast.If | ast.Try):
            yield from _flat(node.body)
            yield from _flat(node.orelse)


def _names(node: ast.AST) -> set[str]:
    if isinstance(node, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
        return {node.name}
    targets = node.targets if isinstance(node, ast.Assign) else [node.target] if isinstance(node, ast.AnnAssign) else []
    return {target.id for target in targets if isinstance(target, ast.Name)}


def parameters(node: Definition) -> dict[str, str]:
    """name -> 'type = default' of a function's parameters or a class's fields, in order; '' where there is neither."""
    found: dict[str, str] = {}
    if isinstance(node, ast.ClassDef):
        for line in node.body:
            if isinstance(line, ast.AnnAssign) and isinstance(line.target, ast.Name) and not ast.unparse(line.annotation).startswith("ClassVar"):
                found[line.target.id] = _shown(line.annotation, line.value)
    elif isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
        given = node.args
        places = [*given.posonlyargs, *given.args]
        defaults: list[ast.expr | None] = [*([None] * (len(places) - len(given.defaults))), *given.defaults]
        for argument, default in [*zip(places, defaults, strict=True), *zip(given.kwonlyargs, given.kw_defaults, strict=True)]:
            if argument.arg not in ("self", "cls"):
                found[argument.arg] = _shown(argument.annotation, default)
        for argument in filter(None, (given.vararg, given.kwarg)):
            found[f"*{argument.arg}"] = _shown(argument.annotation, ast.Constant(...))
        if node.returns is not None:
            found["what it returns"] = f"= {ast.unparse(node.returns)}"
    return found


def _shown(annotation: ast.expr | None, default: ast.expr | None) -> str:
    shown = ast.unparse(annotation) if annotation is not None else ""
    return f"{shown} = {ast.unparse(default)}" if default is not None else shown


def _text(node: Definition) -> list[str]:
    """Source of a definition without comments and docstrings, a line a statement."""
    for inner in ast.walk(node):
        if isinstance(inner, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef) and ast.get_docstring(inner) is not None:
            inner.body = inner.body[1:] or [ast.Pass()]
    value = node.value if isinstance(node, ast.Assign | ast.AnnAssign) else None
    value = value.slice if isinstance(value, ast.Subscript) else value
    if isinstance(value, ast.Tuple | ast.List):
        return [ast.unparse(choice) for choice in value.elts]
    return ast.unparse(node).splitlines()


def compare(used: Used, known: Package, other: Package) -> tuple[str, bool]:
    """(what became of it, whether it breaks us)."""
    before, after = known.find(used.module, used.name), other.find(used.module, used.name)
    if before is None:
        return f"not in {known.version}: mend the list in {Path(__file__).name}", True
    if after is None:
        return "gone", True
    if used.text:
        old_lines, new_lines = _text(before), _text(after)
        lost, come = [line for line in old_lines if line not in new_lines], [line for line in new_lines if line not in old_lines]
        if old_lines == new_lines:
            return "same", False
        return "changed: " + "; ".join([*(f"- {line.strip()}" for line in lost), *(f"+ {line.strip()}" for line in come)] or ["order"]), False
    old, new = parameters(before), parameters(after)
    unknown = [name for name in used.passed if name not in old]
    if unknown:
        return f"not in {known.version}: {', '.join(unknown)}; mend the list in {Path(__file__).name}", True
    gone = [name for name in used.passed if name not in new]
    needed = [name for name in new if name not in old and name not in used.passed and "=" not in new[name]]
    changes = [f"gone {name}{' (WE PASS IT)' if name in gone else ''}" for name in old if name not in new]
    changes += [f"new {name}: {new[name]}" for name in new if name not in old]
    changes += [f"{name}: {old[name]} -> {new[name]}" for name in old if name in new and old[name] != new[name]]
    if [name for name in old if name in new] != [name for name in new if name in old]:
        changes.append("another order")
    return "changed: " + "; ".join(changes) if changes else "same", bool(gone or needed)


def imported() -> dict[tuple[str, str], set[str]]:
    """(module path, name) that llmemb_ray imports from vllm -> keywords that it passes."""
    found: dict[tuple[str, str], set[str]] = {}
    for path in sorted(OURS.rglob("*.py")):
        tree = ast.parse(path.read_text(encoding="utf-8"))
        here: dict[str, tuple[str, str]] = {}
        for node in ast.walk(tree):
            if isinstance(node, ast.ImportFrom) and node.module and node.module.split(".")[0] == "vllm":
                for alias in node.names:
                    here[alias.asname or alias.name] = ("/".join(node.module.split(".")[1:]), alias.name)
        found.update({key: found.get(key, set()) for key in here.values()})
        for node in ast.walk(tree):
            if isinstance(node, ast.Call):
                name = node.func.id if isinstance(node.func, ast.Name) else node.func.attr if isinstance(node.func, ast.Attribute) else ""
                if name in here:
                    found[here[name]].update(keyword.arg for keyword in node.keywords if keyword.arg)
            elif "EngineArgs" in here:
                found[here["EngineArgs"]].update(_gathered(node))
    return found


def _gathered(node: ast.AST) -> set[str]:
    """Keys that a statement puts into the variable ARGUMENTS."""
    if not isinstance(node, ast.Assign | ast.AnnAssign | ast.AugAssign):
        return set()
    target = node.targets[0] if isinstance(node, ast.Assign) else node.target
    keys: list[ast.expr | None] = []
    if isinstance(target, ast.Name) and target.id == ARGUMENTS and isinstance(node.value, ast.Dict):
        keys = [*node.value.keys]
    elif isinstance(target, ast.Subscript) and isinstance(target.value, ast.Name) and target.value.id == ARGUMENTS:
        keys = [target.slice]
    return {key.value for key in keys if isinstance(key, ast.Constant) and isinstance(key.value, str)}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("other", type=Path, help="wheel, or directory with a vllm package: the version in question")
    parser.add_argument("known", type=Path, nargs="?", help="the version we know; default: the one installed here")
    arguments = parser.parse_args()
    if arguments.known is None:
        spec = importlib.util.find_spec("vllm")
        if spec is None or not spec.submodule_search_locations:
            raise SystemExit("no vllm in this environment; run with .venv-vllm/bin/python, or name the known version's wheel as well")
        arguments.known = Path(spec.submodule_search_locations[0])
    known, other = Package(arguments.known), Package(arguments.other)
    print(f"{known.version} -> {other.version}")
    broken = 0
    ours = imported()
    for used in USED:
        seen = ours.get((used.module.removesuffix(".py"), used.name), set())
        told, breaks = compare(replace(used, passed=(*used.passed, *sorted(seen - {*used.passed}))), known, other)
        broken += breaks
        print(f"{'!' if breaks else ' '} {used.module}  {used.name}: {told}{f' (we pass {len(seen | {*used.passed})})' if seen else ''}")
    for name in VARIABLES:
        breaks = f'"{name}"' not in (other.read("envs.py") or "")
        broken += breaks
        print(f"{'!' if breaks else ' '} envs.py  {name}: {'gone' if breaks else 'same'}")
    for module, name in sorted(ours):
        breaks = not other.exports(module, name)
        broken += breaks
        print(f"{'!' if breaks else ' '} imported by llmemb_ray: vllm.{'.'.join(filter(None, module.split('/')))} {name}: {'gone' if breaks else 'there'}")
    print(f"{broken} of these would break us" if broken else "nothing that we use is gone")
    return 1 if broken else 0


if __name__ == "__main__":
    sys.exit(main())
