"""The engines that run a model, as far as a setting must know them: their names, what each can do, their weight formats.

Invariant: plain data and rules; imports no engine. A weight format belongs to one backend, so that one name never stands
for two vector spaces.
"""

from __future__ import annotations

import importlib.metadata
from dataclasses import dataclass
from typing import Any, Literal, get_args

Backend = Literal["hf", "vllm"]
TITLES: dict[Backend, str] = {"hf": "transformers", "vllm": "vLLM"}

Quantization = Literal[
    "none",
    "nf4",
    "llm.int8",
    "fp8_per_tensor",
    "fp8_per_channel",
    "fp8_per_block",
    "int8_per_channel_weight_only",
    "mxfp8",
    "nvfp4_per_token",
    "awq",
    "gptq",
    "compressed-tensors",
    "fp8",
]


@dataclass(frozen=True, kw_only=True)
class WeightFormat:
    name: str
    backend: Backend
    stored: bool
    """Whether the checkpoint must hold its weights in this format; else they are quantised while they are loaded."""
    bytes: float
    """Of one weight of a layer, scales left out."""
    what: str


WEIGHT_FORMATS: dict[str, WeightFormat] = {
    row.name: row
    for row in (
        WeightFormat(name="nf4", backend="hf", stored=False, bytes=0.5, what="4-bit normal floats with double quantisation (bitsandbytes)"),
        WeightFormat(name="llm.int8", backend="hf", stored=False, bytes=1, what="8-bit integers, outlier columns apart (bitsandbytes)"),
        WeightFormat(name="fp8_per_tensor", backend="vllm", stored=False, bytes=1, what="8-bit floats, weights and activations, a scale a tensor"),
        WeightFormat(name="fp8_per_channel", backend="vllm", stored=False, bytes=1, what="8-bit floats, a scale a channel"),
        WeightFormat(name="fp8_per_block", backend="vllm", stored=False, bytes=1, what="8-bit floats, a scale a block of 128 x 128"),
        WeightFormat(name="int8_per_channel_weight_only", backend="vllm", stored=False, bytes=1, what="8-bit integers, a scale a channel, activations whole"),
        WeightFormat(name="mxfp8", backend="vllm", stored=False, bytes=1, what="8-bit floats, a scale for 32 values"),
        WeightFormat(name="nvfp4_per_token", backend="vllm", stored=False, bytes=0.5, what="4-bit floats, for Blackwell GPUs"),
        WeightFormat(name="awq", backend="vllm", stored=True, bytes=0.5, what="checkpoints made with AWQ"),
        WeightFormat(name="gptq", backend="vllm", stored=True, bytes=0.5, what="checkpoints made with GPTQ"),
        WeightFormat(name="compressed-tensors", backend="vllm", stored=True, bytes=1, what="checkpoints made with llm-compressor"),
        WeightFormat(name="fp8", backend="vllm", stored=True, bytes=1, what="checkpoints stored in 8-bit floats"),
    )
}
"""What ``quantization`` may name besides none."""

assert set(WEIGHT_FORMATS) == set(get_args(Quantization)) - {"none"}

VLLM_COMPARED: frozenset[str] = frozenset({"opt", "llama", "mistral", "qwen2", "qwen3", "gpt2", "gpt_neox", "phi", "phi3", "gemma", "gemma2", "gemma3_text"})
"""``model_type`` of the architectures whose vectors from vLLM were found equal to transformers' own (tests/embedders/test_vllm_backend.py)."""

VLLM_CPU_HEAD_SIZES = (32, 64, 80, 96, 112, 128, 160, 192, 224, 256, 512)
"""Sizes of an attention head that vLLM has kernels for on a CPU."""

VLLM_TESTED = "0.32"
"""The release of vLLM that the tests run on."""

VLLM_BLOCK = {"gpu": 16, "cpu": 32}
"""Tokens of the smallest block of vLLM's prefix cache that its kernels take; blocks are shared whole, so small ones cover most of a prefix."""

LORA_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)
"""Limits that vLLM offers for an adapter's rank."""

HARMLESS_ENGINE_ARGS = frozenset(
    {
        "block_size",
        "compilation_config",
        "disable_log_stats",
        "cpu_offload_gb",
        "cudagraph_capture_sizes",
        "download_dir",
        "enable_chunked_prefill",
        "enable_prefix_caching",
        "enforce_eager",
        "gpu_memory_utilization",
        "kv_cache_memory_bytes",
        "max_num_batched_tokens",
        "max_num_seqs",
        "max_num_partial_prefills",
        "max_long_partial_prefills",
        "long_prefill_token_threshold",
        "max_parallel_loading_workers",
        "safetensors_load_strategy",
        "disable_custom_all_reduce",
        "async_scheduling",
        "seed",
    }
)
"""Arguments of vLLM's engine that change how fast vectors are made, not which; all others belong to the run key."""

OWNED_ENGINE_ARGS: dict[str, str] = {
    "adapter": "adapter",
    "allowed_local_media_path": "",
    "convert": "",
    "data_parallel_size": "actors",
    "distributed_executor_backend": "",
    "disable_sliding_window": "sliding_window",
    "dtype": "compute_dtype",
    "enable_lora": "adapter",
    "hf_config_path": "",
    "hf_overrides": "",
    "load_format": "allow_pickle",
    "max_lora_rank": "adapter",
    "max_loras": "adapter",
    "max_model_len": "max_tokens",
    "model": "model",
    "pooler_config": "pooling",
    "pipeline_parallel_size": "tensor_parallel",
    "quantization": "quantization",
    "revision": "revision",
    "runner": "",
    "skip_tokenizer_init": "",
    "task": "",
    "tensor_parallel_size": "tensor_parallel",
    "tokenizer": "",
    "tokenizer_mode": "",
    "trust_remote_code": "trust_remote_code",
}
"""Arguments that are settled here, with the setting that does so; none where there is nothing to choose."""


def refusals(backend: Backend, *, pooling: str, layer: int, quantization: str, tensor_parallel: int, engine_args: dict[str, Any]) -> list[str]:
    """What of these settings a backend cannot do: a line each, which names the setting and the way out."""
    format_ = WEIGHT_FORMATS.get(quantization)
    found = []
    if format_ is not None and format_.backend != backend:
        there = ", ".join(name for name, row in WEIGHT_FORMATS.items() if row.backend == backend)
        found.append(f"quantization: {quantization} is a format of backend {format_.backend}; {backend} has {there}")
    if backend == "vllm":
        if pooling == "weighted-mean":
            found.append("pooling: vLLM has no weighted-mean; set backend hf, or pooling last or mean")
        if layer != -1:
            found.append(f"layer: vLLM gives the last layer's states only, not layer {layer}; set backend hf, or layer -1")
        cut = [name for name in ("enable_chunked_prefill", "enable_prefix_caching") if pooling != "last" and engine_args.get(name)]
        found += [f"engine_arg: {name} goes with pooling last only; leave it out" for name in cut]
    else:
        if tensor_parallel > 1:
            found.append(
                "tensor_parallel: transformers does not split layers over GPUs; set backend vllm, or gpus_per_actor to spread whole layers over several GPUs"
            )
        if engine_args:
            found.append("engine_arg: is for vLLM's engine; set backend vllm, or leave it out")
    return found


@dataclass(frozen=True)
class Choice:
    backend: Backend
    why: str


@dataclass(frozen=True, kw_only=True)
class ModelFacts:
    """What of a model decides whether vLLM can run it.

    model_type: of its configuration; head_size: dimensions of an attention head; heads: their number; stored: format of a
    quantised checkpoint; lora_problem: why vLLM cannot serve the adapter; beyond_rope_switch: whether prompts may be longer
    than LongRoPE's switch
    """

    model_type: str
    head_size: int
    heads: int
    stored: str | None
    lora_problem: str | None
    beyond_rope_switch: bool


def cannot_serve(model: ModelFacts, *, tensor_parallel: int, **_: Any) -> list[str]:
    """Why vLLM cannot run a model rightly, whatever device it is on: a line each, with the way out."""
    reasons = []
    if model.lora_problem:
        reasons.append(f"vLLM cannot serve the adapter: {model.lora_problem}; set backend hf, or merge it into the model")
    if model.stored == "bitsandbytes":
        reasons.append("vLLM loads no checkpoint stored through bitsandbytes; set backend hf, or take the one that is not quantised")
    if model.beyond_rope_switch:
        reasons.append(
            "with max_tokens beyond the model's original length vLLM turns short prompts by LongRoPE's long angles too; lower max_tokens, or set backend hf"
        )
    if model.heads % tensor_parallel:
        reasons.append(f"tensor_parallel: {model.heads} attention heads cannot be split over {tensor_parallel} GPUs; set a divisor of {model.heads}")
    return reasons


def choose(*, gpu: bool, model: ModelFacts, **settings: Any) -> Choice:
    """The backend that ``auto`` stands for: vLLM where it is installed, tested and can do all that is asked for.

    gpu: whether the model will run on GPUs; settings: those of ``refusals``
    """
    needed = refusals("hf", **settings)
    if needed:
        return Choice("vllm", f"only vLLM can do it: {needed[0].split(';')[0]}")
    version = vllm_version()
    if version is None:
        return Choice("hf", "vLLM is not installed where the command runs")
    on_cpu = version.endswith("+cpu")
    reasons = [reason.split(";")[0] for reason in refusals("vllm", **settings)]
    if on_cpu == gpu:
        reasons.append(f"vLLM {version} is built for {'the CPU' if on_cpu else 'GPUs'}")
    if not version.startswith(f"{VLLM_TESTED}."):
        reasons.append(f"vLLM {version} is untested here, {VLLM_TESTED} is the tested one")
    if model.model_type not in VLLM_COMPARED:
        reasons.append(f"vLLM's vectors of {model.model_type} were not compared with transformers' (parity does)")
    if not gpu and model.head_size not in VLLM_CPU_HEAD_SIZES:
        reasons.append(f"vLLM has no CPU kernel for attention heads of {model.head_size} dimensions")
    reasons += [reason.split(";")[0] for reason in cannot_serve(model, **settings)]
    return Choice("hf", reasons[0]) if reasons else Choice("vllm", f"vLLM {version} is installed, and {model.model_type} was compared on it")


def table() -> str:
    """The weight formats with their backends, a line each, as error messages show them."""
    return "\n".join(f"  {name:<29} {TITLES[row.backend]:<13} {'stored so; ' if row.stored else ''}{row.what}" for name, row in WEIGHT_FORMATS.items())


def vllm_version() -> str | None:
    """The installed vLLM, such as ``0.32.0`` or ``0.32.0+cpu`` where it is built for the CPU; None where there is none."""
    for name in ("vllm", "vllm-cpu"):
        try:
            version = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
        return version if name == "vllm" or version.endswith("+cpu") else f"{version}+cpu"
    return None
