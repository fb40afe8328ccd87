"""A view of a block: the same parameters by reference, some of its sub-modules exchanged, its stock forward untouched.

The teacher's own block never changes, so a variant is a choice between a block and its views.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import cast

import torch
from torch import nn
from torch.distributed.tensor import DTensor
from torch.nn import functional as F

from ppcl.models.weight_cache import host_original


def view(block: nn.Module, parts: Mapping[str, nn.Module]) -> nn.Module:
    """A shallow copy of a block with modules put at `parts`, paths such as `attn.to_add_out`; shares all others."""
    made = _shallow(block)
    copied = {"": made}
    for path, module in parts.items():
        *parents, name = path.split(".")
        here, so_far = made, ""
        for parent in parents:
            so_far = f"{so_far}.{parent}"
            if so_far not in copied:
                copied[so_far] = here._modules[parent] = _shallow(here._modules[parent])
            here = copied[so_far]
        if name not in here._modules:
            raise KeyError(f"{type(block).__name__} has no {path}")
        here._modules[name] = module
    return made


def linear_at(module: nn.Module, path: str) -> nn.Linear:
    """The linear map at a path, or its replacement. Raises `AttributeError` where nothing is there."""
    # Quantised and low-rank maps are no `nn.Linear`, but have its attributes.
    return cast(nn.Linear, module.get_submodule(path))


def _shallow(module: nn.Module | None) -> nn.Module:
    if module is None:
        raise KeyError("a path leads through a sub-module that the block leaves out")
    # Not `copy.copy`: the class of a sharded module would construct a new one.
    made = object.__new__(type(module))
    made.__dict__.update(module.__dict__)
    # nn.Module's copy shares these dictionaries, and the original would change with the view.
    made._modules, made._parameters, made._buffers = (
        dict(module._modules),
        dict(module._parameters),
        dict(module._buffers),
    )
    return made


class Modulation(nn.Module):
    """A modulation of which only some chunks are computed; the others are constants.

    Replaces the linear map `linear (p → chunks · d)` that a block cuts into chunks of its width. `constants` gives
    the value of each chunk that is not computed. The rows that are computed are views of the linear map's own.
    """

    source: nn.Linear

    def __init__(self, linear: nn.Linear, width: int, constants: Mapping[int, float]):
        super().__init__()
        # Not a sub-module: its other rows are what is saved here.
        self.__dict__["source"] = linear
        self.width, self.chunks = width, linear.weight.shape[0] // width
        self.constants = dict(constants)
        self.kept = nn.ModuleList()
        runs = _runs([c for c in range(self.chunks) if c not in constants])
        self.rows = [slice(first * width, (last + 1) * width) for first, last in runs]
        if isinstance(linear.weight, DTensor):
            # The rows are whole only while the block runs.
            return
        for (first, last), rows in zip(runs, self.rows, strict=True):
            part = nn.Linear(linear.weight.shape[1], (last + 1 - first) * width, device="meta")
            weight, bias = host_original(linear.weight), host_original(linear.bias)
            part.weight = nn.Parameter(weight[rows], requires_grad=linear.weight.requires_grad)
            part.bias = nn.Parameter(bias[rows], requires_grad=linear.bias.requires_grad)
            self.kept.append(part)

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
