"""The vLLM backend: token sequences in, pooled states out, through vLLM's own engine.

Invariant: a row that the engine refuses is a failed row, and no other row suffers for it; an engine that breaks is never
used again (``EngineDied``). vLLM gets token ids and gives tensors; it neither tokenises nor normalises. The prefix that
rows share is computed once and kept in whole blocks. This module knows no text and no Ray.
"""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from llmemb_ray import engines
from llmemb_ray.embedders import models, vllm_engine
from llmemb_ray.embedders.vllm_engine import Engine, memory_told
from llmemb_ray.embedders.work import Pooled, Work
from llmemb_ray.errors import EngineDied, ModelError
from llmemb_ray.representation.prompts import TokenRows

if TYPE_CHECKING:
    from llmemb_ray.embedders.embedder import EmbedderSpec

OnPack = Callable[[int, int], None]

AHEAD = 2
"""Rows handed to the engine before they are done, in multiples of those in one pass: enough that it never waits."""

ADAPTER = "adapter"

LESS_MEMORY = "token_budget lower, or tensor_parallel higher"


class VllmBackend:
    """One engine with one model, which lives in a thread of its own: what CUDA keeps for a thread is there for every call.

    spec:     settled, with a compute dtype
    prefixes: token prefixes that rows will share
    The caller serialises calls. Raises ConfigError or ModelError where the engine cannot be started or cannot embed.
    """

    name = "vllm"

    def __init__(self, spec: EmbedderSpec, *, prefixes: list[npt.NDArray[np.int32]]) -> None:
        self._spec = spec
        self._warm: set[bytes] = set()
        self._calls = 0
        self._lora: Any = None
        self._vllm = vllm_engine.imported()
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="llmemb-vllm")
        self._thread.submit(self._start, max((len(prefix) for prefix in prefixes), default=0)).result()

    def _start(self, prefix: int) -> None:
        spec, vllm = self._spec, self._vllm
        path = models.fetch(spec.model, spec.access, pickled=spec.allow_pickle)
        models.check_weight_files(path, spec.allow_pickle)
        config = models.load_config(path, trust_remote_code=spec.trust_remote_code)
        vllm_engine.require_heads(vllm, config, spec.model.name, "set backend hf")
        tied = models.check_filled(path, trust_remote_code=spec.trust_remote_code, allow_pickle=spec.allow_pickle) if spec.stored is None else None
        chosen = vllm_engine.arguments(spec, config, vllm.device, prefix=prefix, memory=vllm.memory, weights=models.weight_file_bytes(path))
        chosen["model"] = str(vllm_engine.view(path, spec.model.commit, tied))
        chosen["pooler_config"] = vllm.PoolerConfig(seq_pooling_type={"last": "LAST", "mean": "MEAN"}[spec.representation.pooling], use_activation=False)
        chosen |= self._adapter()
        add_lora = None if self._lora is None else (lambda engine: engine.add_lora(self._lora))
        self._engine = Engine(vllm, chosen, given=spec.engine_args, name=spec.model.name, less_memory=LESS_MEMORY, prepare=add_lora)
        self._params = vllm.PoolingParams(task="embed", use_activation=False)
        scheduler, cache = self._engine.config.scheduler_config, self._engine.config.cache_config
        self.token_budget: int = scheduler.max_num_batched_tokens
        """Tokens in one forward pass."""
        self.block_size: int = cache.block_size
        self.shares_prefix: bool = bool(cache.enable_prefix_caching)
        self._ahead = AHEAD * int(scheduler.max_num_seqs)
        try:
            self._embed(TokenRows.from_lists([[0, 1, 2]]), None, None)
        except EngineDied as error:
            # What fails on any row is no row's fault: a unit is not to be halved for it.
            raise ModelError(f"model {spec.model.name}: {error}, on the first tokens it was given; set backend hf{memory_told(error, LESS_MEMORY)}") from error

    def _adapter(self) -> dict[str, Any]:
        """Arguments for the adapter, if there is one."""
        spec = self._spec
        if spec.adapter is None:
            return {}
        lora = models.lora_of(models.fetch(spec.adapter, spec.access))
        if lora.problem:
            raise ModelError(f"adapter {spec.adapter.name}: vLLM cannot serve it: {lora.problem}; set backend hf, or merge it into the model")
        self._lora = self._vllm.LoRARequest(ADAPTER, 1, str(lora.path))
        return {"enable_lora": True, "max_loras": 1, "max_lora_rank": next(limit for limit in engines.LORA_RANKS if limit >= lora.rank)}

    # -- embedding ---------------------------------------------------------------------------------

    def embed(self, rows: TokenRows, prefix: npt.NDArray[np.int32] | None = None, *, on_pack: OnPack | None = None) -> Pooled:
        """Pools every row. ``prefix`` are tokens that many rows begin with.

        on_pack: called with (rows, tokens) after each forward pass that finished rows. Raises EngineDied.
        """
        return self._thread.submit(self._embed, rows, prefix, on_pack).result()

    def _embed(self, rows: TokenRows, prefix: npt.NDArray[np.int32] | None, on_pack: OnPack | None) -> Pooled:
        import torch

        self._engine.require_alive()
        self._calls += 1
        lengths = rows.lengths
        work, failed = Work(), {}
        vectors: npt.NDArray[np.float32] | None = None
        todo = [row for row in np.argsort(lengths, kind="stable").tolist() if lengths[row]]  # The longest are taken first, from the end.
        under_way: dict[str, int] = {}
        if self.shares_prefix and prefix is not None and len(prefix) >= self.block_size:
            self._warm_up(prefix)
        try:
            while todo or under_way:
                while todo and len(under_way) < self._ahead:
                    row = todo.pop()
                    request = f"{self._calls}:{row}"
                    reason = self._refused(request, rows[row])
                    if reason is None:
                        under_way[request] = row
                    else:
                        failed[row] = reason
                if not under_way:
                    continue
                finished = tokens = 0
                for output in self._engine.step():
                    row = under_way.pop(output.request_id)
                    state = output.outputs.data.float().cpu().numpy()
                    if not state.size:
                        failed[row] = "vLLM ended it without a vector"
                        continue
                    if vectors is None:
                        vectors = np.zeros((len(rows), len(state)), np.float32)
                    vectors[row] = state
                    cached, length = int(output.num_cached_tokens or 0), int(lengths[row])
                    work.add(Work(tokens=length, computed=length - cached, shared=cached))
                    finished, tokens = finished + 1, tokens + length
                work.packs += 1
                if finished and on_pack is not None:
                    on_pack(finished, tokens)
        finally:
            self._engine.abort(list(under_way))  # Of a call that failed.
        if vectors is None:
            vectors = np.zeros((len(rows), self._spec.dimension), np.float32)
        return Pooled(torch.from_numpy(vectors), failed, work)

    def _refused(self, request: str, ids: npt.NDArray[np.int32]) -> str | None:
        """Hands a row to the engine; why it does not take it, if it does not."""
        return self._engine.add(request, ids.tolist(), self._params, lora_request=self._lora)

    def _warm_up(self, prefix: npt.NDArray[np.int32]) -> None:
        """Computes the shared prefix once by itself, so that already the first rows find it."""
        key = prefix.tobytes()
        if key in self._warm:
            return
        self._warm.add(key)
        longest = self._engine.config.model_config.max_model_len
        if self._refused(f"{self._calls}:prefix", np.concatenate([prefix, prefix[-1:]])[:longest]) is None:
            while not self._engine.step():
                pass

    def forget(self) -> None:
        """Drops the keys and values kept of earlier rows and prefixes."""
        self._warm.clear()
        if not self._thread.submit(self._engine.raw.reset_prefix_cache).result():
            raise EngineDied("vLLM's engine does not let go of its prefix cache")
