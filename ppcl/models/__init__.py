"""The adapter layer: one record per family, and the stock forward in parts."""

from ppcl.models import flux, qwen_image, sd3  # noqa: F401  (importing registers the records)
from ppcl.models.adapter import BlockParts, FusedParts, ModelAdapter, Parts, Streams, adapter_of, supported
from ppcl.models.block_runner import IdentityBlock, embed, head, run_blocks, swap, swapped

__all__ = [
    "ModelAdapter",
    "BlockParts",
    "FusedParts",
    "IdentityBlock",
    "Parts",
    "Streams",
    "adapter_of",
    "embed",
    "head",
    "run_blocks",
    "supported",
    "swap",
    "swapped",
]
