"""What an embedding job will do and cost, estimated before it begins: no weights, no Ray, nothing written.

Invariant: an estimate is plain data and carries every assumption it rests on. Rows and units are those of the
plan, tokens and rejects those of a sample in proportion, hours those of operations at an assumed share of a GPU's
rate, or of a throughput that the user has measured. Fields named as in the receipt mean the same.
"""

from __future__ import annotations

import json
import time
from dataclasses import asdict, dataclass, replace
from typing import Any, get_args

import numpy as np

from llmemb_ray import engines
from llmemb_ray.config import EmbedSettings, PlanSettings, parse_actors, parse_utilization
from llmemb_ray.embedders import models
from llmemb_ray.embedders.embedder import EmbedderSpec, settle
from llmemb_ray.errors import NotFound, OutputError
from llmemb_ray.pipeline import planning
from llmemb_ray.pipeline.estimates import costs, gpus, sampled
from llmemb_ray.pipeline.estimates.costs import Counts, Hours, Range
from llmemb_ray.pipeline.prepare import Job
from llmemb_ray.shards.plan import Plan
from llmemb_ray.shards.precision import Dtype
from llmemb_ray.storage import Storage, absolute

PATH = "_llmemb/plan/estimate.json"

UTILIZATION = parse_utilization(PlanSettings.model_fields["utilization"].default)
"""Share of a GPU's dense bf16 rate that is assumed to be reached: what others report of forward passes of models of
billions of parameters. Not measured for this package."""

SMALL_MODEL = 1e9
"""Parameters below which a GPU waits for what surrounds the model, so that the share assumed is too high."""


@dataclass(frozen=True, kw_only=True)
class Spread:
    """Tokens of a text or prompt."""

    mean: float
    p50: int
    p99: int
    maximum: int

    @classmethod
    def of(cls, lengths: Counts) -> Spread:
        if not len(lengths):
            return cls(mean=0.0, p50=0, p99=0, maximum=0)
        p50, p99 = np.percentile(lengths, [50, 99], method="inverted_cdf")
        return cls(mean=round(float(lengths.mean()), 2), p50=int(p50), p99=int(p99), maximum=int(lengths.max()))


@dataclass(frozen=True, kw_only=True)
class Estimate:
    model: str
    backend: str
    run_key: str
    space: str
    files: int
    bad_files: int
    bytes: int
    """Of the input files."""
    rows: int
    """Planned, before a filter."""
    text_column: str
    id_column: str | None
    sample_rows: int
    """The figures below are exact where this is ``rows``."""
    sample_places: int
    sample_prompts: int
    sample_rejects: dict[str, int]
    sample_truncated: int
    rows_read: int
    rows_embedded: int
    rows_rejected: int
    rows_filtered: int
    prompts: int
    """One a text, or one a chunk."""
    vectors: int
    truncated: int
    text_tokens: Spread
    """Of the texts alone."""
    uncut_tokens: Spread
    """Of the prompts before they are cut."""
    prompt_tokens: Spread
    """Of the prompts as they are embedded."""
    tokens: int
    tokens_margin: int
    """Two standard errors of ``tokens``."""
    tokens_computed: int
    """Without padding."""
    tokens_shared: int
    """By the backend of the run."""
    tokens_shared_by: dict[str, int]
    """By backend: hf shares to the token, vllm in whole blocks."""
    template: str
    template_tokens: int
    shared_prefix_tokens: int
    max_tokens: int
    units: int
    actors: int | None
    """Largest number of actors, where it was given."""
    dimension: int
    dtype: str
    shard_bytes: int
    shard_bytes_by: dict[str, int]
    """By dtype."""
    parameters: float
    """About, from the configuration: layers and token embeddings."""
    weight_bytes: float
    flops: float
    flops_attention: float
    """Of ``flops``, what grows with the square of the length."""
    utilization: Range
    hours: list[Hours]
    notes: list[str]
    assumptions: list[str]
    created: float
    backend_why: str = ""
    """How the backend was chosen; estimates that were kept before this was told lack it."""

    def to_dict(self) -> dict[str, Any]:
        data: dict[str, Any] = json.loads(json.dumps(asdict(self)))
        return data

    @classmethod
    def from_dict(cls, data: dict[str, Any], origin: str = "estimate") -> Estimate:
        """Raises OutputError for what ``to_dict`` of this version has not made."""

        def pair(value: Any) -> Any:
            return tuple(value) if isinstance(value, list) else value

        try:
            values = dict(data)
            for name in ("text_tokens", "uncut_tokens", "prompt_tokens"):
                values[name] = Spread(**values[name])
            values["utilization"] = pair(values["utilization"])
            values["hours"] = [Hours(**{name: pair(value) for name, value in line.items()}) for line in values["hours"]]
            return cls(**values)
        except (KeyError, TypeError, ValueError) as error:
            raise OutputError(f"{origin} is no estimate of this version: {error}") from error

    def save(self, storage: Storage) -> None:
        storage.put(PATH, json.dumps(self.to_dict(), indent=1, sort_keys=True).encode())

    @classmethod
    def load(cls, storage: Storage) -> Estimate | None:
        """The estimate of a run; None where there is none. Raises OutputError for one that this version cannot read."""
        try:
            data = json.loads(storage.read(PATH))
        except NotFound:
            return None
        except ValueError as error:
            raise OutputError(f"{storage.display(PATH)} is not JSON: {error}") from error
        return cls.from_dict(data, storage.display(PATH))


def preview(settings: PlanSettings) -> Estimate:
    """Plans the input as a new run, whatever stands in the output, and estimates it. Raises what ``embed`` would raise before its work begins."""
    if settings.gpu is not None:
        gpus.find(settings.gpu)  # Before anything is read.
    spec = settle(settings)
    found, selection = planning.find(settings)
    given = parse_actors(settings.actors)
    actors = max(1, given[1]) if given else 1
    if given == (0, 0):
        on_gpu = models.default_device() == "cuda"
    else:
        on_gpu = settings.gpu is not None or settings.gpus_per_actor is None or settings.gpus_per_actor > 0
    spec = spec.on(on_gpu)
    plan = planning.make_plan(settings, spec, found, selection, actors=actors, gpu=on_gpu)
    made = estimate(
        settings,
        spec,
        plan,
        gpu=settings.gpu,
        throughput=settings.throughput,
        utilization=parse_utilization(settings.utilization),
        sample_rows=settings.sample_rows,
    )
    sizing = (
        f"units are cut for {actors:,} actor{'s' if actors > 1 else ''} {'with a GPU' if on_gpu else 'on CPU cores'}; another cluster cuts the corpus otherwise"
    )
    new = "the input is planned as a new run: what OUTPUT already holds, --append and --reuse would save work that is counted here"
    return replace(made, assumptions=[*made.assumptions, sizing, new])


def estimate(
    settings: EmbedSettings,
    spec: EmbedderSpec,
    plan: Plan,
    *,
    gpu: str | None = None,
    throughput: float | None = None,
    utilization: Range = UTILIZATION,
    sample_rows: int | None = None,
) -> Estimate:
    """Estimates a plan from a sample of its rows.

    gpu:         name in ``gpus.GPUS``; None reckons with each of them
    throughput:  prompt tokens that one GPU (one actor, without GPUs) embeds in a second, measured; wins over the table
    utilization: least and largest share of a GPU's rate
    sample_rows: None chooses
    Raises ConfigError for a GPU that is not in the table, InputError where the corpus cannot be read.
    """
    config = models.load_config(models.fetch(spec.model, spec.access, weights=False), trust_remote_code=spec.trust_remote_code, context=spec.context)
    job = Job.of(plan, spec, Storage(absolute(settings.output), settings.access), settings.access)
    seen = sampled.take(job, plan, sample_rows)
    scale = plan.rows / max(1, seen.source_rows)
    prompter = spec.prompter(job.role)
    shared = seen.shared(prompter.shared_prefix, config, spec.representation.pooling, block_of(spec))
    shared_by = {backend: round(int(count.sum()) * scale) for backend, count in shared.items()}
    tokens = round(int(seen.prompts.lengths.sum()) * scale)
    margin = seen.margin(plan.rows)
    attention = costs.attention_flops(config, seen.prompts.lengths, shared[spec.backend]) * scale
    flops = spec.model_flops * (tokens - shared_by[spec.backend]) + attention
    weights = costs.weight_bytes(spec, config, settings.compute_dtype)
    units, vectors = sum(1 for _ in plan.units()), round(seen.vectors * scale)
    sizes = {
        dtype: seen.shard_bytes(spec.dimension, replace(job.precision, dtype=dtype), vectors=vectors, units=units)
        for dtype in get_args(Dtype)
        if dtype != "ubinary" or spec.dimension % 8 == 0
    }
    filtered, rejected = round(seen.filtered * scale), round(sum(seen.reasons.values()) * scale)
    actors = parse_actors(settings.actors)
    made = Estimate(
        model=plan.model_name,
        backend=spec.backend,
        backend_why=spec.backend_why,
        run_key=plan.run_key,
        space=plan.space_digest,
        files=len(plan.files),
        bad_files=len(plan.bad_files),
        bytes=sum(file.size for file in plan.files),
        rows=plan.rows,
        text_column=plan.selection.text,
        id_column=plan.selection.id,
        sample_rows=seen.source_rows,
        sample_places=len(seen.place_rows),
        sample_prompts=len(seen.prompts),
        sample_rejects=seen.reasons,
        sample_truncated=int(seen.prompts.truncated.sum()),
        rows_read=plan.rows - filtered,
        rows_embedded=plan.rows - filtered - rejected,
        rows_rejected=rejected,
        rows_filtered=filtered,
        prompts=round(len(seen.prompts) * scale),
        vectors=vectors,
        truncated=round(seen.truncated * scale),
        text_tokens=Spread.of(seen.text_tokens),
        uncut_tokens=Spread.of(seen.uncut_tokens),
        prompt_tokens=Spread.of(seen.prompts.lengths),
        tokens=tokens,
        tokens_margin=round(margin),
        tokens_computed=tokens - shared_by[spec.backend],
        tokens_shared=shared_by[spec.backend],
        tokens_shared_by=shared_by,
        template=spec.representation.form(job.role).template,
        template_tokens=prompter.template_tokens,
        shared_prefix_tokens=len(prompter.shared_prefix),
        max_tokens=prompter.max_tokens,
        units=units,
        actors=actors[1] if actors and actors[1] else None,
        dimension=spec.dimension,
        dtype=plan.dtype,
        shard_bytes=sizes[plan.dtype],
        shard_bytes_by=sizes,
        parameters=costs.parameters(spec, config),
        weight_bytes=weights,
        flops=flops,
        flops_attention=attention,
        utilization=utilization,
        hours=costs.hours(
            settings,
            spec,
            weights=weights,
            flops=flops,
            tokens=tokens,
            margin=margin / max(1, tokens),
            gpu=gpu,
            throughput=throughput,
            utilization=utilization,
        ),
        notes=[],
        assumptions=_assumptions(settings, spec, gpu, throughput, utilization),
        created=time.time(),
    )
    return replace(made, notes=_notes(made, settings, spec, config, gpu, throughput))


def block_of(spec: EmbedderSpec) -> int:
    """Tokens of a block of vLLM's prefix cache where the model will run."""
    return engines.VLLM_BLOCK["gpu" if spec.gpu else "cpu"]


def _assumptions(settings: EmbedSettings, spec: EmbedderSpec, gpu: str | None, throughput: float | None, utilization: Range) -> list[str]:
    lines = [
        "the rows of the sample stand for all: they are the first of row groups spread evenly over the corpus; ± is two standard errors, from place to place",
        "saved tokens are those of the prefix that ordinary prompts share; vLLM shares whole blocks of "
        f"{block_of(spec)} tokens (the smallest on {'a GPU' if spec.gpu else 'a CPU'}), and only with pooling last",
        "operations are two for each weight of the layers and token, and causal attention; token embeddings, norms and padding are left out",
        "sizes are of a shard encoded with random vectors beside the sample's other columns, which pack a little tighter in larger shards",
    ]
    if throughput is not None:
        lines.append(f"one GPU embeds {throughput:,.0f} prompt tokens a second (one actor, where there are no GPUs), as you gave it")
    else:
        rows = [gpus.find(gpu)] if gpu else list(gpus.GPUS)
        low, high = utilization
        share = f"{low:.0%}" if low == high else f"{low:.0%} to {high:.0%}"
        measured = "" if utilization != UTILIZATION else ", which was not measured"
        lines.append(
            f"a GPU reaches {share} of its dense bf16 rate (--utilization){measured}; the tokens/s of a run of a few units, as --throughput, tell better"
        )
        lines += [f"{row.name}: {row.bf16 / 1e12:,.0f} TFLOP/s, {row.memory / 1e9:.0f} GB: {row.rate_from}" for row in rows]
        lines.append(f"weights take at most {costs.WEIGHT_SHARE:.0%} of a GPU's memory")
        if spec.backend == "hf":
            lines.append("several GPUs of one actor work one after the other, each on its layers, and all are paid")
    if settings.price and (gpu or throughput):
        lines.append(f"a GPU (an actor, where there are no GPUs) costs {settings.price:g} an hour, as you gave it")
    elif gpu or throughput is None:
        priced = ", ".join(f"{row.name} {row.price_from}" for row in ([gpus.find(gpu)] if gpu else gpus.GPUS))
        lines.append(f"prices are those of {gpus.PRICED} of the {gpus.PRICE_LIST}: {priced}; yours: --price")
    lines.append("starting machines, loading the model, attempts repeated, idle GPUs at the end, storage and network are not counted")
    if settings.dedup != "none":
        lines.append("what dedup saves is not counted: how often texts repeat cannot be told from a sample")
    return lines


def _notes(made: Estimate, settings: EmbedSettings, spec: EmbedderSpec, config: Any, gpu: str | None, throughput: float | None) -> list[str]:
    notes = []
    if made.bad_files:
        notes.append(f"{made.bad_files:,} files cannot be read and are left out; their rows are in no figure here")
    if not made.sample_prompts:
        notes.append("no row of the sample can be embedded: look at the text column and the filter")
    elif made.rows_read and made.rows_rejected / made.rows_read > settings.max_reject_rate and made.rows_rejected > settings.reject_floor:
        notes.append(
            f"{made.rows_rejected / made.rows_read:.1%} of the rows would be rejected, more than max_reject_rate={settings.max_reject_rate:.1%}: "
            "the run would end with exit code 1"
        )
    if made.sample_truncated and settings.chunk_tokens is None:
        notes.append(
            f"{made.sample_truncated / made.sample_prompts:.1%} of the texts lose their end: raise --max-tokens if the model allows it, "
            "or cut texts into chunks (--chunk-tokens)"
        )
    if 0 < made.shared_prefix_tokens < block_of(spec):
        notes.append(f"the shared prefix of {made.shared_prefix_tokens} tokens fills no block of {block_of(spec)}: vLLM saves nothing")
    if made.shared_prefix_tokens and made.tokens and not made.tokens_shared_by["hf"]:
        notes.append(f"the transformers backend runs {config.model_type} as padded batches: it shares no prefix, and padding comes on top")
    if made.dtype == "ubinary":
        centred = "" if settings.centre else ", take the bits against the mean (--centre)"
        notes.append(
            f"bits tell vectors that all point one way badly apart, as many decoders' do (plan cannot see it){centred}, compare with --dtype int8 first"
        )
    if any(getattr(config, name, None) for name in ("num_local_experts", "num_experts")):
        notes.append(f"{config.model_type} is a mixture of experts: operations and weights are reckoned as if it had one expert a layer, and are too low")
    if made.parameters < SMALL_MODEL and throughput is None and made.hours:
        notes.append(
            f"with {made.parameters / 1e6:,.1f} M parameters the model is too small to keep a GPU at the share assumed: expect more hours, "
            "measure a run with --limit-rows"
        )
    if throughput is None and (settings.compute_dtype == "float32" or spec.quantization != "none"):
        what = settings.compute_dtype if spec.quantization == "none" else spec.quantization
        notes.append(f"the rates are for bfloat16; {what} is slower, by how much is not known here")
    if settings.gpus_per_actor:
        notes += [
            f"{line.gpu}: the weights need {line.gpus_per_actor} GPUs an actor, more than gpus_per_actor={settings.gpus_per_actor:g}"
            for line in made.hours
            if line.gpus_per_actor > settings.gpus_per_actor and line.gpus_per_actor > 1
        ]
    if spec.backend == "vllm":
        notes += [
            f"{line.gpu}: the weights need {line.gpus_per_actor} GPUs an actor: set --tensor-parallel {line.gpus_per_actor}"
            for line in made.hours
            if line.gpus_per_actor > max(spec.tensor_parallel, settings.gpus_per_actor or 1)
        ]
    if not made.hours:
        notes.append("for actors without GPUs no rate is known: give --throughput, tokens a second of one actor, as embed shows them")
    if settings.price and gpu is None and throughput is None and made.hours:
        notes.append(f"price={settings.price:g} is of which GPU? Name it with --gpu; the costs are at list prices")
    if made.actors and made.units < made.actors:
        notes.append(f"{made.units:,} units keep no more than {made.units:,} of {made.actors:,} actors busy: set rows_per_unit lower")
    return notes
