"""LoRAs of the teacher on its variants."""

from ppcl.lora.apply import AppliedLora, Coverage, block_with_lora, merged, outside_with_lora, shares_on, with_lora
from ppcl.lora.lora_file import Lora, LoraLayer, read_lora

__all__ = [
    "AppliedLora",
    "Coverage",
    "Lora",
    "LoraLayer",
    "block_with_lora",
    "merged",
    "outside_with_lora",
    "read_lora",
    "shares_on",
    "with_lora",
]
