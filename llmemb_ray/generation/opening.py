"""From settings to a generator: an endpoint, a model in this process, or one in each actor of a cluster.

Invariant: a spec holds all that decides an answer and can be sent to any process; ``load`` makes of it what the settings name.
Models are resolved to a commit once, here. Loads nothing before it is needed.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import fields

from llmemb_ray import engines
from llmemb_ray.config import parse_actors
from llmemb_ray.config.generation import GeneratorSettings, LLMSettings
from llmemb_ray.embedders import models
from llmemb_ray.generation.endpoint import Endpoint, sampling_name
from llmemb_ray.generation.generator import Generator, Structured
from llmemb_ray.generation.local import LocalGenerator, LocalSpec
from llmemb_ray.generation.pace import Pace
from llmemb_ray.generation.tokens import ModelSpec
from llmemb_ray.generation.vllm_engine import VllmGenerator, VllmSpec


def structured_of(settings: LLMSettings) -> Structured:
    """What holds answers to the schemas of their prompts, settled."""
    if not isinstance(settings, GeneratorSettings):
        return "none"
    return "json_schema" if settings.structured == "auto" else settings.structured


def endpoint_of(settings: LLMSettings) -> Endpoint:
    """The endpoint that the settings name by ``llm``. Raises ConfigError."""
    assert settings.llm is not None
    return Endpoint(
        settings.llm,
        base_url=settings.base_url,
        concurrency=settings.concurrency,
        retries=settings.retries,
        timeout=settings.request_timeout,
        temperature=settings.temperature,
        top_p=settings.top_p,
        max_new_tokens=settings.max_new_tokens,
        structured=structured_of(settings),
        pace=Pace(settings.requests_per_minute, settings.tokens_per_minute),
    )


def engine_of(settings: LLMSettings, device: str) -> str:
    """``engine``, settled for a device, cuda or cpu: vLLM where it is installed and there is a GPU, or where only it can do it."""
    if settings.engine != "auto":
        return settings.engine
    version = engines.vllm_version()
    for_gpus = version is not None and not version.endswith("+cpu")
    return "vllm" if settings.tensor_parallel > 1 or settings.engine_arg or (for_gpus and device == "cuda") else "transformers"


def spec_of(settings: LLMSettings, device: str | None = None) -> ModelSpec:
    """The model that the settings name by ``model``, on a device: cuda, cpu, or None for this machine's. Raises ConfigError or ModelError."""
    [spec] = specs_of(settings, [device or models.default_device()]).values()
    return spec


def specs_of(settings: LLMSettings, devices: list[str] | None = None) -> dict[str, ModelSpec]:
    """Device -> the model as it is there: the answers of one precision, or engine, are not those of another.

    devices: None for those that the settings may meet: this machine's where the model is loaded in this process, else those of a
    cluster's actors. Raises ConfigError or ModelError.
    """
    assert settings.model is not None
    source = models.resolve(settings.model, settings.revision, settings.access)
    if devices is None:
        devices = [models.default_device()] if parse_actors(settings.actors) == (0, 0) else ["cuda", "cpu"]
    assert settings.temperature is not None
    return {device: _spec(settings, settings.temperature, source, device) for device in devices}


def _spec(settings: LLMSettings, temperature: float, source: models.ModelSource, device: str) -> ModelSpec:
    basic = LocalSpec(
        source=source,
        asking=settings.asking,
        temperature=temperature,
        top_p=1.0 if settings.top_p is None else settings.top_p,
        max_new_tokens=settings.max_new_tokens,
        structured=structured_of(settings),
        compute_dtype=models.resolve_dtype(settings.compute_dtype, device),
        trust_remote_code=settings.trust_remote_code,
        allow_pickle=settings.allow_pickle,
        access=settings.access,
    )
    if engine_of(settings, device) == "transformers":
        return basic
    common = {field.name: getattr(basic, field.name) for field in fields(basic)}
    share = settings.gpus_per_actor or 1.0
    return VllmSpec(**common, tensor_parallel=settings.tensor_parallel, gpu_share=share, engine_args=settings.engine_args)


def load(spec: ModelSpec) -> LocalGenerator | VllmGenerator:
    """Loads the model in this process. Raises ConfigError or ModelError."""
    if isinstance(spec, VllmSpec):
        return VllmGenerator(spec)
    assert isinstance(spec, LocalSpec)
    return LocalGenerator(spec)


def name_of(settings: LLMSettings, device: str | None = None) -> str:
    """Whom the settings ask, with every setting that decides an answer, for run keys: without the address of an endpoint.

    device: see spec_of. Raises ConfigError or ModelError.
    """
    if settings.llm is not None:
        return f"{settings.llm}, {sampling_name(settings.temperature, settings.top_p, settings.max_new_tokens, structured_of(settings))}"
    return spec_of(settings, device).name


@contextmanager
def opened(settings: LLMSettings, specs: Mapping[str, ModelSpec] | None = None) -> Iterator[Generator]:
    """Whom the settings ask, for as long as the block lasts: an endpoint, a model in this process (``actors`` 0), or one in each actor.

    specs: of ``specs_of``, where they are made already. Raises ConfigError or ModelError.
    """
    if settings.llm is not None:
        yield endpoint_of(settings)
        return
    specs = specs_of(settings) if specs is None else specs
    if parse_actors(settings.actors) == (0, 0):
        yield load(next(iter(specs.values())))
        return
    from llmemb_ray.connection import connected
    from llmemb_ray.generation.actors import on_cluster
    from llmemb_ray.pipeline.shape import shape

    cluster = settings.cluster()
    with connected(settings.ray_address):
        spec = specs["cuda" if shape(cluster).on_gpu else "cpu"]
        with on_cluster(spec, cluster) as generator:
            yield generator
