"""Whether the engines give the vectors that one-by-one transformers inference gives, told before a job is paid for.

Invariant: nothing is compared that was not computed for it; what could not be compared is named with the reason. The bounds are
those of docs/guarantees.md.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import numpy as np

from llmemb_ray.config import EmbedSettings, ModelSettings, ParitySettings
from llmemb_ray.embedders import models
from llmemb_ray.embedders.embedder import EmbedderSpec, settle
from llmemb_ray.errors import CheckFailed, InputError, LlmembError
from llmemb_ray.pipeline import planning
from llmemb_ray.pipeline.parity import sample
from llmemb_ray.pipeline.parity.comparison import Comparison, compare
from llmemb_ray.pipeline.parity.passes import Load, Pass, Passes, Runner, Work
from llmemb_ray.pipeline.parity.processes import in_own_process
from llmemb_ray.pipeline.parity.sample import Sample
from llmemb_ray.pipeline.parity.suite import Measured, ReferenceDtype, Suite, measure
from llmemb_ray.pipeline.prepare import Job
from llmemb_ray.representation import Role
from llmemb_ray.shards.plan import Plan
from llmemb_ray.storage import Storage, absolute, redact
from llmemb_ray.written import masked

if TYPE_CHECKING:
    from llmemb_ray.pipeline.shape import Shape

PATH = "_llmemb/parity.json"

SEED = 0
"""Of the shuffled order, where none is given."""

NOWHERE = "parity"
"""Stands for OUTPUT where nothing is written."""

Say = Callable[[str], None]


NOISY = 0.03
"""1 − cosine between plain inference in the compute dtype and in float32 from which on the dtype itself is a finding."""


@dataclass(frozen=True, kw_only=True)
class Group:
    """The comparisons of one model with one adapter or none."""

    name: str
    """``with the adapter``, ``without the adapter``, or nothing where there is none."""
    measured: Measured


@dataclass(frozen=True, kw_only=True)
class Parity:
    """What was found. Raise with ``require`` if it is not well."""

    model: str
    adapter: str | None
    space: str
    engine: dict[str, Any]
    """Backend, compute dtype and weight quantisation, as a run's key holds them."""
    backend_why: str
    reference_dtype: str
    sample: Sample
    groups: list[Group]
    adapter_effect: Comparison | None
    """The adapter's model against the bare one, both one by one."""
    seed: int
    versions: dict[str, str]
    created: float
    settings: dict[str, Any] = field(default_factory=dict)
    """As given, secrets left out; only for the reader."""

    @property
    def comparisons(self) -> list[tuple[str, Comparison]]:
        """(group, pass against its reference) of everything that is held to a bound, or would be."""
        return [(group.name, comparison) for group in self.groups for comparison in group.measured.comparisons]

    @property
    def findings(self) -> list[str]:
        """What is not as it should be, a line each."""
        lines = []
        for group, found in self.comparisons:
            if found.passed:
                continue
            name = f"{found.name}{', ' + group if group else ''}"
            if found.missing:
                row, why = next(iter(sorted(found.missing.items())))
                lines.append(f"{name}: {len(found.missing)} rows have no vector there, {self.sample.names[row]!r} among them: {why}")
            else:
                assert found.bound is not None
                value = found.difference if found.bound.measure == "difference" else found.cosine
                at = f", furthest at {self.sample.names[found.furthest]!r}" if found.furthest is not None else ""
                lines.append(f"{name}: {found.bound.named} is {value:.2g}, the bound {found.bound.value:.2g} ({found.bound.why}){at}")
        for one in self.groups:
            noise = one.measured.noise
            if noise is not None and (noise.missing or noise.cosine > NOISY):
                what = f"{len(noise.missing)} rows have no vector" if noise.missing else f"1 − cosine is {noise.cosine:.2g}, above {NOISY:g}"
                lines.append(f"{noise.name}: {what}: the model does not bear this compute dtype, and no bound can be stated in it")
        if self.adapter_effect is not None and self.adapter_effect.difference == 0:
            lines.append(f"adapter {self.adapter}: changes no vector at all; it was not trained, or its weights are not applied")
        return lines

    @property
    def passed(self) -> bool:
        return not self.findings

    def require(self) -> None:
        """Raises CheckFailed with every finding."""
        if self.findings:
            raise CheckFailed("compared with one-by-one inference:\n" + "\n".join(f"  {line}" for line in self.findings))

    def to_dict(self) -> dict[str, Any]:
        """All of it but the vectors, fit for JSON."""
        groups = []
        for group in self.groups:
            found = group.measured
            groups.append(
                {
                    "name": group.name,
                    "reference": found.reference,
                    "held_to": found.held_to,
                    "rows": len(found.rows),
                    "lost": {self.sample.names[row]: why for row, why in found.lost.items()},
                    "noise": found.noise and found.noise.to_dict(),
                    "quantised": found.quantised and found.quantised.to_dict(),
                    "comparisons": [comparison.to_dict() for comparison in found.comparisons],
                    "left_out": found.left_out,
                    "device": found.device,
                    "seconds": round(found.seconds, 1),
                }
            )
        plain = {name: getattr(self, name) for name in ("model", "adapter", "space", "engine", "backend_why", "reference_dtype", "seed", "versions", "created")}
        return plain | {
            "passed": self.passed,
            "findings": self.findings,
            "source": self.sample.source,
            "rows": len(self.sample.prompts),
            "tokens": int(self.sample.prompts.lengths.sum()),
            "rejects": [dict(zip(("text", "reason", "detail"), reject, strict=True)) for reject in self.sample.rejects],
            "groups": groups,
            "adapter_effect": self.adapter_effect and self.adapter_effect.to_dict(),
            "settings": self.settings,
        }

    def save(self, storage: Storage) -> None:
        storage.put(PATH, json.dumps(self.to_dict(), indent=1, sort_keys=True).encode())

    def line(self) -> str:
        """The result in one line."""
        worst = max((found.cosine for _, found in self.comparisons), default=0.0)
        noises = [group.measured.noise.cosine for group in self.groups if group.measured.noise]
        noise = f", the dtype's own noise {max(noises):.1e}" if noises else ""
        compared = " and ".join(dict.fromkeys(found.name.split(",")[0] for _, found in self.comparisons))
        words = "within bounds" if self.passed else f"{len(self.findings)} findings"
        return f"{words}: {compared} on {self.sample.source}, 1 − cosine to {self.groups[0].measured.held_to} at most {worst:.1e}{noise}"


def parity(settings: ParitySettings, *, run: Runner = in_own_process, say: Say = lambda line: None) -> Parity:
    """Compares the engines on this machine, as a job with these settings would use them.

    run: makes the passes of one engine. Raises ConfigError, InputError, ModelError or EngineDied; nothing for what is found (``Parity.require``).
    """
    gpu = models.default_device() == "cuda"
    spec = settle(settings).on(gpu)
    rows = _corpus(settings, spec, gpu) if settings.input else sample.built_in(spec, settings.role, settings.sample)
    made = compared(spec, rows, settings.role, gpu=gpu, run=run, say=say, reference_dtype=settings.reference_dtype, seed=settings.seed)
    return replace(made, settings=_recorded(settings))


def of_job(settings: EmbedSettings, job: Job, plan: Plan, output: Storage, *, shape: Shape | None, gpu: bool, say: Say) -> Parity:
    """Compares the engines where the job will run, on a sample of its corpus, and keeps the result in OUTPUT.

    shape: what an actor takes of the cluster; None in this process. Raises CheckFailed beyond the bounds.
    """
    assert settings.check_parity is not None
    run: Runner = in_own_process
    if shape is not None:
        from llmemb_ray.pipeline.parity.cluster import Tasks

        run = Tasks(shape)
    rows = sample.of_corpus(job, plan, settings.check_parity)
    say(f"parity: {rows.source} are compared with plain float32 inference first")
    made = compared(job.spec, rows, job.role, gpu=gpu, run=run, say=lambda line: None)
    made = replace(made, settings=_recorded(settings))
    made.save(output)
    say(f"parity: {made.line()}; kept in {output.display(PATH)}")
    made.require()
    return made


def compared(
    spec: EmbedderSpec, rows: Sample, role: Role, *, gpu: bool, run: Runner, say: Say, reference_dtype: ReferenceDtype = "float32", seed: int = SEED
) -> Parity:
    """Compares the engines of a settled spec on some rows, an adapter's model also without it."""
    if not len(rows.prompts):
        raise InputError(f"of {rows.source} none makes a prompt: {rows.rejects[0][2] if rows.rejects else 'there are none'}")
    specs = {"with the adapter": spec, "without the adapter": replace(spec, adapter=None, lora_problem=None)} if spec.adapter else {"": spec}
    groups = []
    for name, one in specs.items():

        def passes(load: Load, name: str = name) -> Passes:
            say(f"{load.title}{', ' + name if name else ''}: {len(rows.prompts)} rows, {', '.join(load.orders)}")
            return run(Work(load=load, rows=rows.prompts, role=role, seed=seed))

        suite = Suite.of(one, gpu=gpu, reference_dtype=reference_dtype)
        try:
            groups.append(Group(name=name, measured=measure(suite, passes)))
        except LlmembError as error:
            if reference_dtype == "float32" and _is_memory(error):
                raise type(error)(f"{error}; a model too large for float32 is compared with: llmemb parity --reference-dtype bfloat16") from error
            raise
    return Parity(
        model=redact(spec.model.name),
        adapter=redact(spec.adapter.name) if spec.adapter else None,
        space=spec.space.digest,
        engine={"backend": spec.backend, "compute_dtype": spec.compute_dtype, "quantization": spec.quantization},
        backend_why=spec.backend_why,
        reference_dtype=reference_dtype,
        sample=rows,
        groups=groups,
        adapter_effect=_adapter_effect(*(group.measured for group in groups)) if spec.adapter else None,
        seed=seed,
        versions=planning.versions(),
        created=time.time(),
    )


def _adapter_effect(adapted: Measured, bare: Measured) -> Comparison:
    rows = [row for row in adapted.rows.tolist() if row not in bare.lost]
    found = Pass(vectors=adapted.vectors, failed={}, tokens=0, shared=0)
    return compare(f"{adapted.reference}, with and without the adapter", found, bare.vectors, np.array(rows, np.int64), why_no_bound="what the adapter changes")


def _corpus(settings: ParitySettings, spec: EmbedderSpec, gpu: bool) -> Sample:
    """A sample of INPUT, planned as a job would plan it; nothing is written. Raises InputError or ConfigError."""
    given = {name: getattr(settings, name) for name in settings.model_fields_set & EmbedSettings.model_fields.keys()}
    job_settings = EmbedSettings.make(given | {"output": NOWHERE})
    found, selection = planning.find(job_settings)
    plan = planning.make_plan(job_settings, spec, found, selection, actors=1, gpu=gpu)
    job = Job.of(plan, spec, Storage(absolute(NOWHERE)), settings.access)
    return sample.of_corpus(job, plan, settings.sample)


def _recorded(settings: ModelSettings) -> dict[str, Any]:
    return masked(settings.model_dump(mode="json", exclude={"storage_options"}))


def _is_memory(error: LlmembError) -> bool:
    return "out of memory" in str(error).lower()
