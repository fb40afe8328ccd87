"""The rates of a GPU and of what connects it, in one place."""

from __future__ import annotations

from typing import Any

from pydantic import Field

from ppcl.config.loading import Section
from ppcl.errors import UserError

# A device's memory that CUDA, NCCL and the gaps of an allocator leave.
USABLE = 0.9


class Device(Section):
    """An H100 SXM of 80 GB, 8 a node, one 400 Gb/s port a GPU: the vendor's rates, and the share reached."""

    name: str = Field("H100 SXM, 8 a node, 400 Gb/s a GPU", description="what the rates are of")
    flops: float = Field(989e12, gt=0, description="operations a second of dense bfloat16 products")
    sums: float = Field(
        67e12, gt=0, description="the same of the products that probes are fitted from: float32, no TF32"
    )
    memory: float = Field(3.35e12, gt=0, description="bytes a second of its memory")
    link: float = Field(450e9, gt=0, description="bytes a second to another GPU of its node, one way")
    network: float = Field(50e9, gt=0, description="bytes a second to a GPU of another node, one way")
    latency: float = Field(20e-6, ge=0, description="seconds until a message's first byte")
    storage: float = Field(5e9, gt=0, description="bytes a second that a node reads weights with")
    utilisation: float = Field(
        0.4,
        gt=0,
        le=1,
        description="assumed: share of flops and sums that is reached in a block, all its kernels counted",
    )
    reached: float = Field(0.8, gt=0, le=1, description="assumed: share of memory, link and network that is reached")
    overhead: float = Field(
        1.0,
        ge=1,
        description="assumed: a step over the sum of its parts; 0.91 on the CPU cores of benchmarks/scaling.py",
    )
    size: float = Field(80e9, gt=0, description="bytes of memory")
    node: int = Field(8, ge=1, description="GPUs a node")

    def between(self, a: int, b: int) -> float:
        """Bytes a second from one global rank to another."""
        return self.reached * (self.link if a // self.node == b // self.node else self.network)


# By name, what is different from an H100: the vendors' rates of dense products, memory and links.
_KINDS: dict[str, dict[str, Any]] = {
    "h100": {},
    "h200": {"name": "H200 SXM, 8 a node, 400 Gb/s a GPU", "memory": 4.8e12, "size": 141e9},
    "a100": {
        "name": "A100 SXM 80 GB, 8 a node, 200 Gb/s a GPU",
        "flops": 312e12,
        "sums": 19.5e12,
        "memory": 2.04e12,
        "link": 300e9,
        "network": 25e9,
    },
    "l40s": {
        "name": "L40S, 8 a node, PCIe 4, 100 Gb/s a GPU",
        "flops": 362e12,
        "sums": 91.6e12,
        "memory": 0.864e12,
        "link": 32e9,
        "network": 12.5e9,
        "size": 48e9,
    },
    "rtx4090": {
        "name": "RTX 4090, 8 a node, PCIe 4, 100 Gb/s a GPU",
        "flops": 165e12,
        "sums": 82.6e12,
        "memory": 1.01e12,
        "link": 32e9,
        "network": 12.5e9,
        "size": 24e9,
    },
}


def kinds() -> list[str]:
    return list(_KINDS)


def rates_of(kind: str) -> dict[str, Any]:
    """The rates of a kind of GPU that are not an H100's. Raises `UserError` for one that is not known."""
    if kind.lower() not in _KINDS:
        raise UserError(f"--device {kind!r} is not known; known are {', '.join(_KINDS)}; --set size=48e9 changes one")
    return dict(_KINDS[kind.lower()])
