"""Modulations of which some chunks are constants, and the names of the chunks."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import nn
from torch.distributed.tensor import DTensor
from torch.nn import functional as F

from ppcl.models.lora_linear import LoraLinear
from ppcl.models.weight_cache import host_original


class Modulation(nn.Module):
    """A modulation of which only some chunks are computed; the others are constants.

    Replaces the linear map `linear (p → chunks · d)` that a block cuts into chunks of its width. `constants` gives
    the value of each chunk that is not computed. The rows that are computed are views of the linear map's own; one in
    training stays whole, since its rows alone would get the gradient.
    """

    source: nn.Linear | LoraLinear

    def __init__(self, linear: nn.Linear | LoraLinear, width: int, constants: Mapping[int, float]):
        super().__init__()
        plain = linear.base_linear if isinstance(linear, LoraLinear) else linear
        trained = plain.weight.requires_grad and len(constants) < linear.out_features // width
        if trained:
            self.source = linear
        else:
            # Not a sub-module: its other rows are what is saved here.
            self.__dict__["source"] = linear
        self.width, self.chunks = width, linear.out_features // width
        self.constants = dict(constants)
        self.kept = nn.ModuleList()
        runs = _runs([c for c in range(self.chunks) if c not in constants])
        self.rows = [slice(first * width, (last + 1) * width) for first, last in runs]
        if trained or isinstance(plain.weight, DTensor):
            # Of a sharded one the rows are whole only while the block runs.
            return
        for rows in self.rows:
            part = nn.Linear(plain.in_features, rows.stop - rows.start, device="meta")
            weight, bias = host_original(plain.weight), host_original(plain.bias)
            part.weight = nn.Parameter(weight[rows], requires_grad=plain.weight.requires_grad)
            part.bias = nn.Parameter(bias[rows], requires_grad=plain.bias.requires_grad)
            self.kept.append(linear.rows(part, rows) if isinstance(linear, LoraLinear) else part)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """`(…, p)` to `(…, chunks · d)`, as the linear map itself."""
        computed = iter([chunk for part in self._computed(x) for chunk in part.split(self.width, -1)])
        constant = x.new_zeros(*x.shape[:-1], self.width)
        return torch.cat(
            [constant + self.constants[c] if c in self.constants else next(computed) for c in range(self.chunks)], -1
        )

    def _computed(self, x: torch.Tensor) -> list[torch.Tensor]:
        if self.kept or not self.rows:
            return [part(x) for part in self.kept]
        assert isinstance(self.source, nn.Linear)
        weight, bias = self.source.weight, self.source.bias
        return [F.linear(x, weight[rows], bias[rows]) for rows in self.rows]


def _runs(numbers: list[int]) -> list[tuple[int, int]]:
    """Consecutive numbers as (first, last) pairs."""
    runs: list[tuple[int, int]] = []
    for n in numbers:
        if runs and runs[-1][1] == n - 1:
            runs[-1] = (runs[-1][0], n)
        else:
            runs.append((n, n))
    return runs


# The chunks of a modulation, see `ppcl.models.BlockParts`.
SHIFT1, SCALE1, GATE1, SHIFT2, SCALE2, GATE2 = range(6)
