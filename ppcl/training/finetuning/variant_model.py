"""A transformer in which any plan can be plugged in, with replacements that are trained by gradient."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from ppcl.models import swap
from ppcl.models.teacher import Teacher
from ppcl.replacements import Replacement
from ppcl.replacements.switcher import VariantSwitcher


class _Checkpointed(nn.Module):
    """A block whose inner activations are recomputed in the backward pass instead of kept."""

    # Read by the stock SD3 forward between blocks.
    context_pre_only = False

    def __init__(self, block: nn.Module):
        super().__init__()
        self.block = block

    def forward(self, **arguments: Any) -> Any:
        return checkpoint(self.block, use_reentrant=False, **arguments)


class VariantModel:
    """The teacher's transformer, frozen, and the replacements from `files`, of which some can be trained."""

    def __init__(
        self,
        teacher: Teacher,
        files: Mapping[Replacement, Path],
        device: str,
        dtype: torch.dtype,
        activation_checkpointing: bool,
    ):
        self.adapter, self.device, self.dtype = teacher.adapter, device, dtype
        self.activation_checkpointing = activation_checkpointing
        self.transformer = teacher.transformer(device=device, dtype=dtype)
        self.switch = VariantSwitcher(teacher, files)

    def module(self, replacement: Replacement) -> nn.Module:
        return self.switch.module(replacement, self.transformer.device, self.dtype)

    def trained_parameters(self, replacements: Sequence[Replacement]) -> dict[str, nn.Parameter]:
        """Make replacements trainable; gives their parameters as `<replacement>.<parameter>`.

        They are trained in float32 whatever the teacher runs in; autocast brings both together.
        """
        parameters: dict[str, nn.Parameter] = {}
        for replacement in replacements:
            module = self.module(replacement).float().requires_grad_(True)
            parameters |= {f"{replacement.name}.{name}": p for name, p in module.named_parameters()}
        return parameters

    def velocity(self, plan: Sequence[Replacement], inputs: dict[str, Any], training: bool = False) -> torch.Tensor:
        """The velocity of the variant `plan`, shaped like the stock output; leaves the plan plugged in."""
        self.switch(self.transformer, plan)
        if training and self.activation_checkpointing:
            blocks = self.adapter.blocks(self.transformer)
            swap(self.transformer, {number: _Checkpointed(block) for number, block in enumerate(blocks)})
        bfloat16 = self.dtype is torch.bfloat16
        with torch.autocast(self.transformer.device.type, torch.bfloat16, enabled=bfloat16):
            return self.transformer(**{**inputs, "return_dict": False})[0]

    def unplug(self) -> None:
        """Leave the teacher itself."""
        self.switch(self.transformer, ())
