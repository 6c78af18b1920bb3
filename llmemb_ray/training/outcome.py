"""What a training leaves beside its weights: the representation, how it was made, and a card.

Invariant: ``llmemb.json`` is what the weights were trained with, and ``training.json`` names the base by a digest, so that later commands
need not be told and refuse what does not fit. Neither counts in the digest of the weights: the same training gives the same space.
"""

from __future__ import annotations

import json
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from llmemb_ray.embedders import models
from llmemb_ray.representation.representation import FILE_NAME
from llmemb_ray.representation.space import Context
from llmemb_ray.storage import Storage, redact
from llmemb_ray.training import card

if TYPE_CHECKING:
    from llmemb_ray.config import FinetuneSettings
    from llmemb_ray.embedders.embedder import EmbedderSpec
    from llmemb_ray.training.batches import Batches
    from llmemb_ray.training.finetune import Finetuned

FORMAT = 1

OF_READING = ("shards", "steps_per_shard", "steps_per_epoch", "fingerprint", "format", "heldout_pieces")
"""Fields of the record of the batches that say how to read them."""


def write(place: Storage, spec: EmbedderSpec, settings: FinetuneSettings, made: Finetuned, batches: Batches) -> dict[str, Any]:
    """Writes ``llmemb.json``, ``training.json`` and ``README.md`` beside the weights that stand in ``place``. Returns what is in training.json.

    spec: of the base. Raises ModelError if the weights are not there.
    """
    place.put(FILE_NAME, (json.dumps(spec.representation.to_dict(), indent=2, ensure_ascii=False) + "\n").encode())
    adapter = settings.method == "lora"
    weights = models.resolve(place._url, None, settings.access, "adapter" if adapter else "model")
    trained = replace(spec, adapter=weights) if adapter else replace(spec, model=weights, context=Context())  # A model's config.json holds it.
    record = {
        "format": FORMAT,
        "method": settings.method,
        "base": {
            "name": redact(spec.model.name),
            "kind": spec.model.kind,
            "commit": spec.model.commit,
            "weights": models.weights_digest(spec.model, settings.access),
        },
        # The model's own base of rotary positions changes nothing, but allows more of them.
        "context": spec.context.to_dict() | ({} if settings.rope_theta is None else {"rope_theta": settings.rope_theta}),
        "space": trained.space.digest,
        "steps": {"done": made.steps, "planned": made.planned, "written": made.after_step},
        "scores": {"name": made.score, "before": made.before, "after": made.after},
        "loss": made.loss,
        "tokens": made.tokens,
        "seconds": made.seconds,
        "seed": settings.seed,
        "workers": made.workers,
        "data": {name: value for name, value in batches.record.items() if name not in OF_READING},
        "settings": made.settings,
        "versions": made.versions,
    }
    place.put(models.TRAINING, (json.dumps(record, indent=1, ensure_ascii=False) + "\n").encode())
    place.put(card.NAME, _card(spec, settings, made, record).encode())
    return record


def hub_id(base: dict[str, Any]) -> str | None:
    """The base's name where it is one of the hub."""
    return str(base["name"]) if base.get("kind") == "hub" else None


def _card(spec: EmbedderSpec, settings: FinetuneSettings, made: Finetuned, record: dict[str, Any]) -> str:
    adapter = settings.method == "lora"
    base = record["base"]
    what = f"A LoRA adapter of {base['name']}" if adapter else f"{base['name']}, all weights trained"
    early = "" if made.steps == made.planned else f" of {made.planned:,} planned"
    about = (
        f"{what}, for sentence embeddings of {spec.dimension} dimensions: contrastive fine-tuning with `llmemb finetune`, {made.steps:,} steps{early} "
        f"of {settings.batch_size:,} rows, {made.tokens:,} tokens in {made.seconds:,.0f} s. The weights are those after step {made.after_step:,}.\n\n"
        f"Base: {base['name']} at `{base['commit']}`. Vector space: `{record['space']}`; compare vectors within one space only."
    )
    scores = ""
    if made.after is not None:
        before = "" if made.before is None else f"{made.before:.2f}"
        scores = card.table(("", "before", "after"), [(made.score, before, f"{made.after:.2f}")])
    name = base["name"] if adapter else "THIS_DIRECTORY"
    options = " --adapter THIS_DIRECTORY" if adapter else ""
    used = (
        "The representation is taken from `llmemb.json` by itself.\n\n"
        + card.block(f"llmemb embed corpus.parquet OUT --model {name}{options}")
        + "\n\nFor other programs:\n\n"
        + card.block("llmemb export-model THIS_DIRECTORY --to merged --dest MERGED", "llmemb export-model THIS_DIRECTORY --to sentence-transformers --dest DIR")
    )
    return card.card(
        title=f"{base['name'].rstrip('/').rpartition('/')[2]}, fine-tuned for sentence embeddings",
        header=card.header(base=hub_id(base), library="peft" if adapter else "transformers", adapter=adapter),
        sections=[
            ("What it is", about),
            ("Scores", scores),
            ("Use", used),
            ("Representation", card.representation_text(spec.representation)),
            ("Data", card.data_text(record["data"])),
            ("Settings", card.settings_text(made.settings)),
            ("Versions", card.settings_text(made.versions)),
        ],
    )
