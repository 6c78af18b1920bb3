"""Where models come from: a hub id, a local directory, or a URL such as ``s3://…``; and how they are loaded.

Invariant: a loaded model has no weight that its checkpoint did not give it. A hub revision is resolved to
a commit once, on the driver; every node brings the files once. This module knows no texts and no Ray.
"""

from __future__ import annotations

import copy
import hashlib
import json
import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from llmemb_ray import engines
from llmemb_ray.embedders import capabilities
from llmemb_ray.errors import ConfigError, ModelError, StorageError
from llmemb_ray.representation.representation import FILE_NAME, Representation
from llmemb_ray.representation.space import Context, digest
from llmemb_ray.storage import Access, Storage, cache_directory, redact

if TYPE_CHECKING:
    from transformers import PreTrainedModel

WEIGHTS = (".safetensors", ".bin", ".pt", ".pth", ".gguf", ".h5", ".msgpack", ".onnx")
PICKLED = (".bin", ".pt", ".pth")
OTHER_FRAMEWORKS = (".gguf", ".h5", ".msgpack", ".onnx")

POCKET = "pocket"
"""Name of the model that this package brings."""
POCKET_PATH = Path(__file__).parents[1] / "pocket"

TRAINING = "training.json"
"""Beside what a training made: how it was made, and of what."""
BESIDE = (FILE_NAME, TRAINING)
"""Files that say how weights are used and whence they come: two directories that differ in these alone are the same model."""

SAMPLED_BLOCK_BYTES = 2**16
SAMPLED_BLOCKS = 64
"""A weight file above 64 blocks of 64 KiB is identified by its size and 64 evenly spaced blocks, the first
and last among them: 66B parameters need not be read to tell two checkpoints apart."""

DEFAULT_MAX_TOKENS = 4096
"""Where no ``max_tokens`` is given and the model allows more (E5-Mistral's model card uses 4096)."""

NO_WINDOW = 2**30
"""Tokens of a sliding window that no prompt fills, for architectures whose sliding layers cannot do without one."""

ComputeDtype = Literal["auto", "float32", "bfloat16", "float16"]
DTYPE_BYTES: dict[ComputeDtype, int] = {"float32": 4, "bfloat16": 2, "float16": 2}


@dataclass(frozen=True, kw_only=True)
class ModelSource:
    """One model or adapter, settled: every process that gets this object loads the same files."""

    name: str
    kind: Literal["hub", "directory", "url", "package"]
    """package: the model that this package brings, found where each node has the package."""
    commit: str
    """Hub commit, or ``sha256:…`` over the files of a directory, URL or package."""


@dataclass(frozen=True, kw_only=True)
class TokenizerSource:
    """A fast tokenizer as plain data, so that workers need neither transformers nor the model's files."""

    json: str
    eos_id: int | None

    @property
    def digest(self) -> str:
        return digest([json.loads(self.json), self.eos_id])


def resolve(name: str, revision: str | None = None, access: Access | None = None, what: str = "model") -> ModelSource:
    """Finds out what exactly ``name`` stands for now. Raises ModelError."""
    if name == POCKET and what == "model":
        if revision:
            raise ModelError(f"revision: {name} is the model of this package, which has no revisions; leave revision out")
        return ModelSource(name=name, kind="package", commit=_pocket_digest())
    if "://" in name:
        storage = Storage(name, access)
        return ModelSource(name=name, kind="url", commit=_directory_digest(storage, what))
    if os.path.isdir(name):
        if revision:
            raise ModelError(f"revision: {name} is a local directory, which has no revisions; leave revision out")
        path = os.path.abspath(name)
        return ModelSource(name=path, kind="directory", commit=_directory_digest(Storage(path), what))
    if name.startswith(("/", "./", "../", "~")) or name.count("/") > 1:
        raise ModelError(f"{what} {name}: no such directory")
    return ModelSource(name=name, kind="hub", commit=_hub_commit(name, revision, what))


def _hub_commit(name: str, revision: str | None, what: str) -> str:
    from huggingface_hub import HfApi, constants, try_to_load_from_cache
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, OfflineModeIsEnabled

    wanted = revision or "main"
    if re.fullmatch(r"[0-9a-f]{40}", wanted):
        return wanted
    try:
        if not constants.HF_HUB_OFFLINE:
            commit = HfApi().model_info(name, revision=wanted).sha
            if commit:
                return commit
    except HFValidationError as error:
        raise ModelError(f"{what} {name}: not a directory, not a URL, and no valid hub id") from error
    except HfHubHTTPError as error:
        status = error.response.status_code if error.response is not None else None
        if status in (401, 403, 404):
            raise ModelError(f"{what} {name} at revision {wanted}: the hub answers {status}; check the name, and set HF_TOKEN if it is gated") from error
    except (OSError, OfflineModeIsEnabled):
        pass  # No network: a copy in the local cache, looked for below, will do.
    except Exception as error:
        # Whichever HTTP library the hub's client is built on, its own errors mean no network as well.
        if not type(error).__module__.startswith(("httpx", "requests", "urllib3")):
            raise
    cached = try_to_load_from_cache(name, "config.json" if what == "model" else "adapter_config.json", revision=wanted)
    if isinstance(cached, str):
        return Path(cached).parent.name
    raise ModelError(f"{what} {name}: no such directory, and the hub cannot be reached (or HF_HUB_OFFLINE is set) and the local cache has no copy")


def _pocket_digest() -> str:
    if not (POCKET_PATH / "config.json").is_file():
        raise ModelError(f"model {POCKET}: this installation of llmemb_ray lacks {POCKET_PATH}; install the package whole, or name another model")
    return _directory_digest(Storage(str(POCKET_PATH)), "model")


def weights_digest(source: ModelSource, access: Access | None = None) -> str:
    """``sha256:…`` over the safetensors of a model, which copies of it have in common. Raises ModelError."""
    place = source.name if source.kind == "url" else str(fetch(source, access))
    storage = Storage(place, access)
    entries = [entry for entry in storage.list() if entry.path.endswith(".safetensors")]
    return _digest_of(storage, {entry.path: entry.size for entry in entries})


def _directory_digest(storage: Storage, what: str) -> str:
    try:
        entries = [entry for entry in storage.list() if not Path(entry.path).name.startswith(".")]
    except StorageError as error:
        raise ModelError(f"{what} {storage.url}: {error}") from error
    config = "adapter_config.json" if what == "adapter" else "config.json"
    if not any(entry.path == config for entry in entries):
        raise ModelError(f"{what} {storage.url}: holds no {config}")
    relevant = [entry for entry in entries if entry.path not in BESIDE and entry.path.endswith((*WEIGHTS, ".json", ".model", ".txt", ".py", ".jinja"))]
    return _digest_of(storage, {entry.path: entry.size for entry in relevant})


def _digest_of(storage: Storage, sizes: dict[str, int]) -> str:
    def one(path: str) -> str:
        size = sizes[path]
        sha = hashlib.sha256(f"{path}:{size}:".encode())
        if size <= SAMPLED_BLOCKS * SAMPLED_BLOCK_BYTES:
            sha.update(storage.read(path))
        else:
            step = (size - SAMPLED_BLOCK_BYTES) / (SAMPLED_BLOCKS - 1)
            for block in range(SAMPLED_BLOCKS):
                start = int(block * step)
                sha.update(storage.read_range(path, start, start + SAMPLED_BLOCK_BYTES))
        return sha.hexdigest()

    return "sha256:" + digest(storage.map(one, sorted(sizes)))


def fetch(source: ModelSource, access: Access | None = None, *, weights: bool = True, pickled: bool = False) -> Path:
    """The local directory with the model's files, brought to this node if need be, once. Raises ModelError.

    weights: bring the weights too; pickled: even those that are pickled, which a repository often holds beside the same in safetensors.
    """
    left_out = WEIGHTS if not weights else OTHER_FRAMEWORKS if pickled else (*PICKLED, *OTHER_FRAMEWORKS)
    if source.kind == "package":
        if _pocket_digest() != source.commit:
            raise ModelError(f"model {source.name}: the one of this node's llmemb_ray is another; install the same version of the package on every node")
        return POCKET_PATH
    if source.kind == "directory":
        path = Path(source.name)
        if not path.is_dir():
            raise ModelError(f"{source.name} does not exist on this node; use a hub id, an s3:// URL or a directory that every node mounts")
        return path
    if source.kind == "hub":
        from huggingface_hub import snapshot_download

        ignore = [*(f"*{ending}" for ending in left_out), "original/*"]
        try:
            return Path(snapshot_download(source.name, revision=source.commit, ignore_patterns=ignore))
        except (OSError, ValueError) as error:
            raise ModelError(f"model {source.name}: cannot bring commit {source.commit} to this node: {error}") from error
    return _fetch_url(source, access, left_out)


def _fetch_url(source: ModelSource, access: Access | None, left_out: tuple[str, ...]) -> Path:
    from filelock import FileLock

    cache = cache_directory("models")
    kind = {WEIGHTS: "-small", OTHER_FRAMEWORKS: "-pickled"}.get(left_out, "")
    target = cache / (source.commit.removeprefix("sha256:")[:32] + kind)
    with FileLock(f"{target}.lock"):
        if target.is_dir():
            return target
        storage = Storage(source.name, access)
        partial = Path(f"{target}.partial")
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir()
        for entry in storage.list():
            if entry.path.endswith(left_out):
                continue
            destination = (partial / entry.path).resolve()
            if not destination.is_relative_to(partial.resolve()):
                raise ModelError(f"model {redact(source.name)}: refuses the file name {entry.path!r}")
            destination.parent.mkdir(parents=True, exist_ok=True)
            with storage.open(entry.path, entry.size) as reader, open(destination, "wb") as writer:
                shutil.copyfileobj(reader, writer, 16 * 2**20)
        partial.rename(target)
    return target


def load_config(path: Path, *, trust_remote_code: bool = False, context: Context | None = None) -> Any:
    """The transformers configuration of a decoder-only model, with the changes of a settled context. Raises ModelError."""
    config = _whole_config(path, trust_remote_code=trust_remote_code)
    configure(config, context=context or Context())
    return getattr(config, "text_config", config)


def _whole_config(path: Path, *, trust_remote_code: bool) -> Any:
    """Of the whole model, of text and images where it is one."""
    from transformers import AutoConfig

    try:
        config = AutoConfig.from_pretrained(path, trust_remote_code=trust_remote_code)
    except (OSError, ValueError, KeyError) as error:
        way_out = "; it brings code of its own, allow that with trust_remote_code" if "trust_remote_code" in str(error) else ""
        raise ModelError(f"model {path}: its configuration cannot be read: {_first_line(error)}{way_out}") from error
    if config.model_type in capabilities.NOT_CAUSAL or getattr(config, "is_encoder_decoder", False):
        raise ModelError(f"model {path}: {config.model_type} is no decoder-only model; llmemb embeds with causal language models")
    return config


def settle_context(asked: Context, config: Any) -> Context:
    """What of ``asked`` changes the model. Raises ConfigError for what it cannot have."""
    rope_theta, window = asked.rope_theta, asked.sliding_window
    rotations = capabilities.rotations(config)
    if rope_theta is not None:
        if not rotations:
            raise ConfigError(f"rope_theta: the configuration of this model (type {config.model_type}) has no base of rotary positions; leave rope_theta out")
        rope_theta = None if all(values["rope_theta"] == rope_theta for values in rotations) else rope_theta
    if window is not None:
        takes = capabilities.takes_window(config)
        if window and not takes:
            raise ConfigError(f"sliding_window: the layers of this model (type {config.model_type}) have no sliding window; leave sliding_window out")
        window = window if takes and window != (config.sliding_window or 0) else None
    return Context(rope_theta=rope_theta, sliding_window=window)


def configure(config: Any, *, context: Context, positions: int = 0) -> Any:
    """A transformers configuration with the changes of a settled context, made in place.

    positions: what it must allow at least; transformers asks for none, vLLM makes its table of angles so long
    """
    text = getattr(config, "text_config", config)
    if context.rope_theta is not None:
        text.rope_parameters = copy.deepcopy(getattr(text, "rope_parameters", None))
        for values in capabilities.rotations(text):
            values["rope_theta"] = context.rope_theta
    if context.sliding_window is not None:
        text.sliding_window = context.sliding_window or (NO_WINDOW if getattr(text, "layer_types", None) else None)
    if capabilities.rotations(text) and positions > text.max_position_embeddings:
        _keep_longrope(text)
        text.max_position_embeddings = positions
    return config


def _keep_longrope(config: Any) -> None:
    """LongRoPE scales attention by the ratio of the positions to those before, unless a factor stands there: written down before the positions change."""
    config.rope_parameters = rope = copy.deepcopy(config.rope_parameters)
    for values in (rope, *(layer for layer in rope.values() if isinstance(layer, dict))):
        if values.get("rope_type") == "longrope" and values.get("factor") is None:
            values["factor"] = config.max_position_embeddings / values["original_max_position_embeddings"]


def settle_max_tokens(representation: Representation, config: Any, *, extended: bool = False) -> Representation:
    """The representation with its token limit settled: as given, else the model's positions, at most DEFAULT_MAX_TOKENS.

    extended: whether the base of its rotary positions was given. Raises ConfigError if it asks for more positions than the model has.
    """
    positions = capabilities.max_positions(config)
    if representation.max_tokens is None:
        return replace(representation, max_tokens=min(positions or DEFAULT_MAX_TOKENS, DEFAULT_MAX_TOKENS))
    if positions is not None and representation.max_tokens > positions:
        said = f"max_tokens: {representation.max_tokens} is more than the model's {positions} positions"
        rotations = capabilities.rotations(config)
        if not rotations:
            raise ConfigError(f"{said}, and its table of positions ends there; lower max_tokens")
        if any(values.get("rope_type") == "dynamic" for values in rotations):
            raise ConfigError(f"{said}; beyond them its dynamic scaling would turn each row by angles that depend on its neighbours; lower max_tokens")
        if not extended:
            raise ConfigError(f"{said}; lower max_tokens, or stretch them with rope_theta (paper 2 takes 100000 for 32768 tokens)")
    return representation


def settle_dimension(representation: Representation, size: int) -> int:
    """D of the vectors put out, from the size of a pooled state. Raises ConfigError for more than there are."""
    if representation.dimensions is not None and representation.dimensions > size:
        raise ConfigError(f"dimensions: {representation.dimensions} is more than the {size} of this model")
    return representation.dimensions or size


def head_size(config: Any) -> int:
    """Dimensions of one attention head."""
    return int(getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads)


def key_value_heads(config: Any) -> int:
    return int(getattr(config, "num_key_value_heads", None) or config.num_attention_heads)


def cache_bytes_per_token(config: Any, compute_dtype: ComputeDtype) -> int:
    """Bytes of the keys and values of one token, over all layers."""
    return 2 * key_value_heads(config) * head_size(config) * int(config.num_hidden_layers) * DTYPE_BYTES[compute_dtype]


def activation_bytes_per_token(config: Any, compute_dtype: ComputeDtype) -> int:
    """About what a forward pass holds for one token at a time, the widest layer and some states."""
    return int(8 * config.hidden_size + 3 * inner_size(config)) * DTYPE_BYTES[compute_dtype]


def inner_size(config: Any) -> int:
    """Width of the feed-forward layers."""
    return int(getattr(config, "intermediate_size", None) or getattr(config, "ffn_dim", None) or 4 * config.hidden_size)


def weight_file_bytes(path: Path) -> int:
    """Bytes of the checkpoint's weights: of its safetensors, or of pickled ones where it has no others."""
    sizes = [entry.stat().st_size for entry in path.iterdir() if entry.name.endswith(".safetensors")]
    return sum(sizes or [entry.stat().st_size for entry in path.iterdir() if entry.name.endswith(PICKLED)])


def read_config_file(path: Path) -> dict[str, Any]:
    """``config.json`` as it is. Raises ModelError."""
    try:
        values = json.loads((path / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ModelError(f"model {path}: its config.json cannot be read: {error}") from error
    if not isinstance(values, dict):
        raise ModelError(f"model {path}: its config.json is no JSON object")
    return values


def settle_quantization(asked: engines.Quantization, written: dict[str, Any]) -> str | None:
    """The format in which the checkpoint stores its weights, None if it is not quantised. Raises ConfigError if it does not go with what is asked for.

    written: the model's ``config.json``
    """
    config = written.get("quantization_config") or {}
    stored = str(config.get("quant_method") or "").removeprefix("auto_") or None
    format_ = engines.WEIGHT_FORMATS.get(asked)
    if format_ is None:
        return stored
    if format_.stored and stored != format_.name:
        is_ = f"this one is stored as {stored}" if stored else "this one is not quantised"
        raise ConfigError(f"quantization: {asked} is how the checkpoint itself must be stored, and {is_}; formats:\n{engines.table()}")
    if not format_.stored and stored:
        raise ConfigError(f"quantization: the checkpoint is stored as {stored} already; leave {asked} out, or take the checkpoint that is not quantised")
    return stored


@dataclass(frozen=True)
class Lora:
    """An adapter as vLLM may serve it.

    problem: why it cannot, if so
    """

    path: Path
    rank: int
    problem: str | None


def lora_of(path: Path) -> Lora:
    """Reads ``adapter_config.json``. Raises ModelError."""
    try:
        config = json.loads((path / "adapter_config.json").read_text(encoding="utf-8"))
        rank = max([int(config.get("r") or 0), *map(int, (config.get("rank_pattern") or {}).values())])
    except (OSError, ValueError, TypeError) as error:
        raise ModelError(f"adapter {path}: its adapter_config.json cannot be read: {error}") from error
    problem = None
    if config.get("peft_type") != "LORA":
        problem = f"it is a {config.get('peft_type')} adapter, not LoRA"
    elif config.get("use_dora"):
        problem = "it is a DoRA adapter"
    elif config.get("bias", "none") != "none":
        problem = "it changes biases"
    elif config.get("use_qalora") or config.get("alora_invocation_tokens") or config.get("layer_replication") or config.get("lora_bias"):
        problem = "it is not plain LoRA (QA-LoRA, activated LoRA, replicated layers or biases)"
    elif str(config.get("init_lora_weights", True)).lower().startswith(("pissa", "olora", "corda", "loftq")):
        problem = f"it changed the base model's weights when it was begun ({config['init_lora_weights']})"
    elif config.get("modules_to_save"):
        problem = f"it replaces whole modules ({', '.join(config['modules_to_save'])})"
    elif rank > max(engines.LORA_RANKS):
        problem = f"its rank is {rank}, the limit {max(engines.LORA_RANKS)}"
    return Lora(path, rank, problem)


def flops_per_token(config: Any) -> float:
    """Twice the weights that a token meets in the layers, from the configuration; attention over the context is left out."""
    hidden = config.hidden_size
    inner = inner_size(config)
    heads = config.num_attention_heads if hasattr(config, "num_attention_heads") else 1
    head_size = getattr(config, "head_dim", None) or hidden // heads
    groups = getattr(config, "num_key_value_heads", None) or heads
    gated = getattr(config, "model_type", "") not in ("opt", "gpt2", "gpt_neox", "phi", "bloom", "falcon")
    layer = 2 * hidden * head_size * (heads + groups) + (3 if gated else 2) * hidden * inner
    return float(2 * layer * config.num_hidden_layers)


def parameters(config: Any) -> int:
    """Weights of the layers and of the token embedding; norms, biases, positions and a head of its own are left out."""
    width = getattr(config, "word_embed_proj_dim", None) or config.hidden_size
    return int(flops_per_token(config) / 2 + width * getattr(config, "vocab_size", 0))


def load_tokenizer(path: Path, *, trust_remote_code: bool = False) -> TokenizerSource:
    """The model's tokenizer as data. Raises ModelError if it has no fast tokenizer."""
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(path, trust_remote_code=trust_remote_code)
    except (OSError, ValueError, KeyError, ImportError) as error:
        raise ModelError(f"model {path}: its tokenizer cannot be read: {_first_line(error)}") from error
    if not getattr(tokenizer, "is_fast", False):
        raise ModelError(
            f"model {path}: has no fast tokenizer (tokenizer.json), which this package needs; convert it with transformers and save it beside the model"
        )
    return TokenizerSource(json=tokenizer.backend_tokenizer.to_str(), eos_id=tokenizer.eos_token_id)


def load_model(
    path: Path,
    *,
    compute_dtype: ComputeDtype = "auto",
    quantization: engines.Quantization = "none",
    device: str | None = None,
    adapter: Path | None = None,
    trust_remote_code: bool = False,
    allow_pickle: bool = False,
    context: Context | None = None,
) -> PreTrainedModel:
    """The decoder without its language-model head, in evaluation mode, on its device or devices.

    device: a torch device; None takes the GPUs that this process sees (several: spread by layers), else the CPU.
    context: settled changes of its configuration.
    Raises ModelError, also where the checkpoint lacks a weight that the model needs.
    """
    import torch
    from safetensors import SafetensorError
    from transformers import AutoModel, AutoModelForCausalLM, BitsAndBytesConfig

    check_weight_files(path, allow_pickle)
    device = device or default_device()
    dtype = getattr(torch, resolve_dtype(compute_dtype, device))
    several = device == "cuda" and torch.cuda.device_count() > 1
    options: dict[str, Any] = {
        "dtype": dtype,
        "trust_remote_code": trust_remote_code,
        "use_safetensors": None if allow_pickle else True,
        "output_loading_info": True,
        "device_map": "auto" if several else {"": device},
    }
    if quantization == "nf4":
        options["quantization_config"] = BitsAndBytesConfig(
            load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True, bnb_4bit_compute_dtype=dtype
        )
    elif quantization == "llm.int8":
        options["quantization_config"] = BitsAndBytesConfig(load_in_8bit=True)
    if context is not None and context.to_dict():
        options["config"] = configure(_whole_config(path, trust_remote_code=trust_remote_code), context=context)
    on_causal = adapter is not None and _adapter_is_causal(adapter)
    causal = on_causal
    try:
        with quiet_transformers():
            model, info = (AutoModelForCausalLM if causal else AutoModel).from_pretrained(path, **options)
            if not causal and info["missing_keys"]:
                # A checkpoint with tied weights may store only ``lm_head.weight``: the head's class knows how to tie it.
                del model
                causal = True
                model, info = AutoModelForCausalLM.from_pretrained(path, **options)
    except (OSError, ValueError, KeyError, ImportError, RuntimeError, SafetensorError) as error:
        raise ModelError(f"model {path}: cannot be loaded: {_first_line(error)}") from error
    _require_filled(path, info)
    if quantization == "nf4" and dtype == torch.float32:
        # On a CPU with AVX512-BF16 bitsandbytes would repack the layers for a kernel that computes in bfloat16.
        for part in model.modules():
            if type(part).__name__ == "Linear4bit":
                part.support_avx512bf16_for_cpu = False
    if causal and not on_causal:
        model = getattr(model, model.base_model_prefix)
    if adapter is not None:
        model = _with_adapter(model, adapter, merge=quantization == "none")
    if on_causal:
        model = getattr(model, model.base_model_prefix)
    if hasattr(model.config, "text_config"):  # a model of text and images: its text decoder
        model = model.get_decoder()
    return model.eval().requires_grad_(False)


def load_whole(path: Path, *, adapter: Path | None, trust_remote_code: bool, context: Context, positions: int, head: bool) -> Any:
    """The model in float32 on the CPU with its adapter merged, fit to be saved. Raises ModelError.

    positions: what its configuration allows at least, where they are rotary; head: with its language-model head, if the checkpoint has one or ties it
    """
    import torch
    from safetensors import SafetensorError
    from transformers import AutoModel, AutoModelForCausalLM

    check_weight_files(path, allow_pickle=False)
    options: dict[str, Any] = {"dtype": torch.float32, "trust_remote_code": trust_remote_code, "use_safetensors": True, "output_loading_info": True}
    options["config"] = configure(_whole_config(path, trust_remote_code=trust_remote_code), context=context, positions=positions)
    on_causal = adapter is not None and _adapter_is_causal(adapter)
    try:
        with quiet_transformers():
            whole, info = AutoModelForCausalLM.from_pretrained(path, **options)
            if info["missing_keys"] and not on_causal:  # A checkpoint without a head.
                whole, info = AutoModel.from_pretrained(path, **options)
    except (OSError, ValueError, KeyError, ImportError, RuntimeError, SafetensorError) as error:
        raise ModelError(f"model {path}: cannot be loaded: {_first_line(error)}") from error
    _require_filled(path, info)
    headed = whole.can_generate()
    decoder = getattr(whole, whole.base_model_prefix) if headed else whole
    if adapter is not None:
        _with_adapter(whole if on_causal else decoder, adapter, merge=True)
    return whole if head else decoder


def _require_filled(path: Path, info: dict[str, Any]) -> None:
    problems = {kind: sorted(info[kind])[:5] for kind in ("missing_keys", "mismatched_keys", "error_msgs") if info[kind]}
    if problems:
        raise ModelError(f"model {path}: the checkpoint does not fill the model, its vectors would be random: {problems}")


def check_filled(path: Path, *, trust_remote_code: bool = False, allow_pickle: bool = False) -> str | None:
    """Compares a checkpoint with its model, without reading a weight. Raises ModelError if the model has weights that the checkpoint lacks.

    Returns the name that the checkpoint should have for its token embeddings, where it stores them only as the language-model head they are tied to.
    """
    from safetensors import SafetensorError
    from transformers import AutoModel, AutoModelForCausalLM

    options: dict[str, Any] = {"device_map": "meta", "output_loading_info": True, "trust_remote_code": trust_remote_code}
    options["use_safetensors"] = None if allow_pickle else True
    try:
        with quiet_transformers():
            model, info = AutoModel.from_pretrained(path, **options)
            embeddings = next((name for name, weight in model.named_parameters() if weight is model.get_input_embeddings().weight), "")
            if info["missing_keys"] != {embeddings}:
                _require_filled(path, info)
                return None
            model, info = AutoModelForCausalLM.from_pretrained(path, **options)
    except (OSError, ValueError, KeyError, ImportError, RuntimeError, SafetensorError) as error:
        raise ModelError(f"model {path}: cannot be loaded: {_first_line(error)}") from error
    _require_filled(path, info)
    return f"{model.base_model_prefix}.{embeddings}"


@contextmanager
def quiet_transformers() -> Iterator[None]:
    """No progress bars and load reports from transformers: what they report is checked here and raised."""
    from transformers.utils import logging

    level, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(level)
        if bars:
            logging.enable_progress_bar()


def default_device() -> str:
    import torch

    if torch.cuda.is_available():
        return "cuda"
    return "mps" if torch.backends.mps.is_available() else "cpu"


def resolve_dtype(compute_dtype: ComputeDtype, device: str) -> ComputeDtype:
    """``auto`` is bfloat16 on a CUDA GPU and float32 elsewhere."""
    if compute_dtype != "auto":
        return compute_dtype
    return "bfloat16" if device.startswith("cuda") else "float32"


def check_weight_files(path: Path, allow_pickle: bool) -> None:
    """Raises ModelError unless there are weights that may be loaded."""
    names = [entry.name for entry in path.iterdir()]
    if not any(name.endswith(".safetensors") for name in names) and not allow_pickle:
        if any(name.endswith(PICKLED) for name in names):
            raise ModelError(f"model {path}: holds only pickled weights, which can run code when loaded; convert them to safetensors, or set allow_pickle")
        raise ModelError(f"model {path}: holds no .safetensors weights; pickled ones (.bin), if it has them, are brought and loaded only with allow_pickle")


def _adapter_keys(adapter: Path) -> set[str]:
    from safetensors import safe_open

    file = adapter / "adapter_model.safetensors"
    if not file.is_file():
        raise ModelError(f"adapter {adapter}: holds no adapter_model.safetensors")
    with safe_open(file, framework="numpy") as tensors:
        return set(tensors.keys())


def _adapter_is_causal(adapter: Path) -> bool:
    """Whether the adapter was trained on the model with its head: its names then hold one level more."""
    keys = _adapter_keys(adapter)
    return any(re.match(r"base_model\.model\.(model|transformer|gpt_neox|backbone)\.", key) for key in keys)


def _with_adapter(model: Any, adapter: Path, *, merge: bool) -> Any:
    from peft import PeftModel, get_peft_model_state_dict

    try:
        wrapped = PeftModel.from_pretrained(model, adapter)
    except (OSError, ValueError, RuntimeError) as error:
        raise ModelError(f"adapter {adapter}: does not fit the model: {_first_line(error)}") from error
    given, taken = _adapter_keys(adapter), set(get_peft_model_state_dict(wrapped))
    if given != taken:
        raise ModelError(
            f"adapter {adapter}: its weights do not match the model; "
            f"only in the adapter {sorted(given - taken)[:3]}, only in the model {sorted(taken - given)[:3]}"
        )
    return wrapped.merge_and_unload() if merge else wrapped.get_base_model()


def _first_line(error: BaseException) -> str:
    return str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
