"""Prompts as the token ids that a model is given, and its token ids as the text of an answer; the same for every engine.

Invariant: a chat model is asked through its chat template; the text of a base model is continued. Loads no weights.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal

from llmemb_ray.embedders import capabilities, models
from llmemb_ray.embedders.models import ComputeDtype, ModelSource
from llmemb_ray.errors import ConfigError, ModelError
from llmemb_ray.generation.generator import Answer, Prompt, Structured
from llmemb_ray.storage import Access, redact

Asking = Literal["auto", "chat", "plain"]


@dataclass(frozen=True, kw_only=True)
class ModelSpec:
    """A model to generate with, settled: every process that gets this loads the same files. Picklable.

    asking: chat by the model's chat template, plain for a continuation, auto: chat where there is a template
    temperature: 0 for the most likely token each time; top_p: sampled from the fewest tokens that have this probability together
    max_new_tokens: of an answer; compute_dtype: auto is settled by the device of the process that loads the model
    structured: what holds the answer to a prompt's schema
    """

    engine: ClassVar[str]

    source: ModelSource
    asking: Asking = "auto"
    temperature: float = 0.0
    top_p: float = 1.0
    max_new_tokens: int = 24
    structured: Structured = "none"
    compute_dtype: ComputeDtype = "auto"
    trust_remote_code: bool = False
    allow_pickle: bool = False
    access: Access | None = None

    @property
    def name(self) -> str:
        commit = self.source.commit.removeprefix("sha256:")[:12]
        asking = "" if self.asking == "auto" else f", asked {self.asking}"
        dtype = models.resolve_dtype(self.compute_dtype, models.default_device())
        nucleus = "" if self.top_p == 1 else f", top_p {self.top_p}"
        sampling = f"temperature {self.temperature}{nucleus}" if self.temperature else "greedy"
        form = "" if self.structured == "none" else f", {self.structured}"
        return f"{redact(self.source.name)} at {commit}, {dtype}{self._how()}{asking}, {sampling}, at most {self.max_new_tokens} tokens{form}"

    def _how(self) -> str:
        """What of the engine decides an answer."""
        return ""


class PromptTokens:
    """The tokenizer of a model. Raises ModelError, and ConfigError where it is to chat and has no chat template."""

    def __init__(self, path: Path, spec: ModelSpec, config: Any) -> None:
        """config: of the model"""
        from transformers import AutoTokenizer, GenerationConfig

        self._spec = spec
        try:
            self.tokenizer: Any = AutoTokenizer.from_pretrained(path, trust_remote_code=spec.trust_remote_code, padding_side="left")
        except (OSError, ValueError, KeyError, ImportError) as error:
            raise ModelError(f"model {path}: its tokenizer cannot be read: {error}") from error
        has_template = bool(getattr(self.tokenizer, "chat_template", None))
        if spec.asking == "chat" and not has_template:
            raise ConfigError(f"asking: {redact(spec.source.name)} has no chat template; set asking plain, or take its instruction-tuned variant")
        self.chats = has_template if spec.asking == "auto" else spec.asking == "chat"
        if self.tokenizer.pad_token_id is None:
            self.tokenizer.pad_token = self.tokenizer.eos_token or self.tokenizer.unk_token
        self.positions = capabilities.max_positions(getattr(config, "text_config", config))
        """Tokens of prompt and answer together at most; None for any number."""
        try:
            ends = GenerationConfig.from_pretrained(path).eos_token_id
        except OSError:  # A model without such a file: its configuration says it.
            ends = getattr(config, "eos_token_id", None)
        self.ends: frozenset[int] = frozenset({self.tokenizer.eos_token_id, *(ends if isinstance(ends, list) else [ends])} - {None})
        """Tokens that end an answer, by the model's generation settings and its tokenizer."""

    def limit(self, prompt: Prompt) -> int:
        return prompt.max_new_tokens or self._spec.max_new_tokens

    def ids(self, prompt: Prompt) -> list[int]:
        if not self.chats:
            return list(self.tokenizer(prompt.text)["input_ids"])
        # Templates that know no enable_thinking pass over it; Qwen3's would else let the model reason at length first.
        messages = [{"role": "user", "content": prompt.text}]
        text = self.tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True, enable_thinking=False)
        return list(self.tokenizer(text, add_special_tokens=False)["input_ids"])

    def too_long(self, ids: Sequence[int], prompt: Prompt) -> Answer | None:
        """The answer to a prompt that leaves its answer no room."""
        if self.positions is None or len(ids) + self.limit(prompt) <= self.positions:
            return None
        return Answer(problem=f"the prompt's {len(ids)} tokens and {self.limit(prompt)} new ones exceed {self.positions} positions")

    def answer(self, ids: Sequence[int], prompt: Prompt, made: Sequence[int]) -> Answer:
        """ids: of the prompt; made: token ids that follow it, up to an end or beyond it"""
        made = made[: self.limit(prompt)]
        length = next((place for place, token in enumerate(made) if token in self.ends), len(made))
        return Answer(
            text=self.tokenizer.decode(made[:length], skip_special_tokens=True),
            cut=length == len(made),
            continues=not self.chats,
            prompt_tokens=len(ids),
            completion_tokens=length,
        )
