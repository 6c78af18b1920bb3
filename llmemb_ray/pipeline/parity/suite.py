"""What is compared with what, for one model with one adapter or none.

Invariant: vectors are held to bounds against one-by-one inference of the same weights only. Weights that are quantised are
others: they are held to their own one-by-one pass, and their distance to the unquantised model is stated without a bound.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
import numpy.typing as npt

from llmemb_ray import engines
from llmemb_ray.embedders.embedder import EmbedderSpec
from llmemb_ray.errors import ConfigError, LlmembError, ModelError
from llmemb_ray.pipeline.parity import comparison
from llmemb_ray.pipeline.parity.comparison import Comparison, compare, without_vector
from llmemb_ray.pipeline.parity.passes import Load, Order, Pass, Passes

ReferenceDtype = Literal["float32", "bfloat16"]

NOISE = "what the dtype alone changes"
QUANTISED = "quantised weights are other weights"


@dataclass(frozen=True, kw_only=True)
class Suite:
    """The engines to load for one comparison.

    reference: the unquantised model, one by one; None where the checkpoint holds quantised weights only
    noise:     the same in the configured compute dtype; None where that is the reference's
    own:       quantised weights of transformers, one by one (of vLLM's quantised weights the measured one-by-one pass is taken)
    measured:  the backends as configured
    left_out:  backend that is not measured -> why
    """

    reference: Load | None
    noise: Load | None
    own: Load | None
    measured: tuple[Load, ...]
    left_out: dict[str, str]
    configured: engines.Backend
    """The backend that a job would use: where it fails that is an error, where another does it is left out."""
    quantised: bool

    @classmethod
    def of(cls, spec: EmbedderSpec, *, gpu: bool, reference_dtype: ReferenceDtype = "float32") -> Suite:
        """The comparison of a spec that is settled for where it will run (``spec.on``). Raises ConfigError for a reference that tells nothing."""
        assert spec.backend != "auto"
        if reference_dtype != "float32" and spec.compute_dtype == "float32":
            raise ConfigError(f"reference_dtype: {reference_dtype} tells nothing of compute_dtype float32; leave it out")
        quantised = spec.quantization != "none" or spec.stored is not None
        hf = replace(spec, backend="hf", tensor_parallel=1, engine_args={})
        bare = replace(hf, quantization="none", compute_dtype=reference_dtype)
        reference = None if spec.stored else Load(spec=bare, plain=True, orders=("one by one",))
        noise = None
        if reference and reference_dtype == "float32" and spec.compute_dtype != "float32":
            noise = replace(reference, spec=replace(bare, compute_dtype=spec.compute_dtype))
        measured: list[Load] = []
        left_out: dict[str, str] = {}
        others: dict[engines.Backend, EmbedderSpec] = {"hf": hf, "vllm": replace(spec, backend="vllm")}
        for backend, title in engines.TITLES.items():
            why = None if backend == spec.backend else _refusal(spec, backend, gpu, quantised)
            if why is None:
                measured.append(Load(spec=spec if backend == spec.backend else others[backend]))
            else:
                left_out[title] = why
        return cls(
            reference=reference,
            noise=noise,
            own=Load(spec=hf, plain=True, orders=("one by one",)) if quantised and spec.backend == "hf" else None,
            measured=tuple(measured),
            left_out=left_out,
            configured=spec.backend,
            quantised=quantised,
        )


def _refusal(spec: EmbedderSpec, backend: engines.Backend, gpu: bool, quantised: bool) -> str | None:
    """Why the backend that is not configured cannot be measured; None where it is worth a try."""
    if quantised:
        return f"weights quantised so are made by {engines.TITLES[spec.backend]} alone"  # type: ignore[index]
    if backend == "hf":
        return None
    version = engines.vllm_version()
    if version is None:
        return "vLLM is not installed here"
    if version.endswith("+cpu") == gpu:
        return f"vLLM {version} is built for {'the CPU' if gpu else 'GPUs'}"
    pooling, layer = spec.representation.pooling, spec.representation.layer
    refused = engines.refusals("vllm", pooling=pooling, layer=layer, quantization="none", tensor_parallel=1, engine_args={})
    refused += engines.cannot_serve(spec.facts(), tensor_parallel=1)
    return refused[0].split(";")[0] if refused else None


@dataclass(frozen=True, kw_only=True)
class Measured:
    """What came of a suite.

    reference:  title of the one-by-one pass that everything unbounded is compared with; vectors: float32 [N, D], what it gave
    held_to:    title of the one-by-one pass that bounds are of
    rows:       int64 [M]  the rows compared: those that have a vector one by one
    lost:       row -> why it has none one by one
    noise:      the compute dtype against the reference
    quantised:  the quantised weights against the unquantised model
    seconds:    of all passes, loading included
    """

    reference: str
    held_to: str
    vectors: npt.NDArray[np.float32]
    rows: npt.NDArray[np.int64]
    lost: dict[int, str]
    noise: Comparison | None
    quantised: Comparison | None
    comparisons: list[Comparison]
    left_out: dict[str, str]
    device: str
    seconds: float


def measure(suite: Suite, run: Callable[[Load], Passes]) -> Measured:
    """Makes the passes of a suite, an engine after the other, and compares them.

    run: makes the passes of one load, always of the same rows. Raises what it raises for a reference or the configured backend.
    """
    everything: list[Passes] = []

    def passes_of(load: Load) -> dict[Order, Pass]:
        everything.append(run(load))
        return dict(everything[-1].by_order)

    # What would fail in the job fails first, before the reference has cost anything.
    of_job = {id(load): passes_of(load) for load in suite.measured if load.spec.backend == suite.configured}
    reference = passes_of(suite.reference)["one by one"] if suite.reference else None
    in_dtype = passes_of(suite.noise)["one by one"] if suite.noise else None
    own = passes_of(suite.own)["one by one"] if suite.own else None
    held_to = suite.own or suite.reference
    left_out = dict(suite.left_out)
    found: list[tuple[Load, dict[Order, Pass]]] = []
    for load in suite.measured:
        try:
            by_order = of_job[id(load)] if id(load) in of_job else passes_of(load)
        except LlmembError as error:
            left_out[engines.TITLES[load.spec.backend]] = str(error)  # type: ignore[index]
            continue
        if suite.quantised and own is None:
            own, held_to = by_order.pop("one by one"), load
        found.append((load, by_order))
    reference = reference or own
    own = own or reference
    assert reference is not None
    assert own is not None
    assert held_to is not None
    lost = without_vector(reference) | without_vector(own)
    rows = np.array([row for row in range(len(own.vectors)) if row not in lost], np.int64)
    if not len(rows):
        raise ModelError(f"{held_to.title}: gives no row a vector one by one; of the first: {lost[min(lost)]}; try another compute_dtype")
    noise = quantised = None
    if suite.noise and in_dtype:
        noise = compare(f"{suite.noise.title}, one by one", in_dtype, reference.vectors, rows, why_no_bound=NOISE)
    if suite.quantised and reference is not own:
        quantised = compare(f"{held_to.title}, one by one", own, reference.vectors, rows, why_no_bound=QUANTISED)
    device = everything[0].device
    comparisons = []
    for load, by_order in found:
        bound = comparison.bound_of(load.spec.compute_dtype, load.weights, device, noise.cosine if noise else None)
        exempt = comparison.EXEMPT.get(load.weights or "", "")
        comparisons += [compare(f"{load.title}, {order}", one, own.vectors, rows, bound=bound, why_no_bound=exempt) for order, one in by_order.items()]
    return Measured(
        reference=suite.reference.title if suite.reference else held_to.title,
        held_to=held_to.title,
        vectors=reference.vectors,
        rows=rows,
        lost=lost,
        noise=noise,
        quantised=quantised,
        comparisons=comparisons,
        left_out=left_out,
        device=device,
        seconds=sum(passes.seconds_load + passes.seconds for passes in everything),
    )
