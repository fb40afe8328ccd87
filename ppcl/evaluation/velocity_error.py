"""Velocity errors against the teacher, on calibration samples of validation or test: ‖v - v_T‖² / ‖v_T‖².

Everything is kept as sums of squares a sample, which add up exactly over batches and workers.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
import torch
from torch import nn

from ppcl.detection.surrogates import Surrogate
from ppcl.models import adapter_of, embed, head, run_blocks
from ppcl.replacements import Interval, Replacement
from ppcl.replacements.switcher import VariantSwitcher
from ppcl.search.error_model import ErrorModel

# Numbers that stand for the error of one sample where products of errors are wanted; see `error_sketch`.
SKETCH = 128
# Equal parts of the timesteps [0, 1] for which errors are reported apart.
BINS = 10


@dataclass(frozen=True)
class ErrorSums:
    """By sample, `(B,)` float64 on the CPU: timestep as the share of noise in [0, 1], ‖v - v_T‖² and ‖v_T‖².

    `sketch` `(B, SKETCH)` float32: of `v - v_T`, see `error_sketch`; `(B, 0)` where it was not asked for.
    """

    timestep: torch.Tensor
    error: torch.Tensor
    norm: torch.Tensor
    sketch: torch.Tensor

    @classmethod
    def of(
        cls, velocity: torch.Tensor, teachers: torch.Tensor, timestep: torch.Tensor, sketch: bool = False
    ) -> ErrorSums:
        v, t = velocity.double().flatten(1), teachers.double().flatten(1)
        error = v - t
        kept = error_sketch(error) if sketch else error[:, :0]
        return cls(timestep.double().cpu(), error.square().sum(1).cpu(), t.square().sum(1).cpu(), kept.float().cpu())

    @classmethod
    def joined(cls, parts: Iterable[ErrorSums]) -> ErrorSums:
        """The samples of all parts, in their order."""
        parts = list(parts)
        names = ("timestep", "error", "norm", "sketch")
        return cls(*(torch.cat([getattr(part, name) for part in parts]) for name in names))

    def of_samples(self, rows: torch.Tensor) -> ErrorSums:
        """The same of some samples, `rows` being their numbers; one may come more than once."""
        return ErrorSums(self.timestep[rows], self.error[rows], self.norm[rows], self.sketch[rows])

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


@lru_cache(maxsize=4)
def _signs(length: int, device: torch.device) -> torch.Tensor:
    """A random sign for each number of a velocity: the same ones everywhere."""
    generator = torch.Generator().manual_seed(0)
    return (torch.randint(2, (length,), generator=generator) * 2 - 1).to(device, torch.float64)


def error_sketch(error: torch.Tensor) -> torch.Tensor:
    """`(B, N)` to `(B, SKETCH)`, so that products of sketches are those of the errors, up to noise without bias.

    A count sketch: every number gets a random sign and is added to one of the places. The product of two errors `a` and
    `b` of one sample is off by about `‖a‖ ‖b‖ / √SKETCH`; the mean over `S` samples by `√S` times less.
    """
    signed = error * _signs(error.shape[1], error.device)
    signed = torch.nn.functional.pad(signed, (0, -error.shape[1] % SKETCH))
    return signed.unflatten(1, (-1, SKETCH)).sum(1)


def error_model(sums: Mapping[Replacement, ErrorSums]) -> ErrorModel:
    """The model that predicts plans, from the errors of replacements alone, on the same samples and with sketches."""
    sketches = torch.stack([one.sketch.flatten() for one in sums.values()]).double()
    products = sketches @ sketches.T
    # A replacement's own error is known without noise.
    products.diagonal().copy_(torch.stack([one.error.sum() for one in sums.values()]))
    norm = float(next(iter(sums.values())).norm.sum())
    return ErrorModel(list(sums), np.asarray(products / norm))


def resampled_models(sums: Mapping[Replacement, ErrorSums], count: int, seed: int) -> Iterator[ErrorModel]:
    """Error models of `count` bootstrap resamples of the samples, which are of prompts and timesteps."""
    rng = np.random.default_rng([seed, count])
    samples = len(next(iter(sums.values())).error)
    for _ in range(count):
        rows = torch.from_numpy(rng.integers(samples, size=samples))
        yield error_model({replacement: one.of_samples(rows) for replacement, one in sums.items()})


@torch.no_grad()
def sensitivities(
    transformer: nn.Module, switch: VariantSwitcher, inputs: Mapping[str, Any]
) -> dict[Replacement, ErrorSums]:
    """The velocity error of each replacement of the switcher alone, on one batch of the stock forward's arguments.

    With sketches of the errors, see `error_model`.

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
    teachers = head(transformer, run_blocks(adapter, blocks, streams, context, 0), inputs)
    sums = {}
    for block in range(len(blocks)):
        for replacement in starting.get(block, ()):
            block_map = switch.replacements(transformer, [replacement])
            behind = [block_map.get(b, blocks[b]) for b in range(block, len(blocks))]
            branch = run_blocks(adapter, behind, streams, context, block)
            sums[replacement] = ErrorSums.of(head(transformer, branch, inputs), teachers, timestep, sketch=True)
        streams = run_blocks(adapter, blocks[block : block + 1], streams, context, block)
    return {replacement: sums[replacement] for replacement in switch.files}


@torch.no_grad()
def surrogate_errors(
    transformer: nn.Module, surrogates: Mapping[Interval, Surrogate], inputs: Mapping[str, Any]
) -> dict[Interval, ErrorSums]:
    """The velocity error of each interval's surrogate alone, on one batch; see `ppcl.detection.surrogates`.

    The teacher runs once, and behind each interval again from what its surrogate makes: `(M - v) / M` of a forward
    for an interval that ends at block `v`. Memory: that of a forward. `transformer` is the teacher itself.
    """
    adapter = adapter_of(transformer)
    blocks = adapter.blocks(transformer)
    starting: dict[int, list[Interval]] = {}
    for interval in surrogates:
        starting.setdefault(interval.first, []).append(interval)
    streams, context = embed(transformer, inputs)
    timestep = inputs[adapter.timestep] / adapter.timestep_scale
    teachers = head(transformer, run_blocks(adapter, blocks, streams, context, 0), inputs)
    sums = {}
    for block in range(max(starting, default=-1) + 1):
        streams = run_blocks(adapter, blocks[block : block + 1], streams, context, block)
        for interval in starting.get(block, ()):
            rest = blocks[interval.last + 1 :]
            branch = run_blocks(adapter, rest, surrogates[interval](streams), context, interval.last + 1)
            sums[interval] = ErrorSums.of(head(transformer, branch, inputs), teachers, timestep, sketch=True)
    return sums


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
