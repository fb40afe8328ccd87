"""Velocity errors against the teacher, on held-out calibration samples: ‖v - v_T‖² / ‖v_T‖².

Everything is kept as sums of squares a sample, which add up exactly over batches and workers.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from ppcl.models import architecture_of, embed, head, run_blocks
from ppcl.replacements.plan import Entry
from ppcl.replacements.switcher import Switch

# Equal parts of the way from noise to picture in which errors are told apart.
BINS = 10


@dataclass(frozen=True)
class Squares:
    """By sample, `(B,)` float64 on the CPU: the timestep as the share of noise in [0, 1], ‖v - v_T‖² and ‖v_T‖²."""

    timestep: torch.Tensor
    error: torch.Tensor
    norm: torch.Tensor

    @classmethod
    def of(cls, velocity: torch.Tensor, teachers: torch.Tensor, timestep: torch.Tensor) -> Squares:
        v, t = velocity.double().flatten(1), teachers.double().flatten(1)
        return cls(timestep.double().cpu(), (v - t).square().sum(1).cpu(), t.square().sum(1).cpu())

    @classmethod
    def joined(cls, parts: Iterable[Squares]) -> Squares:
        parts = list(parts)
        return cls(*(torch.cat([getattr(part, name) for part in parts]) for name in ("timestep", "error", "norm")))

    def overall(self) -> float:
        return float(self.error.sum() / self.norm.sum())

    def by_timestep(self) -> list[dict[str, float]]:
        """One row a bin that holds samples, from the picture to the noise: the mean timestep in it and its error."""
        bins = (self.timestep * BINS).long().clamp(0, BINS - 1)
        rows = []
        for index in range(BINS):
            here = bins == index
            if here.any():
                error = self.error[here].sum() / self.norm[here].sum()
                rows.append({"timestep": float(self.timestep[here].mean()), "error": float(error)})
        return rows


@torch.no_grad()
def damages(transformer: nn.Module, switch: Switch, inputs: Mapping[str, Any]) -> dict[Entry, Squares]:
    """The velocity error of each entry that the switch has, alone, on one batch of the stock forward's arguments.

    The teacher runs once; at its first block each entry branches off, and the teacher's blocks behind it finish its
    velocity, so no boundary is kept. `transformer` is the teacher itself.
    """
    architecture = architecture_of(transformer)
    blocks = architecture.blocks(transformer)
    starting: dict[int, list[Entry]] = {}
    for entry in switch.files:
        starting.setdefault(entry.first, []).append(entry)
    streams, context = embed(transformer, inputs)
    velocities = {}
    for block in range(len(blocks)):
        for entry in starting.get(block, ()):
            standing = switch.entries(transformer, [entry])
            behind = [standing.get(b, blocks[b]) for b in range(block, len(blocks))]
            branch = run_blocks(architecture, behind, streams, context)
            velocities[entry] = head(transformer, branch, inputs)
        streams = run_blocks(architecture, blocks[block : block + 1], streams, context)
    teachers = head(transformer, streams, inputs)
    timestep = inputs[architecture.timestep] / architecture.timestep_scale
    return {entry: Squares.of(velocities[entry], teachers, timestep) for entry in switch.files}


@torch.no_grad()
def variant_errors(
    transformer: nn.Module,
    switch: Switch,
    variants: Mapping[str, Sequence[Entry]],
    inputs: Mapping[str, Any],
) -> dict[str, Squares]:
    """The velocity error of whole variants on one batch, each run as the stock forward; the teacher is left plugged in."""
    architecture = architecture_of(transformer)
    timestep = inputs[architecture.timestep] / architecture.timestep_scale

    def velocity(plan: Sequence[Entry]) -> torch.Tensor:
        switch(transformer, plan)
        return transformer(**{**inputs, "return_dict": False})[0]

    teachers = velocity(())
    try:
        return {name: Squares.of(velocity(on), teachers, timestep) for name, on in variants.items()}
    finally:
        switch(transformer, ())
