"""Velocity errors against the teacher, on held-out calibration samples: ‖v - v_T‖² / ‖v_T‖².

Everything is kept as sums of squares a sample, which add up exactly over batches and workers.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from ppcl.models import adapter_of, embed, head, run_blocks
from ppcl.replacements import Replacement
from ppcl.replacements.switcher import VariantSwitcher

# Equal parts of the timesteps [0, 1] for which errors are reported apart.
BINS = 10


@dataclass(frozen=True)
class ErrorSums:
    """By sample, `(B,)` float64 on the CPU: timestep as the share of noise in [0, 1], ‖v - v_T‖² and ‖v_T‖²."""

    timestep: torch.Tensor
    error: torch.Tensor
    norm: torch.Tensor

    @classmethod
    def of(cls, velocity: torch.Tensor, teachers: torch.Tensor, timestep: torch.Tensor) -> ErrorSums:
        v, t = velocity.double().flatten(1), teachers.double().flatten(1)
        return cls(timestep.double().cpu(), (v - t).square().sum(1).cpu(), t.square().sum(1).cpu())

    @classmethod
    def joined(cls, parts: Iterable[ErrorSums]) -> ErrorSums:
        parts = list(parts)
        return cls(*(torch.cat([getattr(part, name) for part in parts]) for name in ("timestep", "error", "norm")))

    def overall(self) -> float:
        return float(self.error.sum() / self.norm.sum())

    def by_timestep(self) -> list[dict[str, float]]:
        """One row a bin that holds samples, from image to noise: its mean timestep and its error."""
        bins = (self.timestep * BINS).long().clamp(0, BINS - 1)
        rows = []
        for index in range(BINS):
            in_bin = bins == index
            if in_bin.any():
                error = self.error[in_bin].sum() / self.norm[in_bin].sum()
                rows.append({"timestep": float(self.timestep[in_bin].mean()), "error": float(error)})
        return rows


@torch.no_grad()
def sensitivities(
    transformer: nn.Module, switch: VariantSwitcher, inputs: Mapping[str, Any]
) -> dict[Replacement, ErrorSums]:
    """The velocity error of each replacement of the switcher alone, on one batch of the stock forward's arguments.

    The teacher runs twice, for its velocity and block by block; each replacement branches off at its first block, and
    the teacher's blocks behind it finish its velocity. So neither a boundary nor a replacement's velocity is kept.
    Cost: about half a forward a replacement. `transformer` is the teacher itself.
    """
    adapter = adapter_of(transformer)
    blocks = adapter.blocks(transformer)
    starting: dict[int, list[Replacement]] = {}
    for replacement in switch.files:
        starting.setdefault(replacement.first, []).append(replacement)
    streams, context = embed(transformer, inputs)
    timestep = inputs[adapter.timestep] / adapter.timestep_scale
    teachers = head(transformer, run_blocks(adapter, blocks, streams, context), inputs)
    sums = {}
    for block in range(len(blocks)):
        for replacement in starting.get(block, ()):
            block_map = switch.replacements(transformer, [replacement])
            behind = [block_map.get(b, blocks[b]) for b in range(block, len(blocks))]
            branch = run_blocks(adapter, behind, streams, context)
            sums[replacement] = ErrorSums.of(head(transformer, branch, inputs), teachers, timestep)
        streams = run_blocks(adapter, blocks[block : block + 1], streams, context)
    return {replacement: sums[replacement] for replacement in switch.files}


@torch.no_grad()
def variant_errors(
    transformer: nn.Module,
    switch: VariantSwitcher,
    variants: Mapping[str, Sequence[Replacement]],
    inputs: Mapping[str, Any],
) -> dict[str, ErrorSums]:
    """The velocity error of whole variants on one batch, each run as the stock forward; the teacher is left on."""
    adapter = adapter_of(transformer)
    timestep = inputs[adapter.timestep] / adapter.timestep_scale

    def velocity(plan: Sequence[Replacement]) -> torch.Tensor:
        switch(transformer, plan)
        return transformer(**{**inputs, "return_dict": False})[0]

    teachers = velocity(())
    try:
        return {name: ErrorSums.of(velocity(on), teachers, timestep) for name, on in variants.items()}
    finally:
        switch(transformer, ())
