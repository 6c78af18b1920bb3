"""Small random models and tokenizers that tests build for themselves; real architectures, a few thousand parameters."""

from __future__ import annotations

from pathlib import Path
from typing import Any

VOCABULARY = 512

SENTENCES = [
    "A man is playing a guitar.",
    'She said "yes" and left_the_room',
    "What is this?",
    "no final full stop",
    "naïve café — déjà vu…",
    "数据科学很有趣。",
    "emoji 😀👩‍👩‍👧‍👦 and flags 🇫🇷",
    "  leading and trailing space  ",
    "tabs\tand\nnewlines",
    "\"quoted\" 'single' “curly”",
    "x",
    "1234567890 3.14 -7e9",
    "snake_case_words and *stars* {braces}",
    "The quick brown fox jumps over the lazy dog, again and again and again and again, until it is tired.",
]
"""Sentences that break naive prompt handling: quotes, underscores, emoji, CJK, no final full stop."""


def tokenizer_of(texts: list[str] = SENTENCES, *, bos: str | None = "<s>", vocabulary: int = VOCABULARY) -> Any:
    """A byte-level BPE tokenizer trained on ``texts``; prepends ``bos`` if given."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.train_from_iterator(
        [*texts, 'This sentence : "a" means in one word:"'],
        trainers.BpeTrainer(
            vocab_size=vocabulary, special_tokens=["<s>", "</s>", "<pad>"], initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
        ),
    )
    if bos:
        tokenizer.post_processor = processors.TemplateProcessing(single=f"{bos} $A", special_tokens=[(bos, tokenizer.token_to_id(bos))])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", pad_token="<pad>")


def config_of(kind: str, vocabulary: int = VOCABULARY, **changes: Any) -> Any:
    """A small transformers configuration of an architecture."""
    import transformers as t

    common: dict[str, Any] = {
        "vocab_size": vocabulary,
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "bos_token_id": 0,
        "eos_token_id": 1,
        "pad_token_id": 2,
    }
    rotary = common | {"intermediate_size": 64, "max_position_embeddings": 256}
    grouped = rotary | {"num_key_value_heads": 2}
    gemma = rotary | {"num_key_value_heads": 1, "head_dim": 16}
    opt = common | {"ffn_dim": 64, "max_position_embeddings": 256}
    configs = {
        "opt": (t.OPTConfig, opt | {"word_embed_proj_dim": 32}),
        "opt-350m": (t.OPTConfig, opt | {"word_embed_proj_dim": 16, "do_layer_norm_before": False}),
        "llama": (t.LlamaConfig, grouped),
        "mistral": (t.MistralConfig, grouped | {"sliding_window": 16}),
        "qwen2": (t.Qwen2Config, grouped),
        "qwen3": (t.Qwen3Config, grouped | {"head_dim": 16}),
        "gpt2": (t.GPT2Config, {"vocab_size": vocabulary, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 256, "bos_token_id": 0, "eos_token_id": 1}),
        "gpt_neox": (t.GPTNeoXConfig, rotary),
        "phi": (t.PhiConfig, rotary),
        "phi3": (t.Phi3Config, grouped),
        "gemma": (t.GemmaConfig, gemma),
        "gemma2": (t.Gemma2Config, gemma | {"sliding_window": 16}),
        "gemma3_text": (t.Gemma3TextConfig, gemma | {"sliding_window": 16, "layer_types": ["sliding_attention", "full_attention"]}),
        "bloom": (t.BloomConfig, {"vocab_size": vocabulary, "hidden_size": 32, "n_layer": 2, "n_head": 4}),
        "mamba": (t.MambaConfig, {"vocab_size": vocabulary, "hidden_size": 32, "num_hidden_layers": 2, "state_size": 4}),
        "bert": (t.BertConfig, {"vocab_size": vocabulary, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64}),
    }
    class_, values = configs[kind]
    return class_(**(values | changes))


def make_model(directory: Path, kind: str = "llama", *, tokenizer: Any = None, seed: int = 0, head: bool = False, **changes: Any) -> Path:
    """Saves a random model with its tokenizer to ``directory`` and returns it. head: with its language-model head."""
    import torch
    from transformers import AutoModel, AutoModelForCausalLM

    tokenizer = tokenizer or tokenizer_of()
    torch.manual_seed(seed)
    config = config_of(kind, len(tokenizer), **changes)
    model = (AutoModelForCausalLM if head else AutoModel).from_config(config)
    with torch.no_grad():
        for parameter in model.parameters():  # away from initialisations that hide errors (zero biases, unit norms)
            parameter.add_(torch.randn_like(parameter) * 0.05)
    model.save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    return directory


def make_damaged_model(directory: Path, *, token: str = "#", value: float = float("nan")) -> Path:
    """A model that works but for one token, whose embedding is ``value``; texts without it are sound."""
    from safetensors.torch import load_file, save_file

    tokenizer = tokenizer_of([token, *SENTENCES])
    make_model(directory, tokenizer=tokenizer)
    weights = load_file(directory / "model.safetensors")
    weights["embed_tokens.weight"][tokenizer.convert_tokens_to_ids(token)] = value
    save_file(weights, directory / "model.safetensors", metadata={"format": "pt"})
    return directory


def make_adapter(model: Path, directory: Path, *, rank: int = 8, head: bool = False) -> Path:
    """Saves a random LoRA adapter of all linear layers. head: trained on the model with its language-model head."""
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModel, AutoModelForCausalLM

    wrapped = get_peft_model(
        (AutoModelForCausalLM if head else AutoModel).from_pretrained(model), LoraConfig(r=rank, lora_alpha=2 * rank, target_modules="all-linear")
    )
    torch.manual_seed(1)
    with torch.no_grad():
        for name, parameter in wrapped.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.1)
    wrapped.save_pretrained(directory)
    return directory


def with_wide_heads(model: Path, directory: Path) -> Path:
    """A LLaMA-style model whose attention heads are twice as wide, the new half zeros: it computes the same states.

    The rotation is told to turn only the old half, and queries are scaled by √2, since scores are divided by the root of the width.
    """
    import json
    import shutil

    import torch
    from safetensors.torch import load_file, save_file

    shutil.copytree(model, directory)
    config = json.loads((directory / "config.json").read_text())
    width = config["hidden_size"] // config["num_attention_heads"]
    config |= {"head_dim": 2 * width, "partial_rotary_factor": 0.5}
    (directory / "config.json").write_text(json.dumps(config))
    weights = load_file(directory / "model.safetensors")

    def widened(weight_OI: Any) -> Any:
        heads = weight_OI.reshape(-1, width, weight_OI.shape[1])
        return torch.cat([heads, torch.zeros_like(heads)], dim=1).reshape(-1, weight_OI.shape[1])

    for name, weight in weights.items():
        if name.endswith("q_proj.weight"):
            weights[name] = widened(weight * 2**0.5).contiguous()
        elif name.endswith(("k_proj.weight", "v_proj.weight")):
            weights[name] = widened(weight).contiguous()
        elif name.endswith("o_proj.weight"):
            weights[name] = widened(weight.T).T.contiguous()
    save_file(weights, directory / "model.safetensors", metadata={"format": "pt"})
    return directory
