"""GPUs that can be rented: what each computes, holds and costs. Figures of others, none measured here.

Invariant: each figure is of one GPU, and names where it is from. A price changes; its month stands beside it.
"""

from __future__ import annotations

from dataclasses import dataclass

from llmemb_ray.errors import ConfigError

PRICED = "2026-09"
"""Month of the prices below."""

CURRENCY = "USD"

PRICE_LIST = "AWS EC2 price list (Linux, on demand, us-east-1, USD)"
"""One list for all, so that the lines can be compared; what others ask for the same GPU differs by a factor of two and more."""


@dataclass(frozen=True, kw_only=True)
class Gpu:
    """bf16: dense bfloat16 tensor-core operations a second, without sparsity; memory: bytes; price: USD an hour."""

    name: str
    bf16: float
    memory: int
    price: float
    rate_from: str
    price_from: str
    """Instance, and its price for all its GPUs."""


GPUS = (
    Gpu(
        name="L4",
        bf16=121e12,
        memory=24 * 10**9,
        price=0.80,
        rate_from="NVIDIA L4 data sheet (242 with sparsity)",
        price_from="g6.xlarge 0.8048",
    ),
    Gpu(
        name="A10G",
        bf16=70e12,
        memory=24 * 10**9,
        price=1.01,
        rate_from="NVIDIA A10G data sheet (140 with sparsity); the A10 has 125",
        price_from="g5.xlarge 1.006",
    ),
    Gpu(
        name="A100",
        bf16=312e12,
        memory=80 * 10**9,
        price=3.43,
        rate_from="NVIDIA A100 80GB data sheet (624 with sparsity)",
        price_from="p4de.24xlarge 27.447 / 8",
    ),
    Gpu(
        name="H100",
        bf16=989e12,
        memory=80 * 10**9,
        price=6.88,
        rate_from="NVIDIA H100 SXM data sheet (1,979 with sparsity); the PCIe card has 756",
        price_from="p5.48xlarge 55.04 / 8",
    ),
    Gpu(
        name="H200",
        bf16=989e12,
        memory=141 * 10**9,
        price=7.91,
        rate_from="NVIDIA H200 SXM data sheet (1,979 with sparsity)",
        price_from="p5en.48xlarge 63.296 / 8",
    ),
    Gpu(
        name="B200",
        bf16=2250e12,
        memory=180 * 10**9,
        price=14.24,
        rate_from="NVIDIA HGX B200 data sheet (4,500 with sparsity); 180 of the chip's 192 GB are given to programs",
        price_from="p6-b200.48xlarge 113.933 / 8",
    ),
)


def find(name: str) -> Gpu:
    """The GPU of this name, in upper or lower case. Raises ConfigError."""
    for gpu in GPUS:
        if gpu.name.lower() == name.strip().lower():
            return gpu
    names = ", ".join(gpu.name for gpu in GPUS)
    raise ConfigError(f"gpu: {name!r} is not in the table ({names}); for another one give its measured throughput, and its price")
