"""Prompts to a model that this process loads, by transformers' own generation.

Invariant: greedy decoding; an answer depends on its prompt and, within the model's rounding, on nothing that is batched
with it. A chat model is asked through its chat template; the text of a base model is continued. Knows no Ray.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any, Literal

from llmemb_ray.embedders import capabilities, models
from llmemb_ray.embedders.models import ComputeDtype, ModelSource
from llmemb_ray.errors import ConfigError, ModelError
from llmemb_ray.generation.generator import Answer
from llmemb_ray.storage import Access, redact

Asking = Literal["auto", "chat", "plain"]

BATCH = 16
"""Prompts in one batch; with a few new tokens each, padding costs more than a larger batch gains."""

WINDOW = 4 * BATCH
"""Prompts sorted by length together, so that a batch pads little."""


@dataclass(frozen=True, kw_only=True)
class LocalSpec:
    """A model to generate with, settled: every process that gets this loads the same files.

    asking: chat by the model's chat template, plain for a continuation, auto: chat where there is a template
    max_new_tokens: of an answer; compute_dtype: auto is settled by the device of the process that loads the model
    """

    source: ModelSource
    asking: Asking = "auto"
    max_new_tokens: int = 24
    compute_dtype: ComputeDtype = "auto"
    trust_remote_code: bool = False
    allow_pickle: bool = False
    access: Access | None = None

    @property
    def name(self) -> str:
        commit = self.source.commit.removeprefix("sha256:")[:12]
        asking = "" if self.asking == "auto" else f", asked {self.asking}"
        dtype = models.resolve_dtype(self.compute_dtype, models.default_device())
        return f"{redact(self.source.name)} at {commit}, {dtype}{asking}, greedy, at most {self.max_new_tokens} tokens"


class LocalGenerator:
    """One loaded model with its head. Raises ModelError, and ConfigError where it is to chat and has no chat template."""

    def __init__(self, spec: LocalSpec) -> None:
        self.spec = spec
        path = models.fetch(spec.source, spec.access, pickled=spec.allow_pickle)
        from transformers import AutoTokenizer

        models.load_config(path, trust_remote_code=spec.trust_remote_code)
        try:
            self._tokenizer: Any = AutoTokenizer.from_pretrained(path, trust_remote_code=spec.trust_remote_code, padding_side="left")
        except (OSError, ValueError, KeyError, ImportError) as error:
            raise ModelError(f"model {path}: its tokenizer cannot be read: {error}") from error
        has_template = bool(getattr(self._tokenizer, "chat_template", None))
        if spec.asking == "chat" and not has_template:
            raise ConfigError(f"asking: {redact(spec.source.name)} has no chat template; set asking plain, or take its instruction-tuned variant")
        self.chats = has_template if spec.asking == "auto" else spec.asking == "chat"
        if self._tokenizer.pad_token_id is None:
            self._tokenizer.pad_token = self._tokenizer.eos_token or self._tokenizer.unk_token
        self._model = _load(path, spec)
        self._positions = capabilities.max_positions(getattr(self._model.config, "text_config", self._model.config))

    @property
    def name(self) -> str:
        return self.spec.name

    def generate(self, prompts: Iterable[str]) -> Iterator[tuple[int, Answer]]:
        """See Generator."""
        numbered = enumerate(prompts)
        while window := list(itertools.islice(numbered, WINDOW)):
            rows = [(number, self._tokens(prompt)) for number, prompt in window]
            fitting = sorted((row for row in rows if self._fits(row[1])), key=lambda row: len(row[1]))
            for number, ids in rows:
                if not self._fits(ids):
                    yield number, Answer(problem=f"the prompt's {len(ids)} tokens and {self.spec.max_new_tokens} new ones exceed {self._positions} positions")
            for begin in range(0, len(fitting), BATCH):
                batch = fitting[begin : begin + BATCH]
                yield from zip((number for number, _ in batch), self._batch([ids for _, ids in batch]), strict=True)

    def _tokens(self, prompt: str) -> list[int]:
        if not self.chats:
            return list(self._tokenizer(prompt)["input_ids"])
        # Templates that know no enable_thinking pass over it; Qwen3's would else let the model reason at length first.
        text = self._tokenizer.apply_chat_template([{"role": "user", "content": prompt}], tokenize=False, add_generation_prompt=True, enable_thinking=False)
        return list(self._tokenizer(text, add_special_tokens=False)["input_ids"])

    def _fits(self, ids: list[int]) -> bool:
        return self._positions is None or len(ids) + self.spec.max_new_tokens <= self._positions

    def _batch(self, rows: list[list[int]]) -> list[Answer]:
        import torch

        padded = self._tokenizer.pad({"input_ids": rows}, return_tensors="pt").to(self._model.device)
        with torch.inference_mode():
            made_BT = self._model.generate(
                **{name: padded[name] for name in ("input_ids", "attention_mask")},
                do_sample=False,
                max_new_tokens=self.spec.max_new_tokens,
                pad_token_id=self._tokenizer.pad_token_id,
            )
        answers = []
        for ids, made in zip(rows, made_BT[:, padded["input_ids"].shape[1] :].tolist(), strict=True):
            length = next((place for place, token in enumerate(made) if token in self._ends), len(made))
            answers.append(
                Answer(
                    text=self._tokenizer.decode(made[:length], skip_special_tokens=True),
                    cut=length == len(made),
                    continues=not self.chats,
                    prompt_tokens=len(ids),
                    completion_tokens=length,
                )
            )
        return answers

    @property
    def _ends(self) -> set[int]:
        """Tokens that end an answer, by the model's generation settings and its tokenizer."""
        ends = self._model.generation_config.eos_token_id
        return {self._tokenizer.eos_token_id, *(ends if isinstance(ends, list) else [ends])} - {None}


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
