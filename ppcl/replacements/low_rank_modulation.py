"""Folding: all modulations in the few directions in which the timestep moves their input.

A block's modulations are a linear map of `s = SiLU(temb)`. In Qwen-Image `temb` is a function of the timestep alone, a
smooth curve that lies in few dimensions, yet the maps are a third of a block's parameters. With `Q (d, k)` the curve's
directions and `m` its mean, `W s + b = (W Q) Qᵀ(s - m) + (W m + b)` but for what the curve has outside of `Q`: `W Q` has
`k / d` of the parameters. Where a model's `temb` depends on more than the timestep, `k` is larger.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol
from weakref import WeakKeyDictionary

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F

from ppcl.models import adapter_of, embed
from ppcl.replacements.block_view import Modulation, submodule, view

# Timesteps at which the curve is looked at: far more than it has dimensions.
_PLACES = 2048


class InBasis(nn.Module):
    """A map behind a basis: `inner` reads the `k` coordinates of what is given, `(…, d) → (…, q)`."""

    def __init__(self, inner: nn.Module, basis: ModulationBasis):
        super().__init__()
        self.inner, self.basis = inner, basis

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.inner(self.basis.coordinates(x))


class OntoBasis(nn.Module):
    """The same for a map that is still being trained: `inner` itself, of what the basis keeps of its input."""

    def __init__(self, inner: nn.Linear, basis: ModulationBasis):
        super().__init__()
        self.inner, self.basis = inner, basis

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.inner(self.basis.mean + self.basis.coordinates(x) @ self.basis.directions.T)


class ModulationBasis(nn.Module):
    """`directions (d, k)`, orthonormal, and `mean (d,)`, shared by all modulations."""

    def __init__(self, width: int, rank: int):
        super().__init__()
        self.directions = nn.Parameter(torch.zeros(width, rank), requires_grad=False)
        self.mean = nn.Parameter(torch.zeros(width), requires_grad=False)
        self._folded: WeakKeyDictionary[nn.Module, nn.Module] = WeakKeyDictionary()

    def coordinates(self, x: torch.Tensor) -> torch.Tensor:
        return (x - self.mean) @ self.directions

    def folded(self, module: nn.Module, paths: Sequence[str]) -> nn.Module:
        """A view of a block, or of what stands for one, with the modulations at `paths` folded."""
        return view(module, {path: self._fold(submodule(module, path)) for path in paths})

    def _fold(self, modulation: nn.Module) -> InBasis | OntoBasis:
        source = modulation.source if isinstance(modulation, Modulation) else modulation
        if source.weight.requires_grad:
            # What was multiplied out now would be wrong after the next step, and pass no gradient on.
            return OntoBasis(modulation, self)
        if isinstance(modulation, Modulation):
            return InBasis(Modulation(self._fold(source).inner, modulation.width, modulation.constants), self)
        # The products are the costly part, and the same in every variant.
        if modulation not in self._folded:
            self._folded[modulation] = InBasis(self.restricted(modulation), self)
        return self._folded[modulation]

    @torch.no_grad()
    def restricted(self, linear: nn.Linear) -> nn.Linear:
        """A linear map as one of the coordinates."""
        weight = linear.weight.float()
        directions, mean = self.directions.to(weight), self.mean.to(weight)
        inner = nn.Linear(directions.shape[1], weight.shape[0], device="meta")
        inner.weight = nn.Parameter((weight @ directions).to(linear.weight.dtype), requires_grad=False)
        bias = weight @ mean + (0 if linear.bias is None else linear.bias.float())
        inner.bias = nn.Parameter(bias.to(linear.weight.dtype), requires_grad=False)
        return inner


class Samples(Protocol):
    def batch(self, ids: Sequence[int], device: str, dtype: torch.dtype) -> dict: ...


@torch.no_grad()
def fit_basis(
    transformer: nn.Module, samples: Samples, ids: np.ndarray, batch_size: int, error: float
) -> ModulationBasis:
    """The fewest directions that leave at most the share `error` of the variance of `SiLU(temb)`.

    The variance is that over the prompts of the samples `ids` and timesteps spread evenly over all there are.
    """
    adapter = adapter_of(transformer)
    scale = adapter.timestep_scale
    seen = []
    for start in range(0, _PLACES, batch_size):
        rows = ids[(start + np.arange(min(batch_size, _PLACES - start))) % len(ids)]
        inputs = samples.batch(rows, transformer.device, transformer.dtype)
        places = (start + torch.arange(len(rows))) / (_PLACES - 1)
        inputs[adapter.timestep] = (places * scale).to(inputs[adapter.timestep])
        _, context = embed(transformer, inputs)
        seen.append(F.silu(context[adapter.temb]).double().cpu())
    s = torch.cat(seen)
    mean = s.mean(0)
    _, values, directions = torch.linalg.svd(s - mean, full_matrices=False)
    energy = values.square()
    left = 1 - energy.cumsum(0) / energy.sum().clamp_min(1e-300)
    rank = min(int((left > error).sum()) + 1, len(values))
    basis = ModulationBasis(s.shape[1], rank)
    basis.directions.copy_(directions[:rank].T)
    basis.mean.copy_(mean)
    return basis
