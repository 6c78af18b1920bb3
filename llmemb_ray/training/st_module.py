"""A model that ``llmemb`` exported, as a module of sentence-transformers; needs ``SentenceTransformer(…, trust_remote_code=True)``.

Invariant: a text's vector is the one that ``llmemb embed`` makes of it. The prompt's words may follow the text, so that no prompt of
sentence-transformers expresses them: ``llmemb.json`` holds the templates, and the whole prompt is tokenised at once. A prompt that is
too long loses the end of its text, never of its template. Stands alone: it needs torch, transformers and sentence-transformers.
"""

from __future__ import annotations

import json
import os
import string
from typing import Any, ClassVar

import torch
from sentence_transformers.base.modules import InputModule
from transformers import AutoModel, AutoTokenizer

REPRESENTATION = "llmemb.json"

CHARACTERS_PER_TOKEN = 8
"""A long text is first cut to so many characters for each token that fits; twice as many as long as it still fits."""


class LlmembModel(InputModule):
    """Texts in, ``sentence_embedding`` out: float32 [N, D].

    ``encode_query`` makes queries, ``encode_document`` and ``encode`` documents. A prompt that is given stands in place of what the template
    has before the text. Raises ValueError for a text of which no token fits.
    """

    forward_kwargs: ClassVar[set[str]] = {"task"}  # type: ignore[misc]

    def __init__(self, model: Any, tokenizer: Any, representation: dict[str, Any]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.model, self.representation = model, representation
        self.tokenizer: Any = tokenizer
        self.max_seq_length: int = representation["max_tokens"]
        """Longest prompt in tokens."""
        text = getattr(model.config, "text_config", model.config)
        self._switch = _rope_switch(text)
        self._layer = None if representation["layer"] in (-1, int(text.num_hidden_layers)) else int(representation["layer"])

    @classmethod
    def load(  # type: ignore[override]
        cls,
        model_name_or_path: str,
        subfolder: str = "",
        token: bool | str | None = None,
        cache_folder: str | None = None,
        revision: str | None = None,
        local_files_only: bool = False,
        trust_remote_code: bool = False,
        model_kwargs: dict[str, Any] | None = None,
        processor_kwargs: dict[str, Any] | None = None,
        config_kwargs: dict[str, Any] | None = None,
        backend: str = "torch",
        **unused: Any,
    ) -> LlmembModel:
        if backend != "torch":
            raise ValueError(f"backend {backend!r}: this module runs with torch")
        place: dict[str, Any] = {"subfolder": subfolder, "token": token, "revision": revision, "local_files_only": local_files_only}
        path = cls.load_file_path(model_name_or_path, REPRESENTATION, cache_folder=cache_folder, **place)
        if path is None:
            raise ValueError(f"{model_name_or_path} holds no {REPRESENTATION}")
        with open(path, encoding="utf-8") as file:
            representation = json.load(file)
        common = place | {"cache_dir": cache_folder, "trust_remote_code": trust_remote_code}
        model = AutoModel.from_pretrained(model_name_or_path, **common, **(config_kwargs or {}), **(model_kwargs or {}))
        text = getattr(model.config, "text_config", model.config)
        if text is not model.config:
            model = model.get_decoder()
        if getattr(text, "attn_logit_softcapping", None) is not None:
            model.set_attn_implementation("eager")  # The others leave the soft cap out.
        return cls(model, AutoTokenizer.from_pretrained(model_name_or_path, **common, **(processor_kwargs or {})), representation)

    def save(self, output_path: str, *args: Any, safe_serialization: bool = True, **kwargs: Any) -> None:
        self.model.save_pretrained(output_path)
        self.save_tokenizer(output_path)
        with open(os.path.join(output_path, REPRESENTATION), "w", encoding="utf-8") as file:
            json.dump(self.representation | {"max_tokens": self.max_seq_length}, file, indent=2, ensure_ascii=False)

    def get_embedding_dimension(self) -> int:
        config = getattr(self.model.config, "text_config", self.model.config)
        return int(self.representation["dimensions"] or getattr(config, "word_embed_proj_dim", None) or config.hidden_size)

    # -- texts to tokens ---------------------------------------------------------------------------

    def preprocess(self, inputs: Any, prompt: str | None = None, task: str | None = None, **unused: Any) -> dict[str, Any]:
        """``input_ids`` and ``attention_mask``, int64 [N, L], padded on the right.

        prompt: in place of what the template has before the text, unless empty; task: ``query``, else the document's template.
        """
        tokenizer = getattr(self.tokenizer, "backend_tokenizer", None)
        if tokenizer is None:
            raise ValueError("the model's tokenizer is no fast one")
        tokenizer.no_truncation()
        tokenizer.no_padding()
        form = self.representation["query" if task == "query" else "document"]
        before, after = _split(form["template"])
        rows = [self._tokens(tokenizer, str(text), prompt or before, after, form["clean"]) for text in inputs]
        longest = max(map(len, rows))
        ids_BL = torch.zeros(len(rows), longest, dtype=torch.int64)
        mask_BL = torch.zeros_like(ids_BL)
        for number, row in enumerate(rows):
            ids_BL[number, : len(row)] = torch.tensor(row)
            mask_BL[number, : len(row)] = 1
        return {"input_ids": ids_BL, "attention_mask": mask_BL}

    def _tokens(self, tokenizer: Any, text: str, before: str, after: str, cleaning: str) -> list[int]:
        eos = self._eos(tokenizer)
        room = self.max_seq_length - len(eos)
        window = self.max_seq_length * CHARACTERS_PER_TOKEN

        def encode(piece: str) -> Any:
            whole = before + _clean(piece, cleaning) + after
            return tokenizer.encode(whole.strip() if cleaning == "senteval" else whole)

        while True:
            piece = text[:window]
            encoding = encode(piece)
            if len(encoding.ids) > room or len(piece) == len(text):
                break
            window *= 2
        start = len(before)
        while len(encoding.ids) > room:
            excess = len(encoding.ids) - room
            ends = [end for begin, end in encoding.offsets if begin >= start and start < end <= start + len(piece)]
            keep = ends[-excess - 1] - start if excess < len(ends) else 0
            piece = piece[: min(keep, len(piece) - 1)]
            if not piece.strip():
                raise ValueError(f"no token of the text {text[:40]!r} fits in {self.max_seq_length} tokens with its template; raise max_seq_length")
            encoding = encode(piece)
        if not encoding.ids:
            raise ValueError(f"the tokenizer makes no token of the text {text[:40]!r}; leave it out")
        return list(encoding.ids) + eos

    def _eos(self, tokenizer: Any) -> list[int]:
        """What is appended to a prompt, unless the tokenizer puts it there itself."""
        if not self.representation["append_eos"]:
            return []
        number = self.tokenizer.eos_token_id
        return [] if tokenizer.encode("a").ids[-1:] == [number] else [number]

    # -- tokens to vectors -------------------------------------------------------------------------

    def forward(self, features: dict[str, Any], task: str | None = None, **unused: Any) -> dict[str, Any]:
        """Adds ``token_embeddings`` [N, L, D] and ``sentence_embedding``, float32 [N, dimensions]."""
        ids_BL, mask_BL = features["input_ids"], features["attention_mask"]
        lengths_B = mask_BL.sum(1)
        beyond_B = lengths_B > self._switch if self._switch else torch.zeros_like(lengths_B, dtype=torch.bool)
        if bool(beyond_B.any()) and not bool(beyond_B.all()):
            # LongRoPE turns all rows of a pass by the angles that its longest one needs.
            order_B = torch.cat([torch.nonzero(beyond_B)[:, 0], torch.nonzero(~beyond_B)[:, 0]])
            short = int(lengths_B[~beyond_B].max())
            long_BLD = self._states(ids_BL[beyond_B], mask_BL[beyond_B])
            short_BLD = self._states(ids_BL[~beyond_B][:, :short], mask_BL[~beyond_B][:, :short])
            short_BLD = torch.nn.functional.pad(short_BLD, (0, 0, 0, ids_BL.shape[1] - short))
            states_BLD = torch.cat([long_BLD, short_BLD])[torch.argsort(order_B)]
        else:
            states_BLD = self._states(ids_BL, mask_BL)
        vectors_BD = self._pool(states_BLD, lengths_B)[:, : self.representation["dimensions"]]
        if self.representation["normalize"]:
            vectors_BD = vectors_BD / vectors_BD.norm(dim=1, keepdim=True).clamp_min(1e-12)
        return features | {"token_embeddings": states_BLD, "sentence_embedding": vectors_BD}

    def _states(self, ids_BL: torch.Tensor, mask_BL: torch.Tensor) -> torch.Tensor:
        out = self.model(input_ids=ids_BL, attention_mask=mask_BL, use_cache=False, output_hidden_states=self._layer is not None)
        states: torch.Tensor = out.last_hidden_state if self._layer is None else out.hidden_states[self._layer]
        return states

    def _pool(self, states_BLD: torch.Tensor, lengths_B: torch.Tensor) -> torch.Tensor:
        pooling = self.representation["pooling"]
        if pooling == "last":
            return states_BLD[torch.arange(len(lengths_B), device=lengths_B.device), lengths_B - 1].float()
        positions_L = torch.arange(states_BLD.shape[1], device=lengths_B.device)
        weights_BL = (positions_L < lengths_B[:, None]).float()
        if pooling == "weighted-mean":
            weights_BL = weights_BL * (positions_L + 1)
        return torch.einsum("bld,bl->bd", states_BLD.float(), weights_BL) / weights_BL.sum(1, keepdim=True)


def _rope_switch(config: Any) -> int | None:
    """Length in tokens above which LongRoPE turns by other angles; None without it."""
    rope = getattr(config, "rope_parameters", None) or {}
    for values in (rope, *(layer for layer in rope.values() if isinstance(layer, dict))):
        if values.get("rope_type") == "longrope":
            return int(values["original_max_position_embeddings"])
    return None


def _split(template: str) -> tuple[str, str]:
    """The words before and after ``{text}``."""
    before, after, seen = "", "", False
    for words, field, _, _ in string.Formatter().parse(template):
        before, after = (before, after + words) if seen else (before + words, after)
        seen = seen or field is not None
    return before, after


def _clean(text: str, cleaning: str) -> str:
    """``senteval``: closed with a full stop, which also replaces a last question mark; double quotes become single ones."""
    if cleaning == "none" or not text:
        return text
    if not text.endswith((".", "?", '"', "'")):
        text += "."
    text = text.replace('"', "'")
    return text[:-1] + "." if text.endswith("?") else text
