"""LoRAs of the teacher on its variants."""

from ppcl.lora.apply import (
    AppliedLora,
    Coverage,
    LoraTransfer,
    StudentUpdate,
    block_prefixes,
    block_with_lora,
    merged,
    outside_with_lora,
    shares_on,
    student_with_lora,
    with_lora,
)
from ppcl.lora.lora_file import Lora, LoraLayer, read_lora

__all__ = [
    "AppliedLora",
    "Coverage",
    "Lora",
    "LoraLayer",
    "LoraTransfer",
    "StudentUpdate",
    "block_prefixes",
    "block_with_lora",
    "merged",
    "outside_with_lora",
    "read_lora",
    "shares_on",
    "student_with_lora",
    "with_lora",
]
