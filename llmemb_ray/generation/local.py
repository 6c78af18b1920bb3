"""Prompts to a model that this process loads, by transformers' own generation.

Invariant: an answer depends on its prompt and, within the model's rounding, on nothing that is batched with it, sampled or
not: what is drawn for a row comes from its own seed (``sampling``). Knows no Ray.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from llmemb_ray.embedders import models
from llmemb_ray.errors import ModelError
from llmemb_ray.generation.generator import Answer, Prompt
from llmemb_ray.generation.tokens import ModelSpec, PromptTokens

BATCH = 16
"""Prompts in one batch; with a few new tokens each, padding costs more than a larger batch gains."""

WINDOW = 4 * BATCH
"""Prompts sorted by length together, so that a batch pads little."""

Row = tuple[int, Prompt, list[int]]
"""Number of the prompt, the prompt, its token ids."""


@dataclass(frozen=True, kw_only=True)
class LocalSpec(ModelSpec):
    """A model for transformers."""

    engine: ClassVar[str] = "transformers"


class LocalGenerator:
    """One loaded model with its head. Raises ModelError, and ConfigError where it is to chat and has no chat template."""

    def __init__(self, spec: LocalSpec) -> None:
        self.spec = spec
        path = models.fetch(spec.source, spec.access, pickled=spec.allow_pickle)
        self._tokens = PromptTokens(path, spec, models.load_config(path, trust_remote_code=spec.trust_remote_code))
        self._model = _load(path, spec)
        self._schemas: Any = None
        """Made for the first prompt with a schema."""

    @property
    def name(self) -> str:
        return self.spec.name

    @property
    def chats(self) -> bool:
        return self._tokens.chats

    def generate(self, prompts: Iterable[Prompt]) -> Iterator[tuple[int, Answer]]:
        """See Generator. Raises ConfigError for a schema that cannot be enforced."""
        numbered = enumerate(prompts)
        while window := list(itertools.islice(numbered, WINDOW)):
            fitting: list[Row] = []
            for number, prompt in window:
                ids = self._tokens.ids(prompt)
                refused = self._tokens.too_long(ids, prompt)
                if refused is not None:
                    yield number, refused
                else:
                    fitting.append((number, prompt, ids))
            fitting.sort(key=lambda row: len(row[2]))
            for begin in range(0, len(fitting), BATCH):
                batch = fitting[begin : begin + BATCH]
                yield from zip((number for number, _, _ in batch), self._batch(batch), strict=True)

    def _batch(self, rows: Sequence[Row]) -> list[Answer]:
        import torch

        padded = self._tokens.tokenizer.pad({"input_ids": [ids for _, _, ids in rows]}, return_tensors="pt").to(self._model.device)
        prompt_length = padded["input_ids"].shape[1]
        sampling = self._sampling([prompt for _, prompt, _ in rows], prompt_length)
        with torch.inference_mode():
            made_BT = self._model.generate(
                **{name: padded[name] for name in ("input_ids", "attention_mask")},
                do_sample=False,
                max_new_tokens=max(self._tokens.limit(prompt) for _, prompt, _ in rows),
                pad_token_id=self._tokens.tokenizer.pad_token_id,
                logits_processor=[sampling] if sampling is not None else None,
            )
        answers = [self._tokens.answer(ids, prompt, made) for (_, prompt, ids), made in zip(rows, made_BT[:, prompt_length:].tolist(), strict=True)]
        for place, problem in (sampling.problems if sampling is not None else {}).items():
            answers[place] = Answer(problem=f"its schema could not be followed: {problem}", prompt_tokens=answers[place].prompt_tokens)
        return answers

    def _sampling(self, prompts: Sequence[Prompt], prompt_length: int) -> Any:
        """What chooses the tokens of a batch; None where that is the largest logit alone."""
        held = [prompt.schema is not None and self.spec.structured != "none" for prompt in prompts]
        if not self.spec.temperature and not any(held):
            return None
        from llmemb_ray.generation.sampling import RowSampling, Schemas

        if self._schemas is None and any(held):
            vocabulary = self._model.get_output_embeddings().weight.shape[0]
            self._schemas = Schemas(self._tokens.tokenizer, sorted(self._tokens.ends), vocabulary, self.spec.structured)
        matchers = [self._schemas.matcher(prompt.schema) if is_held else None for prompt, is_held in zip(prompts, held, strict=True)]
        return RowSampling(prompts, matchers, prompt_length=prompt_length, temperature=self.spec.temperature, top_p=self.spec.top_p)


def _load(path: Any, spec: LocalSpec) -> Any:
    """The model with its language-model head, in evaluation mode. Raises ModelError."""
    import torch
    from safetensors import SafetensorError
    from transformers import AutoModelForCausalLM

    models.check_weight_files(path, spec.allow_pickle)
    device = models.default_device()
    several = device == "cuda" and torch.cuda.device_count() > 1
    try:
        with models.quiet_transformers():
            model, info = AutoModelForCausalLM.from_pretrained(
                path,
                dtype=getattr(torch, models.resolve_dtype(spec.compute_dtype, device)),
                trust_remote_code=spec.trust_remote_code,
                use_safetensors=None if spec.allow_pickle else True,
                device_map="auto" if several else {"": device},
                output_loading_info=True,
            )
    except (OSError, ValueError, KeyError, ImportError, RuntimeError, SafetensorError) as error:
        raise ModelError(f"model {path}: cannot be loaded: {str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__}") from error
    missing = sorted(info["missing_keys"]) + sorted(map(str, info["mismatched_keys"]))
    if missing:
        raise ModelError(f"model {path}: the checkpoint lacks weights, its answers would be random: {', '.join(missing[:5])}; a model to ask needs its head")
    return model.eval().requires_grad_(False)
