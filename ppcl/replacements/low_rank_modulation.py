"""All modulations in the few directions in which the timestep moves their input.

A block's modulations are a linear map of `s = SiLU(temb)`. In Qwen-Image `temb` is a function of the timestep alone, a
smooth curve that lies in few dimensions, yet the maps are a third of a block's parameters. With `Q (d, k)` the curve's
directions and `m` its mean, `W s + b = (W Q) Qᵀ(s - m) + (W m + b)` but for what the curve has outside of `Q`: `W Q`
has `k / d` of the parameters. Where a model's `temb` depends on more than the timestep, `k` is larger.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol
from weakref import WeakKeyDictionary

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F

from ppcl.config import plan_syntax
from ppcl.models import IdentityBlock, adapter_of, embed
from ppcl.models.block_view import linear_at, view
from ppcl.models.lora_linear import LoraLinear
from ppcl.models.placement import cache_of
from ppcl.models.weight_cache import host_original
from ppcl.replacements.modulation import Modulation
from ppcl.replacements.replacement import Assembly, Replacement, TeacherStructure
from ppcl.replacements.student_block import StudentBlock
from ppcl.replacements.text_projectors import RunBlock, RunStart

if TYPE_CHECKING:
    from diffusers import ModelMixin

    from ppcl.models.teacher import Teacher
    from ppcl.replacements.parameter_counts import ParameterCounts

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

    def __init__(self, inner: nn.Module, basis: ModulationBasis):
        super().__init__()
        self.inner, self.basis = inner, basis

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.inner(self.basis.mean + self.basis.coordinates(x) @ self.basis.directions.T)


class ModulationBasis(nn.Module):
    """`directions (d, k)`, orthonormal, and `mean (d,)`, shared by all modulations."""

    directions: nn.Parameter
    mean: nn.Parameter

    def __init__(self, width: int, rank: int):
        super().__init__()
        self.directions = nn.Parameter(torch.zeros(width, rank), requires_grad=False)
        self.mean = nn.Parameter(torch.zeros(width), requires_grad=False)
        self._restricted: WeakKeyDictionary[nn.Module, nn.Linear] = WeakKeyDictionary()

    def coordinates(self, x: torch.Tensor) -> torch.Tensor:
        return (x - self.mean) @ self.directions

    def folded(self, module: nn.Module, paths: Sequence[str], device: torch.device | None = None) -> nn.Module:
        """A view of a block, or of its replacement, with the modulations at `paths` in low rank.

        `device`: where products are computed, if not where the weights are.
        """
        return view(module, {path: self._fold(module.get_submodule(path), device) for path in paths})

    def _fold(self, modulation: nn.Module, device: torch.device | None) -> nn.Module:
        linear = modulation.source if isinstance(modulation, Modulation) else modulation
        plain = linear.base_linear if isinstance(linear, LoraLinear) else linear_at(linear, "")
        if plain.weight.requires_grad:
            # What was multiplied out now would be wrong after the next step, and pass no gradient on.
            return OntoBasis(modulation, self)
        inner: nn.Linear | LoraLinear = self._restricted_once(plain, device)
        if isinstance(linear, LoraLinear):
            inner = linear.in_basis(inner, host_original(self.directions), host_original(self.mean))
        if isinstance(modulation, Modulation):
            return InBasis(Modulation(inner, modulation.width, modulation.constants), self)
        return InBasis(inner, self)

    def prepare(self, linears: Iterable[nn.Linear]) -> None:
        """Multiply modulations out now; of a sharded teacher that is possible only while their block is gathered."""
        for linear in linears:
            self._restricted_once(linear)

    def _restricted_once(self, linear: nn.Linear, device: torch.device | None = None) -> nn.Linear:
        # The products are the costly part, and the same in every variant.
        if linear not in self._restricted:
            self._restricted[linear] = self.restricted(linear, device)
        return self._restricted[linear]

    @torch.no_grad()
    def restricted(self, linear: nn.Linear, device: torch.device | None = None) -> nn.Linear:
        """A linear map as one of the coordinates, which is where that map is. `device`: where it is computed."""
        original = host_original(linear.weight)
        weight = original.to(device or original.device).float()
        directions, mean = (host_original(tensor).to(weight) for tensor in (self.directions, self.mean))
        inner = nn.Linear(directions.shape[1], weight.shape[0], device="meta")
        inner.weight = nn.Parameter((weight @ directions).to(original), requires_grad=False)
        bias = weight @ mean
        if linear.bias is not None:
            bias = bias + host_original(linear.bias).to(weight)
        inner.bias = nn.Parameter(bias.to(original), requires_grad=False)
        return inner


class Samples(Protocol):
    def batch(self, ids: Sequence[int] | np.ndarray, device: str, dtype: torch.dtype) -> dict: ...


@torch.no_grad()
def fit_basis(
    transformer: ModelMixin, samples: Samples, ids: np.ndarray, batch_size: int, error: float
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


@dataclass(frozen=True)
class LowRankModulation(Replacement[ModulationBasis]):
    """The modulations of all blocks, of students too, in low rank. Goes with everything."""

    label = "modulations"
    text_form = re.compile(plan_syntax.MODULATIONS)
    file_form = text_form
    # What the other kinds put into the blocks has modulations too.
    assembly_order = 2
    first = last = 0
    phrase = "the modulations"

    @property
    def blocks(self) -> range:
        """None of its own."""
        return range(0)

    def check(self, block_lists: Sequence[range]) -> None:
        """Every teacher has modulations."""

    def __str__(self) -> str:
        return "modulations"

    @property
    def name(self) -> str:
        return "modulations"

    @property
    def where(self) -> str:
        return "all"

    def empty_module(
        self, tensors: Mapping[str, torch.Tensor], metadata: Mapping[str, str], teacher: Teacher
    ) -> ModulationBasis:
        width, rank = tensors["directions"].shape
        return ModulationBasis(width, rank)

    def assemble(self, module: ModulationBasis, variant: Assembly) -> None:
        cache = cache_of(variant.structure.transformer)
        for number, block in enumerate(variant.structure.blocks):
            here = variant.standing.get(number, block)
            if not isinstance(here, IdentityBlock):
                # These hold the block that is modulated.
                inside = "block." if isinstance(here, StudentBlock | RunStart | RunBlock) else ""
                paths = [inside + where.modulation for where in variant.structure.parts(number).values()]
                variant.standing[number] = module.folded(here, paths, cache.device if cache else None)

    def parameters_removed(self, teacher: ParameterCounts, within: Replacement | None) -> int:
        return sum(sum(rows.values()) for rows in teacher.rows.values()) * teacher.parameters_per_row_saved()

    def least_brought(self, teacher: ParameterCounts, structure: TeacherStructure, student_keep: int) -> dict[str, int]:
        return {"directions": 0}
