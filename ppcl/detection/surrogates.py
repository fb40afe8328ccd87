"""Surrogates: what a student of an interval can be before any training, in closed form.

The surrogate of blocks `u..v` is the teacher's own block `u`, and behind it a residual affine map a stream, `x + W x +
b`, fitted by least squares from the streams behind block `u` to those behind block `v`. It is the closed-form start of
a student, without a copy of a block: `2 d²` numbers. Its velocity error tells which intervals are worth distilling.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file

from ppcl.detection.fit_probes import fit_tokens_file
from ppcl.linalg.affine_fit import Probe, fit_affine
from ppcl.linalg.moments import Moments
from ppcl.models import Streams
from ppcl.replacements import Interval

# First blocks whose intervals are measured together.
STARTS = 3


def candidate_intervals(block_ranges: Sequence[range], max_length: int) -> list[Interval]:
    """Every interval of two blocks to `max_length`, within a block list: about `(max_length - 1)` a block."""
    return [
        Interval(first, last)
        for span in block_ranges
        for first in span
        for last in range(first + 1, min(first + max_length, span.stop))
    ]


def by_start(intervals: Sequence[Interval]) -> list[list[Interval]]:
    """Groups of intervals that are measured together, `STARTS` first blocks each: they share the way to there."""
    starts = sorted({interval.first for interval in intervals})
    groups = [set(starts[i : i + STARTS]) for i in range(0, len(starts), STARTS)]
    return [[interval for interval in intervals if interval.first in group] for group in groups]


@dataclass(frozen=True)
class Surrogate:
    """The maps behind block `u`, by stream; a stream without one is passed on as it is.

    `underdetermined`: they were fitted on no more tokens than channels, so that the ridge decided.
    """

    maps: Mapping[str, Probe]
    underdetermined: bool

    def __call__(self, streams: Streams) -> Streams:
        """What is behind block `u` to what the interval makes."""
        mapped = {name: probe(getattr(streams, name)) for name, probe in self.maps.items()}
        return streams._replace(**mapped)


def fit_surrogates(
    folder: Path, first: int, lasts: Sequence[int], ridge: float, device: str, dtype: torch.dtype
) -> dict[Interval, Surrogate]:
    """The surrogates of the intervals that begin at block `first`, from the tokens in the folder of the probes.

    Cost, with `n` tokens and `L` intervals: `n d² (1 + L)` multiplications a stream and one factorisation, `O(d³)`:
    the Gram matrix is the same for all. Memory: `8 d² (2 + L)` bytes, and `4 n d (1 + L)`.
    """
    before = load_file(fit_tokens_file(folder, first + 1), device)
    behind = {last: load_file(fit_tokens_file(folder, last + 1), device) for last in lasts}
    maps: dict[int, dict[str, Probe]] = {last: {} for last in lasts}
    underdetermined = False
    for stream, x in before.items():
        # A last block may drop its text stream.
        there = [last for last in lasts if stream in behind[last]]
        if not there:
            continue
        x = x.float()
        moments = Moments(x.shape[1], x.shape[1] * len(there), device)
        moments.update(x, torch.cat([behind[last][stream].float() - x for last in there], 1))
        affine = fit_affine(moments, ridge)
        underdetermined |= affine.fit.underdetermined
        weights, biases = affine.weight.to(dtype).chunk(len(there)), affine.bias.to(dtype).chunk(len(there))
        for last, weight, bias in zip(there, weights, biases, strict=True):
            maps[last][stream] = Probe(weight, bias)
    return {Interval(first, last): Surrogate(maps[last], underdetermined) for last in lasts}
