"""The architecture layer: one record a family, and the stock forward taken apart at its block lists."""

from ppcl.architecture import flux, qwen_image, sd3  # noqa: F401  (importing registers the records)
from ppcl.architecture.forward import PassThrough, embed, head, run_blocks, swap, swapped
from ppcl.architecture.record import Architecture, Parts, Streams, architecture_of, supported

__all__ = [
    "Architecture",
    "Parts",
    "PassThrough",
    "Streams",
    "architecture_of",
    "embed",
    "head",
    "run_blocks",
    "supported",
    "swap",
    "swapped",
]
