"""The rates of a GPU and of what connects it, in one place."""

from __future__ import annotations

from pydantic import Field

from ppcl.config.loading import Section


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
