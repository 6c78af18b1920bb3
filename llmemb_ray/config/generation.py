"""Settings of whom is asked for text: the model of an endpoint, or one that is loaded."""

from __future__ import annotations

from typing import Any, ClassVar, Literal, Self

from pydantic import model_validator

from llmemb_ray.config.base import ActorSettings, ClusterSettings, parse_engine_args, refuse_owned, setting

OWNED_ENGINE_ARGS: dict[str, str] = {
    "model": "model",
    "revision": "revision",
    "dtype": "compute_dtype",
    "tensor_parallel_size": "tensor_parallel",
    "pipeline_parallel_size": "tensor_parallel",
    "data_parallel_size": "actors",
    "trust_remote_code": "trust_remote_code",
    "load_format": "allow_pickle",
    "generation_config": "temperature and top_p",
    "override_generation_config": "temperature and top_p",
    "structured_outputs_config": "structured",
    "distributed_executor_backend": "",
    "hf_token": "the environment variable HF_TOKEN",
    "runner": "",
    "convert": "",
    "pooler_config": "",
    "tokenizer": "",
    "skip_tokenizer_init": "",
    "enable_lora": "",
}
"""Arguments of vLLM's engine that are settled here, with the setting that does so; none where there is nothing to choose."""


class LLMSettings(ActorSettings):
    """An LLM that answers prompts."""

    llm: str | None = setting(None, "Model of an OpenAI-compatible endpoint that is asked; its key is taken from OPENAI_API_KEY.", panel="Endpoint")
    base_url: str | None = setting(None, "The endpoint, such as http://127.0.0.1:8000/v1; default: OPENAI_BASE_URL, else OpenAI's own.", panel="Endpoint")
    concurrency: int = setting(8, "Requests to the endpoint at once.", panel="Endpoint", ge=1, le=1000)
    retries: int = setting(5, "Times that a request is tried again after an overload, a time-out or a lost connection.", panel="Endpoint", ge=0)
    request_timeout: float = setting(300.0, "Seconds that a request may take.", panel="Endpoint", gt=0)
    requests_per_minute: int | None = setting(None, "Requests that begin in a minute at most, those tried again included; others wait.", panel="Endpoint", ge=1)
    tokens_per_minute: int | None = setting(
        None, "Tokens of requests and answers in a minute at most, answers estimated by those before; others wait.", panel="Endpoint", ge=1
    )

    model: str | None = setting(None, "Model to load and ask in place of an endpoint: hub id, local directory or URL.", panel="Model")
    revision: str | None = setting(None, "Branch, tag or commit of a hub model; resolved to a commit once.", panel="Model")
    engine: Literal["auto", "transformers", "vllm"] = setting(
        "auto", "What runs the model; auto is vllm where it is installed and there is a GPU, else transformers.", panel="Model"
    )
    asking: Literal["auto", "chat", "plain"] = setting(
        "auto", "model: chat through its chat template, plain by going on from the prompt's last character, auto: chat where there is one.", panel="Model"
    )
    compute_dtype: Literal["auto", "float32", "bfloat16", "float16"] = setting(
        "auto", "Precision of the model; auto is bfloat16 on CUDA, else float32.", panel="Model"
    )
    tensor_parallel: int = setting(1, "GPUs that a model's layers are split over, all on one node (vllm).", panel="Model", ge=1)
    engine_arg: list[str] = setting([], "Further argument KEY=VALUE of vLLM's engine, value in YAML; repeatable.", panel="Model")
    trust_remote_code: bool = setting(False, "Run the Python code that the model's repository brings.", panel="Model")
    allow_pickle: bool = setting(False, "Load pickled weights (.bin), which can run code, where there are no safetensors.", panel="Model")

    temperature: float | None = setting(1.0, "Of the answers: 0 for the likeliest; null leaves it to the endpoint.", panel="Generation", ge=0)
    top_p: float | None = setting(
        None, "Sample from the fewest tokens with this probability together; default: the endpoint's, 1 for a model.", panel="Generation", gt=0, le=1
    )
    max_new_tokens: int = setting(2048, "Tokens of an answer at most; a model that reasons first needs more.", panel="Generation", ge=1)

    ENDPOINT: ClassVar[frozenset[str]] = frozenset({"base_url", "concurrency", "retries", "request_timeout", "requests_per_minute", "tokens_per_minute"})
    """Settings that do nothing without ``llm``."""
    LOADED: ClassVar[frozenset[str]] = frozenset(
        {"revision", "engine", "asking", "compute_dtype", "tensor_parallel", "engine_arg", "trust_remote_code", "allow_pickle"}
        | {"actors", "gpus_per_actor", "cpus_per_actor", "ray_address"}
    )
    """Settings that do nothing without ``model``."""

    @model_validator(mode="after")
    def _check_generation(self) -> Self:
        if self.llm is None and (ignored := self.model_fields_set & self.ENDPOINT):
            raise ValueError(f"{named(ignored)}: for an endpoint; does nothing without llm")
        if self.model is None and (ignored := self.model_fields_set & self.LOADED):
            raise ValueError(f"{named(ignored)}: for a model that is loaded; does nothing without model")
        if self.model is not None and self.temperature is None:
            raise ValueError("temperature: null leaves it to an endpoint; a model that is loaded needs a number, 0 for the likeliest answer")
        if self.top_p is not None and self.temperature == 0:
            raise ValueError("top_p: does nothing at temperature 0; leave it out, or set temperature")
        refuse_owned(self.engine_args, OWNED_ENGINE_ARGS)
        for_vllm = {name for name, is_set in (("tensor_parallel", self.tensor_parallel > 1), ("engine_arg", bool(self.engine_arg))) if is_set}
        if self.engine == "transformers" and for_vllm:
            raise ValueError(f"{named(for_vllm)}: for vLLM; set engine vllm, or leave it out")
        if self.tensor_parallel > 1 and self.gpus_per_actor not in (None, self.tensor_parallel):
            raise ValueError(f"gpus_per_actor: tensor_parallel={self.tensor_parallel} takes as many GPUs for an actor; leave gpus_per_actor out")
        if self.engine == "vllm" and (self.gpus_per_actor or 0) > self.tensor_parallel:
            raise ValueError(f"gpus_per_actor: vLLM would use {self.tensor_parallel} of {self.gpus_per_actor:g} GPUs; set tensor_parallel instead")
        return self

    @property
    def engine_args(self) -> dict[str, Any]:
        """``engine_arg`` as a mapping. Raises ValueError."""
        return parse_engine_args(self.engine_arg)

    def cluster(self) -> ClusterSettings:
        """What the actors take of a cluster."""
        names = ("endpoint_url", "storage_options", "storage_retry_seconds", "model", "actors", "gpus_per_actor", "cpus_per_actor", "ray_address")
        return ClusterSettings.make({name: getattr(self, name) for name in (*names, "tensor_parallel")})


class GeneratorSettings(LLMSettings):
    """An LLM that answers every prompt, in the form that a prompt asks for."""

    structured: Literal["auto", "json_schema", "json_object", "none"] = setting(
        "auto",
        "What holds an answer to its JSON schema: json_schema all of it, json_object that it is an object, none nothing; auto is json_schema.",
        panel="Generation",
    )

    @model_validator(mode="after")
    def _check_asked(self) -> Self:
        if (self.llm is None) == (self.model is None):
            raise ValueError("llm or model, one of them, must be given: the model of an endpoint, or one to load")
        return self


def named(settings: frozenset[str] | set[str]) -> str:
    return ", ".join(sorted(settings))
