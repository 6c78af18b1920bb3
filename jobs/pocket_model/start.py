"""The pocket model before training: its tokenizer, and a LLaMA around given token embeddings.

Invariant: the layers add nothing at first (their last matrices are zero), so the start's vector of a text is the mean of its tokens' vectors.
One dimension, the last, holds a constant larger than all others together, which the final norm multiplies by zero: that norm then divides all tokens
by nearly the same number, and a token with a short vector keeps its little weight in the mean (with 49 thousand texts worth 11 points on STS-B dev).
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt

VOCABULARY = 16_000
HIDDEN, LAYERS, FEED_FORWARD, HEADS = 256, 2, 512, 4
POSITIONS = 512
TARGET = HIDDEN - 1
"""Dimensions of the targets."""

CONSTANT = 10.0
"""In the last dimension; the others together have a length of 1 to 5."""

SEEN, SEEN_CONSTANT = 5.0, 0.3
"""Weights of the layers' first norms: on the others, so that they reach the layers with a variance of about 1, and on the constant."""


def make_tokenizer(texts: Sequence[str], path: Path, *, vocabulary: int = VOCABULARY) -> None:
    """Byte-level BPE without case; words, marks and numbers apart whether or not there is a blank between: tokenised and raw editions of a text are one.

    A text begins with <s>; </s> ends it where a representation asks for it.
    """
    from tokenizers import Tokenizer, decoders, normalizers, pre_tokenizers, processors, trainers
    from tokenizers import models as token_models

    tokenizer = Tokenizer(token_models.BPE())
    tokenizer.normalizer = normalizers.Sequence([normalizers.NFC(), normalizers.Lowercase()])
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Punctuation(), pre_tokenizers.ByteLevel(add_prefix_space=True, use_regex=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=vocabulary, special_tokens=["<s>", "</s>"], initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    tokenizer.save(str(path), pretty=False)


def token_texts(tokenizer_json: Path) -> list[str]:
    """What each token stands for, '' for special ones and for pieces of a character."""
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(tokenizer_json))
    texts = [tokenizer.decode([token]).strip() for token in range(tokenizer.get_vocab_size())]
    return ["" if "\ufffd" in text else text for text in texts]


def make_model(directory: Path, tokenizer_json: Path, vectors_VD: npt.NDArray[np.float32], *, seed: int = 0) -> None:
    """vectors_VD: float32 [VOCABULARY, TARGET], of each token. Writes a model directory."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    from llmemb_ray.embedders.models import quiet_transformers
    from llmemb_ray.representation import Representation

    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=len(vectors_VD),
        hidden_size=HIDDEN,
        intermediate_size=FEED_FORWARD,
        num_hidden_layers=LAYERS,
        num_attention_heads=HEADS,
        num_key_value_heads=HEADS,
        max_position_embeddings=POSITIONS,
        tie_word_embeddings=True,
        initializer_range=HIDDEN**-0.5,
        bos_token_id=0,
        eos_token_id=1,
    )
    model = LlamaForCausalLM(config)
    with torch.no_grad():
        weight = model.model.embed_tokens.weight
        weight[:, :TARGET] = torch.from_numpy(vectors_VD)
        weight[:, TARGET:] = CONSTANT
        model.model.norm.weight[TARGET:] = 0.0
        for layer in model.model.layers:
            for norm in (layer.input_layernorm, layer.post_attention_layernorm):
                norm.weight[:TARGET], norm.weight[TARGET:] = SEEN, SEEN_CONSTANT
            layer.self_attn.o_proj.weight.zero_()
            layer.mlp.down_proj.weight.zero_()
    with quiet_transformers():
        model.save_pretrained(directory)
    tokenizer = PreTrainedTokenizerFast(tokenizer_file=str(tokenizer_json), bos_token="<s>", eos_token="</s>", model_max_length=POSITIONS)
    tokenizer.save_pretrained(directory)
    Representation(pooling="mean").save(directory)
