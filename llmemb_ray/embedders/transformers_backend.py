"""The transformers backend: token sequences in, pooled states out, on CUDA, MPS or the CPU.

Invariant: a row's vector depends on its own tokens alone, whatever rows go with it. Rows are sorted by
length and packed end to end (no padding) with the shared prefix computed once, where the architecture
allows; else they run as right-padded batches, which a causal model cannot tell from single rows.
This module knows no text, no files and no Ray.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from llmemb_ray.embedders import attention, capabilities, packing
from llmemb_ray.embedders.attention import Layout, PrefixCache
from llmemb_ray.embedders.work import Pooled, Work
from llmemb_ray.errors import ConfigError, ModelError
from llmemb_ray.representation.prompts import MIN_SHARED_TOKENS, TokenRows
from llmemb_ray.representation.representation import Pooling

logger = logging.getLogger(__name__)

CPU_BUDGET = (512, 8192)
"""First and largest token budget tried on a CPU: beyond it activations leave the caches."""
GPU_BUDGET = (8192, 262144)
"""… and on a GPU, where a pack must fill the chip and memory sets the limit."""

SELF_TEST_COSINE = {"float32": 0.9999, "bfloat16": 0.98, "float16": 0.98}
"""Least cosine between a packed and a plain forward pass of a few random tokens; a wrong mask or position falls far below."""
LLM_INT8_COSINE = 0.98
"""The same for LLM.int8, which chooses outlier columns a batch at a time: other rows, other rounding."""


class TransformersBackend:
    """One loaded model.

    model:        a decoder without head, as ``models.load_model`` returns it
    token_budget: tokens in one forward pass; None finds it while working
    Not safe for threads: the caller serialises calls.
    Raises ConfigError for a layer that the model lacks, ModelError for a model that is not causal.
    """

    name = "hf"

    def __init__(self, model: Any, *, pooling: Pooling = "last", layer: int = -1, token_budget: int | None = None, packed: bool | None = None) -> None:
        self.model, self.pooling = model, pooling
        self.config = model.config
        layers = int(self.config.num_hidden_layers)
        check_layer(layer, layers)
        self.layer = None if layer in (-1, layers) else layer
        self.device: torch.device = model.get_input_embeddings().weight.device
        start, ceiling = GPU_BUDGET if self.device.type == "cuda" else CPU_BUDGET
        self.budget = packing.TokenBudget(start, ceiling, token_budget)
        self._prefixes: dict[bytes, PrefixCache] = {}
        self._rope_switch = capabilities.rope_switch(self.config) or np.iinfo(np.int64).max
        attention.register()
        if capabilities.has_softcap(self.config):
            model.set_attn_implementation("eager")
        wanted = capabilities.mode(self.config) == "packed" if packed is None else packed
        self.mode: capabilities.Mode = self._settle_mode(wanted)

    @property
    def token_budget(self) -> int:
        """Tokens in one forward pass, as found until now."""
        return self.budget.value

    # -- embedding ---------------------------------------------------------------------------------

    @torch.inference_mode()
    def embed(self, rows: TokenRows, prefix: npt.NDArray[np.int32] | None = None, *, on_pack: Callable[[int, int], None] | None = None) -> Pooled:
        """Pools every row. ``prefix`` are tokens that many rows begin with; rows that do not are computed whole.

        on_pack: called with (rows, tokens) after each forward pass was started.
        """
        shared = np.zeros(len(rows), np.int64)
        if self.mode == "packed" and prefix is not None and len(prefix) >= MIN_SHARED_TOKENS:
            prefix = prefix[: self._rope_switch]
            shared = rows.shared(prefix)
        beyond = rows.lengths > self._rope_switch
        shared[beyond] = 0
        cache = self._prefix_cache(prefix) if shared.any() and prefix is not None else None
        own = rows.lengths - shared
        todo = packing.order(own, shared)
        todo = todo[own[todo] > 0]
        todo = np.concatenate([todo[beyond[todo]], todo[~beyond[todo]]])
        result = Pooled(torch.zeros(0))
        while len(todo):
            ahead = todo[: self.budget.value]
            pack = packing.next_pack(own, shared, ahead[beyond[ahead] == beyond[ahead[0]]], self.budget.value, padded=self.mode == "padded")
            started = self._clock()
            pooled: torch.Tensor | None
            reason = ""
            try:
                pooled = self._pool_padded(rows, pack) if self.mode == "padded" else self._pool_packed(rows, own, pack, cache)
            except torch.OutOfMemoryError as error:
                pooled, reason = None, str(error).splitlines()[0]
            if pooled is None:
                # Outside the handler, whose traceback would still hold the tensors of the failed pass.
                todo = self._after_out_of_memory(rows, own, pack, todo, reason, result)
                continue
            if not len(result.vectors):
                result.vectors = torch.zeros(len(rows), pooled.shape[1], device=pooled.device)
            index = torch.from_numpy(pack.rows)
            result.vectors.index_copy_(0, index.to(pooled.device, non_blocking=True), pooled)
            computed = int(own[pack.rows].max() * len(pack.rows)) if self.mode == "padded" else int(own[pack.rows].sum())
            if self.budget.searching:
                self.budget.record(computed, self._clock() - started)
            result.work.add(
                Work(
                    tokens=int(rows.lengths[pack.rows].sum()),
                    computed=computed,
                    padding=computed - int(own[pack.rows].sum()),
                    shared=pack.shared * len(pack.rows),
                    packs=1,
                )
            )
            todo = todo[len(pack.rows) :]
            if on_pack is not None:
                on_pack(len(pack.rows), int(rows.lengths[pack.rows].sum()))
        if not len(result.vectors):
            result.vectors = torch.zeros(len(rows), output_size(self.config, layer=-1 if self.layer is None else self.layer), device=self.device)
        return result

    def forget(self) -> None:
        """Drops the keys and values kept of earlier prefixes."""
        self._prefixes.clear()

    def _after_out_of_memory(
        self, rows: TokenRows, own: npt.NDArray[np.int64], pack: packing.Pack, todo: npt.NDArray[np.int64], reason: str, result: Pooled
    ) -> npt.NDArray[np.int64]:
        """Halves the budget, or gives up a row that is alone in its pack; returns the rows still to do."""
        if self.device.type == "cuda":
            torch.cuda.empty_cache()
        result.work.out_of_memory += 1
        if len(pack.rows) == 1:
            result.failed[int(pack.rows[0])] = f"out of memory on a prompt of {int(rows.lengths[pack.rows[0]])} tokens: {reason}"
            return todo[1:]
        self.budget.value = min(self.budget.value, int(own[pack.rows].sum()))
        self.budget.halve()
        return todo

    def _pool_packed(self, rows: TokenRows, own: npt.NDArray[np.int64], pack: packing.Pack, cache: PrefixCache | None) -> torch.Tensor:
        """float32 [B, D]."""
        lengths = own[pack.rows]
        layout = Layout(lengths, pack.shared, cache if pack.shared else None)
        starts = rows.offsets[pack.rows] + pack.shared
        flat = np.arange(layout.tokens) + np.repeat(starts - np.concatenate([np.zeros(1, np.int64), np.cumsum(lengths)[:-1]]), lengths)
        hidden_TD = self._forward_packed(rows.ids[flat], layout)
        if self.pooling == "last":
            return hidden_TD[layout.tensor("last", hidden_TD.device)].float()
        positions = layout.tensor("positions", hidden_TD.device)
        weights_T = torch.ones_like(positions, dtype=torch.float32) if self.pooling == "mean" else (positions + 1).float()
        sums = torch.zeros(len(lengths), hidden_TD.shape[1], device=hidden_TD.device)
        sums.index_add_(0, layout.tensor("row", hidden_TD.device), hidden_TD.float() * weights_T[:, None])
        if pack.shared:
            assert cache is not None
            assert cache.hidden_PD is not None
            weights_P = torch.ones(pack.shared) if self.pooling == "mean" else torch.arange(1, pack.shared + 1).float()
            sums += weights_P.to(hidden_TD.device) @ cache.hidden_PD[: pack.shared].float()
        total = torch.from_numpy(lengths + pack.shared).to(hidden_TD.device, non_blocking=True).float()
        return sums / (total if self.pooling == "mean" else total * (total + 1) / 2)[:, None]

    def _pool_padded(self, rows: TokenRows, pack: packing.Pack) -> torch.Tensor:
        """float32 [B, D]."""
        ids_BL, mask_BL, lengths_B = padded([rows[int(row)] for row in pack.rows], self.device)
        return pool_padded(self._forward(ids_BL, attention_mask=mask_BL), lengths_B, self.pooling)

    def _forward_packed(self, ids: npt.NDArray[np.int32], layout: Layout) -> torch.Tensor:
        """[T, D] states at the pooled layer."""
        ids_1T = torch.from_numpy(ids.astype(np.int64))
        if self.device.type == "cuda":
            ids_1T = ids_1T.pin_memory()
        with attention.active(layout):
            return self._forward(ids_1T.to(self.device, non_blocking=True)[None], position_ids=layout.tensor("positions", self.device)[None])[0]

    def _forward(self, ids: torch.Tensor, **inputs: Any) -> torch.Tensor:
        out = self.model(input_ids=ids, use_cache=False, output_hidden_states=self.layer is not None, **inputs)
        states = out.last_hidden_state if self.layer is None else out.hidden_states[self.layer]
        assert isinstance(states, torch.Tensor)
        return states

    def _prefix_cache(self, prefix: npt.NDArray[np.int32]) -> PrefixCache:
        key = prefix.tobytes()
        if key not in self._prefixes:
            cache = PrefixCache(prefix)
            layout = Layout(np.array([len(prefix)], np.int64), 0, cache, record=True)
            cache.hidden_PD = self._forward_packed(prefix, layout)
            self._prefixes[key] = cache
        return self._prefixes[key]

    def _clock(self) -> float:
        if self.budget.searching and self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return time.perf_counter()

    # -- choosing how to run -----------------------------------------------------------------------

    @torch.inference_mode()
    def _settle_mode(self, wanted: bool) -> capabilities.Mode:
        """Runs a few random tokens plainly and packed; packed only if both agree. Raises ModelError if not causal."""
        generator = np.random.default_rng(0)
        tokens = generator.integers(0, int(self.config.vocab_size), 12).astype(np.int32)
        lists = [tokens[:7], np.concatenate([tokens[:7], tokens[8:]]), tokens[3:6]]
        plain = [self._forward(torch.from_numpy(row.astype(np.int64)).to(self.device)[None])[0] for row in lists]
        if not self._agree(plain[0], plain[1][:7]):
            raise ModelError(
                f"model of type {self.config.model_type} is not causal: its states depend on later tokens; llmemb embeds with causal language models"
            )
        self.mode = "padded"
        if not self._agrees_with(plain, lists, tokens):
            raise ModelError(f"model of type {self.config.model_type} gives other vectors in a padded batch than one by one; llmemb cannot embed with it")
        if not wanted:
            return "padded"
        plain_attention = self.config._attn_implementation
        try:
            self.model.set_attn_implementation(attention.NAME)
        except (ValueError, NotImplementedError) as error:
            logger.warning("%s runs padded: %s", self.config.model_type, error)
            return "padded"
        self.mode = "packed"
        try:
            if self._agrees_with(plain, lists, tokens):
                return "packed"
            reason = "its vectors do not agree with the model's own attention"
        except (RuntimeError, TypeError, NotImplementedError) as error:
            # No kernel for this precision, head size or device: float32 on a GPU, for one.
            reason = str(error).splitlines()[0]
        logger.warning("packed attention does not serve %s here (%s); this model runs as padded batches", self.config.model_type, reason)
        self.model.set_attn_implementation(plain_attention)
        return "padded"

    def _agrees_with(self, plain: list[torch.Tensor], lists: list[npt.NDArray[np.int32]], tokens: npt.NDArray[np.int32]) -> bool:
        """Whether ``embed`` gives the last states of the plain passes, with a shared prefix where it can."""
        pooling, self.pooling = self.pooling, "last"
        try:
            vectors = self.embed(TokenRows.from_lists(lists), tokens[:5]).vectors
        finally:
            self.pooling = pooling
            self._prefixes.clear()
        return all(self._agree(states[-1:], vector[None]) for states, vector in zip(plain, vectors, strict=True))

    def _agree(self, a: torch.Tensor, b: torch.Tensor) -> bool:
        eight_bit = any(type(module).__name__ == "Linear8bitLt" for module in self.model.modules())
        least = LLM_INT8_COSINE if eight_bit else SELF_TEST_COSINE.get(str(a.dtype).removeprefix("torch."), 0.98)
        return bool(torch.nn.functional.cosine_similarity(a.float(), b.float(), dim=-1).min() >= least)


def padded(rows: list[npt.NDArray[np.int32]], device: torch.device) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Right-padded rows for a forward pass: ids and attention mask, int64 [B, L], and lengths, int64 [B]."""
    lengths_B = np.array([len(row) for row in rows], np.int64)
    ids_BL = np.zeros((len(rows), int(lengths_B.max())), np.int64)
    mask_BL = np.arange(ids_BL.shape[1])[None, :] < lengths_B[:, None]
    ids_BL[mask_BL] = np.concatenate(rows)
    return tuple(torch.from_numpy(array).to(device) for array in (ids_BL, mask_BL.astype(np.int64), lengths_B))  # type: ignore[return-value]


def pool_padded(hidden_BLD: torch.Tensor, lengths_B: torch.Tensor, pooling: Pooling) -> torch.Tensor:
    """float32 [B, D], of the states of right-padded rows; carries gradients."""
    lengths = lengths_B.to(hidden_BLD.device)
    if pooling == "last":
        return hidden_BLD[torch.arange(len(lengths), device=lengths.device), lengths - 1].float()
    positions = torch.arange(hidden_BLD.shape[1], device=lengths.device)
    weights_BL = (positions < lengths[:, None]).float() * (1.0 if pooling == "mean" else (positions + 1).float())
    return (hidden_BLD.float() * weights_BL[..., None]).sum(1) / weights_BL.sum(1, keepdim=True)


def check_layer(layer: int, layers: int) -> None:
    """Raises ConfigError unless ``layer`` indexes the hidden states of a model with so many layers."""
    if not -layers - 1 <= layer <= layers:
        raise ConfigError(f"layer: {layer} is outside the model's hidden states, {-layers - 1} to {layers} (0 or {-layers - 1} is the token embedding)")


def output_size(config: Any, layer: int) -> int:
    """D of the states at a layer (OPT-350M projects its last states down to the size of its token embeddings)."""
    last = layer in (-1, config.num_hidden_layers)
    return int((getattr(config, "word_embed_proj_dim", None) if last else None) or config.hidden_size)
