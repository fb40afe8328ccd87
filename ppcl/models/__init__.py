"""The adapter layer: one record per family, and the stock forward in parts."""

from ppcl.models import (  # noqa: F401  (importing registers the records)
    aura_flow,
    cogview4,
    flux,
    flux2,
    hunyuan,
    next_dit,
    one_stream,
    qwen_image,
    sd3,
    wan,
)
from ppcl.models.adapter import (
    BlockParts,
    FusedParts,
    ModelAdapter,
    Parts,
    Streams,
    adapter_of,
    check_calibration,
    check_record,
    records,
    supported,
)
from ppcl.models.block_layout import BlockLayout, Context
from ppcl.models.block_runner import IdentityBlock, embed, head, run_blocks, show_processor, swap, swapped

__all__ = [
    "ModelAdapter",
    "BlockLayout",
    "BlockParts",
    "FusedParts",
    "Context",
    "IdentityBlock",
    "Parts",
    "Streams",
    "adapter_of",
    "check_calibration",
    "check_record",
    "embed",
    "head",
    "records",
    "run_blocks",
    "show_processor",
    "supported",
    "swap",
    "swapped",
]
