"""Prompts to a model that vLLM's engine holds in this process.

Invariant: a prompt that the engine refuses is answered with the reason, and no other suffers for it; an engine that breaks is
never used again (``EngineDied``). What is sampled comes from each prompt's own seed, but the engine's kernels may round otherwise
in other company. One ``generate`` at a time. Knows no Ray.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any, ClassVar

from llmemb_ray import engines
from llmemb_ray.embedders import models, vllm_engine
from llmemb_ray.embedders.vllm_engine import Device, Engine
from llmemb_ray.generation.generator import Answer, Prompt
from llmemb_ray.generation.tokens import ModelSpec, PromptTokens

AHEAD = 2
"""Prompts handed to the engine before they are done, in multiples of those in one pass: enough that it never waits."""

CPU_TOKENS = 16384
"""Of keys and values that are kept on a CPU, unless one prompt may be longer; a GPU's memory is filled."""

CPU_LONGEST = 4096
"""Tokens of prompt and answer together on a CPU, where engine_arg max_model_len names no other; a GPU takes what fits its memory."""

CPU_ROWS = 32
"""Prompts in one forward pass on a CPU."""

LESS_MEMORY = "engine_arg max_model_len lower, or tensor_parallel higher"

Row = tuple[int, Prompt, list[int]]
"""Number of the prompt, the prompt, its token ids."""


@dataclass(frozen=True, kw_only=True)
class VllmSpec(ModelSpec):
    """A model for vLLM. gpu_share: of a GPU that the engine may take; engine_args: further arguments of ``vllm.EngineArgs``"""

    engine: ClassVar[str] = "vllm"

    tensor_parallel: int = 1
    gpu_share: float = 1.0
    engine_args: dict[str, Any] = field(default_factory=dict)

    def _how(self) -> str:
        changed = {name: value for name, value in sorted(self.engine_args.items()) if name not in engines.HARMLESS_ENGINE_ARGS}
        return ", vllm" + "".join(f" {name}={value}" for name, value in changed.items())


class VllmGenerator:
    """One engine, which lives in a thread of its own: what CUDA keeps for a thread is there for every call.

    Raises ConfigError or ModelError where it cannot be started.
    """

    def __init__(self, spec: VllmSpec) -> None:
        self.spec = spec
        self._calls = 0
        self._schemas: Any = None
        self._vllm = vllm_engine.imported()
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="llmemb-vllm")
        self._thread.submit(self._start).result()

    @property
    def name(self) -> str:
        return self.spec.name

    @property
    def chats(self) -> bool:
        return self._tokens.chats

    def _start(self) -> None:
        spec, vllm = self.spec, self._vllm
        path = models.fetch(spec.source, spec.access, pickled=spec.allow_pickle)
        models.check_weight_files(path, spec.allow_pickle)
        config = models.load_config(path, trust_remote_code=spec.trust_remote_code)
        text_config = getattr(config, "text_config", config)
        vllm_engine.require_heads(vllm, text_config, spec.source.name, "set engine transformers")
        self._tokens = PromptTokens(path, spec, config)
        chosen = arguments(spec, text_config, vllm.device, self._tokens.positions)
        chosen["model"] = str(vllm_engine.view(path, spec.source.commit, None))
        self._engine = Engine(vllm, chosen, given=spec.engine_args, name=spec.source.name, less_memory=LESS_MEMORY)
        settled = self._engine.config
        self._tokens.positions = int(settled.model_config.max_model_len)
        self._ahead = AHEAD * int(settled.scheduler_config.max_num_seqs)

    # -- generation --------------------------------------------------------------------------------

    def generate(self, prompts: Iterable[Prompt]) -> Iterator[tuple[int, Answer]]:
        """See Generator. Raises EngineDied, and ConfigError for a schema that cannot be enforced; leaving the iteration ends what is under way."""
        self._engine.require_alive()
        self._calls += 1
        numbered = enumerate(prompts)
        under_way: dict[str, Row] = {}
        try:
            while True:
                for number, prompt in itertools.islice(numbered, self._ahead - len(under_way)):
                    if prompt.schema is not None and self.spec.structured != "none":
                        self._check(prompt.schema)
                    ids = self._tokens.ids(prompt)
                    refused = self._tokens.too_long(ids, prompt) or self._thread.submit(self._add, f"{self._calls}:{number}", prompt, ids).result()
                    if refused is not None:
                        yield number, refused
                    else:
                        under_way[f"{self._calls}:{number}"] = (number, prompt, ids)
                if not under_way:
                    return
                for output in self._thread.submit(self._engine.step).result():
                    number, prompt, ids = under_way.pop(output.request_id)
                    yield number, self._answer(prompt, ids, output.outputs[0])
        finally:
            self._thread.submit(self._engine.abort, list(under_way)).result()

    def _check(self, schema: Mapping[str, Any]) -> None:
        """Raises ConfigError for a schema that cannot be enforced, of which vLLM would tell prompt by prompt, or not at all."""
        from llmemb_ray.generation.sampling import Schemas

        if self._schemas is None:
            vocabulary = int(self._engine.config.model_config.get_vocab_size())
            self._schemas = Schemas(self._tokens.tokenizer, sorted(self._tokens.ends), vocabulary, self.spec.structured)
        self._schemas.grammar(schema)

    def _add(self, request: str, prompt: Prompt, ids: list[int]) -> Answer | None:
        """Hands a prompt to the engine; the answer of one that it does not take."""
        refused = self._engine.add(request, ids, self._params(prompt))
        return None if refused is None else Answer(problem=refused)

    def _params(self, prompt: Prompt) -> Any:
        from vllm.sampling_params import RequestOutputKind, SamplingParams, StructuredOutputsParams

        held = None
        if prompt.schema is not None and self.spec.structured == "json_schema":
            held = StructuredOutputsParams(json=dict(prompt.schema))
        elif prompt.schema is not None and self.spec.structured == "json_object":
            held = StructuredOutputsParams(json_object=True)
        return SamplingParams(
            seed=prompt.seed,
            temperature=self.spec.temperature,
            top_p=self.spec.top_p,
            max_tokens=self._tokens.limit(prompt),
            stop_token_ids=sorted(self._tokens.ends),
            detokenize=False,
            output_kind=RequestOutputKind.FINAL_ONLY,
            structured_outputs=held,
        )

    def _answer(self, prompt: Prompt, ids: list[int], completion: Any) -> Answer:
        if completion.finish_reason not in ("stop", "length"):
            return Answer(problem=f"vLLM ended it with {completion.finish_reason}", passing=completion.finish_reason == "abort", prompt_tokens=len(ids))
        return self._tokens.answer(ids, prompt, list(completion.token_ids))


def arguments(spec: VllmSpec, config: Any, device: Device, positions: int | None) -> dict[str, Any]:
    """Arguments of ``vllm.EngineArgs`` besides the model's files: ours, then the user's.

    config: of the model's text part; positions: of the model, None for any number
    """
    dtype = models.resolve_dtype(spec.compute_dtype, "cuda" if device == "gpu" else "cpu")
    chosen: dict[str, Any] = {
        "runner": "generate",
        "dtype": dtype,
        "tensor_parallel_size": spec.tensor_parallel,
        "load_format": "auto" if spec.allow_pickle else "safetensors",
        "trust_remote_code": spec.trust_remote_code,
        "generation_config": "vllm",  # Sampling is what the settings say, whatever the model's authors recommend.
        # The grammars that transformers' generation is held to as well (sampling.py): compact, for of white space a model may make any amount.
        "structured_outputs_config": {"backend": "guidance", "disable_any_whitespace": True},
        "disable_log_stats": True,
        "use_tqdm_on_load": False,
    }
    if spec.tensor_parallel > 1:
        chosen["distributed_executor_backend"] = "mp"  # Inside an actor vLLM would else ask Ray for actors of its own.
    if device == "gpu":
        chosen["max_model_len"] = -1  # As many as the memory holds keys and values for, at most the model's own.
        chosen["gpu_memory_utilization"] = vllm_engine.GPU_SHARE * min(1.0, spec.gpu_share)
    else:
        longest = int(spec.engine_args.get("max_model_len") or min(positions or CPU_LONGEST, CPU_LONGEST))
        per_token = models.cache_bytes_per_token(config, dtype)
        block = engines.VLLM_BLOCK["cpu"]
        chosen |= {
            "max_model_len": longest,
            "max_num_seqs": CPU_ROWS,
            "max_num_batched_tokens": max(longest, vllm_engine.TOKEN_BUDGET["cpu"]),
            "block_size": block,
            "kv_cache_memory_bytes": int(per_token * max(2 * (longest + block), CPU_TOKENS)),
            "enable_chunked_prefill": False,  # vLLM 0.32 dies there of a prompt with a seed that comes in two parts: torch's CPU generator has no offset.
            "enforce_eager": True,  # Compiled code is not faster there, and takes 40 s to make.
        }
    return chosen | spec.engine_args
