"""The architecture layer: one record a family, and the stock forward taken apart at its block lists."""

from ppcl.models import flux, qwen_image, sd3  # noqa: F401  (importing registers the records)
from ppcl.models.adapter import Architecture, Parts, Streams, architecture_of, supported
from ppcl.models.block_runner import PassThrough, embed, head, run_blocks, swap, swapped

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
