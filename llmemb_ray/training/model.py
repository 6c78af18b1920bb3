"""The model that is trained: a base without head with a LoRA adapter, or with all its weights; token sequences in, pooled states with gradients out.

Invariant: ``encode`` in evaluation mode gives the vectors that an embedder gives with what ``save`` writes, before they are normalised. Trained
weights are float32 whatever the compute dtype. Knows torch.distributed, but no Ray, texts, loss or schedule.
"""

from __future__ import annotations

import contextlib
import json
import math
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist

from llmemb_ray.embedders import capabilities, models
from llmemb_ray.embedders.transformers_backend import padded, pool_padded
from llmemb_ray.errors import ConfigError, ModelError
from llmemb_ray.representation import TokenRows
from llmemb_ray.representation.space import Context
from llmemb_ray.storage import redact
from llmemb_ray.training import sharding

if TYPE_CHECKING:
    from llmemb_ray.config import FinetuneSettings
    from llmemb_ray.embedders.embedder import EmbedderSpec

TOKENIZER_FILES = ("tokenizer*", "vocab*", "merges.txt", "special_tokens_map.json", "added_tokens.json", "*.model", "chat_template*", "*.jinja", "*.py")
"""Files that a model directory needs beside weights and configuration, where the base has them."""


class TrainedModel:
    """One worker's model.

    module: the module that computes, with its adapter; device: where it computes; size: D of the vectors that ``encode`` gives
    Not safe for threads.
    """

    def __init__(self, module: Any, spec: EmbedderSpec, settings: FinetuneSettings, device: torch.device) -> None:
        self.module, self.device, self._spec, self._settings = module, device, spec, settings
        self.size = spec.dimension
        base = module.get_base_model() if settings.method == "lora" else module
        layer, layers = spec.representation.layer, int(base.config.num_hidden_layers)
        self._layer = None if layer in (-1, layers) else layer
        self._sharded = settings.shard_parameters and _workers() > 1
        self._autocast = spec.compute_dtype == "bfloat16"
        self._trainable = [(name, parameter) for name, parameter in module.named_parameters() if parameter.requires_grad]

    @classmethod
    def load(cls, spec: EmbedderSpec, settings: FinetuneSettings, *, device: torch.device) -> TrainedModel:
        """Every worker must call it, after the process group was started. The adapter's start depends on ``seed`` alone.

        spec: settled for FinetuneSettings.model_settings(); its representation says layer, pooling and dimensions.
        Raises ConfigError for what cannot be trained, ModelError for a model that cannot be loaded.
        """
        if str(device) == "cuda":
            device = torch.device("cuda", torch.cuda.current_device())
        spec = spec.on(device.type == "cuda")
        _refuse(spec, settings)
        sharded = settings.shard_parameters and _workers() > 1
        full = settings.method == "full"
        base: Any = models.load_model(
            models.fetch(spec.model, spec.access, pickled=spec.allow_pickle),
            compute_dtype="float32" if full else spec.compute_dtype,
            quantization=spec.quantization,
            device="cpu" if sharded else str(device),  # Shares go to the device a layer at a time.
            trust_remote_code=spec.trust_remote_code,
            allow_pickle=spec.allow_pickle,
            context=spec.context,
        )
        if capabilities.has_softcap(base.config):
            base.set_attn_implementation("eager")
        if spec.quantization == "nf4":
            _prepare_quantised(base)
        if settings.gradient_checkpointing:
            if not base.supports_gradient_checkpointing:
                raise ConfigError(f"gradient_checkpointing: models of type {base.config.model_type} cannot do it; leave it out")
            base.gradient_checkpointing_enable({"use_reentrant": False})
        module = base.requires_grad_(True) if full else _with_adapter(base, spec, settings, device)
        if sharded:
            sharding.shard(module, sharding.decoder_layers(module, int(base.config.num_hidden_layers)), device)
        return cls(module, spec, settings, device).eval()

    # -- computing ---------------------------------------------------------------------------------

    def encode(self, rows: TokenRows) -> torch.Tensor:
        """float32 [N, D]: the states pooled at the representation's layer, cut to its dimensions, not normalised; with gradients where they are enabled.

        The rows go through the model together, padded to the longest. Raises ValueError for a row without tokens.
        """
        if not len(rows) or int(rows.lengths.min()) < 1:
            raise ValueError("encode: a row has no token; leave such rows out before")
        ids_BL, mask_BL, lengths_B = padded([rows[row] for row in range(len(rows))], self.device)
        # Shares are gathered for a layer at a time: copies of them in bfloat16 must not outlive it.
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self._autocast, cache_enabled=not self._sharded):
            out = self.module(input_ids=ids_BL, attention_mask=mask_BL, use_cache=False, output_hidden_states=self._layer is not None)
        states = out.last_hidden_state if self._layer is None else out.hidden_states[self._layer]
        return pool_padded(states, lengths_B, self._spec.representation.pooling)[:, : self._spec.representation.dimensions]

    def train(self) -> TrainedModel:
        """Dropout on."""
        self.module.train()
        return self

    def eval(self) -> TrainedModel:
        """Dropout off."""
        self.module.eval()
        return self

    # -- a step ------------------------------------------------------------------------------------

    def trainable(self) -> list[tuple[str, torch.nn.Parameter]]:
        """Names and parameters, float32, in the same order on every worker; shares of them where they are spread over workers."""
        return list(self._trainable)

    def average_gradients(self) -> None:
        """The mean over workers in place of each worker's gradients; every worker must call it. Under FSDP2 the backward pass did it."""
        if self._sharded or _workers() == 1:
            return
        gradients = [parameter.grad for _, parameter in self._trainable if parameter.grad is not None]
        if not gradients:
            return
        together = torch.cat([gradient.flatten() for gradient in gradients])
        dist.all_reduce(together)
        together /= _workers()
        for gradient, mean in zip(gradients, torch.split(together, [gradient.numel() for gradient in gradients]), strict=True):
            gradient.copy_(mean.view_as(gradient))

    def clip(self, longest: float) -> float:
        """Shortens the gradients to this L2 norm, 0 for not at all; returns the norm before, over all shares. It may be no number."""
        gradients = [parameter.grad for _, parameter in self._trainable if parameter.grad is not None]
        if not gradients:
            return 0.0
        norm = float(sharding.whole(torch.nn.utils.get_total_norm(gradients)))
        if 0 < longest < norm and math.isfinite(norm):
            torch._foreach_mul_(gradients, longest / norm)
        return norm

    @contextlib.contextmanager
    def no_sync(self) -> Iterator[None]:
        """Within it backward passes under FSDP2 exchange no gradients: for all micro-batches but the last.

        With method full they are exchanged all the same, since held back each worker would hold the gradient of the whole model.
        """
        held = self._sharded and self._settings.method == "lora"
        if held:
            sharding.hold_back(self.module, True)
        try:
            yield
        finally:
            if held:
                sharding.hold_back(self.module, False)

    # -- state -------------------------------------------------------------------------------------

    def state(self) -> dict[str, torch.Tensor]:
        """The trained weights, whole, float32, in host memory, by name. Under FSDP2 every worker must call it and all but the first get none."""
        found = {}
        for name, parameter in self._trainable:
            value = sharding.whole(parameter.detach())
            if self._keeps:
                found[name] = value.to("cpu", copy=True)
        return found

    def load_state(self, state: dict[str, torch.Tensor]) -> None:
        """The whole weights on every worker, as ``state`` gave them to the first. Raises ModelError if they are of another model."""
        names = {name for name, _ in self._trainable}
        if names != set(state):
            apart = f"only in it {sorted(set(state) - names)[:3]}, missing {sorted(names - set(state))[:3]}"
            raise ModelError(f"checkpoint: its weights are of another training, {apart}; train with the settings it was begun with")
        with torch.no_grad():
            for name, parameter in self._trainable:
                if state[name].shape != parameter.shape:
                    raise ModelError(f"checkpoint: {name} is {list(state[name].shape)} where this model has {list(parameter.shape)}")
                parameter.copy_(sharding.share_of(state[name], parameter))

    def optimizer_state(self, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
        """{"state": {weight: {value: tensor}}, "groups": [{"params": [weight, …], "lr": …}]}, whole whatever the number of workers; as ``state`` for who calls.

        optimizer: over parameters of ``trainable``.
        """
        names = {parameter: name for name, parameter in self._trainable}
        state: dict[str, dict[str, torch.Tensor]] = {}
        for name, parameter in self._trainable:
            for key, value in optimizer.state.get(parameter, {}).items():
                full = sharding.whole(value if torch.is_tensor(value) else torch.tensor(value))
                if self._keeps:
                    state.setdefault(name, {})[key] = full.detach().to("cpu", copy=True)
        groups = [
            {key: [names[parameter] for parameter in value] if key == "params" else value for key, value in group.items()} for group in optimizer.param_groups
        ]
        return {"state": state, "groups": groups}

    def load_optimizer_state(self, optimizer: torch.optim.Optimizer, state: dict[str, Any]) -> None:
        """What ``optimizer_state`` gave, on every worker. Raises ModelError if the optimiser's groups hold other weights."""
        parameters = dict(self._trainable)
        names = {parameter: name for name, parameter in self._trainable}
        ours = [[names[parameter] for parameter in group["params"]] for group in optimizer.param_groups]
        if ours != [group["params"] for group in state["groups"]]:
            raise ModelError("checkpoint: its optimiser's groups hold other weights than this training's; train with the settings it was begun with")
        for group, saved in zip(optimizer.param_groups, state["groups"], strict=True):
            group.update({key: tuple(value) if isinstance(value, list) else value for key, value in saved.items() if key != "params"})
        optimizer.state.clear()
        for name, values in state["state"].items():
            parameter = parameters[name]
            optimizer.state[parameter] = {
                # A count of steps stays in host memory, as the optimiser made it.
                key: sharding.share_of(value, parameter) if value.shape == parameter.shape else value.clone()
                for key, value in values.items()
            }

    def save(self, directory: Path) -> None:
        """Writes a peft adapter, or with method full a model with its tokenizer, in float32; the first worker writes, under FSDP2 all must call it."""
        state = self.state()
        if dist.is_initialized() and dist.get_rank() != 0:
            return
        directory.mkdir(parents=True, exist_ok=True)
        if self._settings.method == "full":
            models.configure(self.module.config, context=Context(), positions=self._spec.representation.max_tokens or 0)
            with models.quiet_transformers():
                self.module.save_pretrained(directory, state_dict=state)
            copy_tokenizer(models.fetch(self._spec.model, self._spec.access, weights=False), directory)
            return
        from peft import get_peft_model_state_dict
        from safetensors.torch import save_file

        weights = get_peft_model_state_dict(self.module, state_dict=state, save_embedding_layers=False)
        save_file({name: value.contiguous() for name, value in weights.items()}, directory / "adapter_model.safetensors", metadata={"format": "pt"})
        values = self.module.peft_config["default"].to_dict() | {"inference_mode": True}
        listed = {key: sorted(value) if isinstance(value, set) else value for key, value in values.items()}  # One order: the file is digested.
        (directory / "adapter_config.json").write_text(json.dumps(listed, indent=2, sort_keys=True) + "\n", encoding="utf-8")

    @property
    def _keeps(self) -> bool:
        return not self._sharded or dist.get_rank() == 0


def copy_tokenizer(source: Path, directory: Path) -> None:
    """Copies the files of ``TOKENIZER_FILES`` that ``directory`` lacks."""
    for file in sorted({file for pattern in TOKENIZER_FILES for file in source.glob(pattern) if file.is_file()}):
        if not (directory / file.name).exists():
            shutil.copyfile(file, directory / file.name)


def _workers() -> int:
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def _refuse(spec: EmbedderSpec, settings: FinetuneSettings) -> None:
    """Raises ConfigError for what cannot be trained."""
    if spec.compute_dtype == "float16":
        raise ConfigError("compute_dtype: float16 gradients vanish without scaling, which training does not do; set bfloat16 or float32")
    if spec.stored is not None:
        raise ConfigError(f"model: its checkpoint is stored as {spec.stored}, which cannot be trained on; take the one that is not quantised (and nf4)")


def _prepare_quantised(base: Any) -> None:
    """What is not quantised in float32, as QLoRA has it; and layers that never repack their weights.

    On a CPU with AVX512-BF16 bitsandbytes repacks a layer at its first pass in evaluation mode into a format without gradients.
    """
    for parameter in base.parameters():
        if type(parameter).__name__ != "Params4bit":
            parameter.data = parameter.data.float()
    for part in base.modules():
        if type(part).__name__ == "Linear4bit":
            part.support_avx512bf16_for_cpu = False
    base.is_loaded_in_4bit = True  # A model taken from under its head has lost the mark by which peft knows it.


def _with_adapter(base: Any, spec: EmbedderSpec, settings: FinetuneSettings, device: torch.device) -> Any:
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(
        task_type="FEATURE_EXTRACTION",
        r=settings.lora_rank,
        lora_alpha=settings.lora_alpha,
        lora_dropout=settings.lora_dropout,
        target_modules=settings.lora_targets or "all-linear",
        bias="none",
    )
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.manual_seed(settings.seed)
        try:
            module = get_peft_model(base, config)
        except ValueError as error:
            linear = sorted({name.rpartition(".")[2] for name, part in base.named_modules() if isinstance(part, torch.nn.Linear)})
            asked = f"lora_targets: {', '.join(settings.lora_targets)}" if settings.lora_targets else "method lora"
            raise ConfigError(f"{asked} does not fit this model: {error}; its linear layers are {', '.join(linear)}") from error
    for parameter in module.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()
    config.base_model_name_or_path = redact(spec.model.name)
    config.revision = spec.model.commit if spec.model.kind == "hub" else None
    return module
