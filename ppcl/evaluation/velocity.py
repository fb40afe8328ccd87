"""Velocity errors against the teacher, on held-out calibration samples: ‖v - v_T‖² / ‖v_T‖².

Everything is kept as sums of squares a sample, which add up exactly over batches and workers.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from ppcl.architecture import architecture_of, embed, head, run_blocks
from ppcl.plan import Interval
from ppcl.students import Student

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
def damages(
    transformer: nn.Module, students: Mapping[Interval, Student], inputs: Mapping[str, Any]
) -> dict[Interval, Squares]:
    """The velocity error of each interval alone, on one batch of the stock forward's arguments.

    The teacher runs once; at each `u` the student branches off and the teacher's blocks from `v + 1` on finish its
    velocity, so no boundary is kept. `transformer` is the teacher itself.
    """
    architecture = architecture_of(transformer)
    blocks = architecture.blocks(transformer)
    starting: dict[int, list[Interval]] = {}
    for interval in students:
        starting.setdefault(interval.first, []).append(interval)
    streams, context = embed(transformer, inputs)
    velocities = {}
    for block in range(len(blocks)):
        for interval in starting.get(block, ()):
            branch = students[interval].streams(streams, context)
            branch = run_blocks(architecture, blocks[interval.last + 1 :], branch, context)
            velocities[interval] = head(transformer, branch, inputs)
        streams = run_blocks(architecture, blocks[block : block + 1], streams, context)
    teachers = head(transformer, streams, inputs)
    timestep = inputs[architecture.timestep] / architecture.timestep_scale
    return {interval: Squares.of(velocities[interval], teachers, timestep) for interval in students}


@torch.no_grad()
def variant_errors(
    transformer: nn.Module,
    switch: Callable[[nn.Module, Sequence[Interval]], None],
    variants: Mapping[str, Sequence[Interval]],
    inputs: Mapping[str, Any],
) -> dict[str, Squares]:
    """The velocity error of whole variants on one batch, each run as the stock forward; the teacher is left plugged in."""
    architecture = architecture_of(transformer)
    timestep = inputs[architecture.timestep] / architecture.timestep_scale

    def velocity(intervals: Sequence[Interval]) -> torch.Tensor:
        switch(transformer, intervals)
        return transformer(**{**inputs, "return_dict": False})[0]

    teachers = velocity(())
    try:
        return {name: Squares.of(velocity(on), teachers, timestep) for name, on in variants.items()}
    finally:
        switch(transformer, ())
