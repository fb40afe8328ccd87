"""FFNs with fewer hidden units. Which ones stay, and what the second map then is, is a least-squares problem.

The FFN is `y = W φ(U x) + b`. Taking a hidden unit `j` away costs least when the other units' columns of `W` make up for
it; with `G` the centred Gram matrix of the hidden units over the calibration tokens, that least squared error is
`‖w_j‖² / (G⁻¹)_jj`, and the other columns change by `-w_j (G⁻¹)_kj / (G⁻¹)_jj` (the optimal brain surgeon of Hassibi and
Stork 1993, for whole units as in ZipLM, arXiv 2302.04089). Units go one by one, the cheapest first, so that one
elimination gives every width. Only `G` and the mean are needed: sums that add up exactly over batches and workers.

Not in the PPCL paper, which replaces an FFN by a linear map or not at all.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import nn

from ppcl.linalg import Moments
from ppcl.models import BlockParts, ModelAdapter
from ppcl.replacements.block_view import submodule


@dataclass(frozen=True)
class PrunedUnits:
    """`units (k,)`, the hidden units that stay, ascending; the second map `weight (q, k)`, `bias (q,)`; the squared error
    a token of the FFN's output, as a share of its variance."""

    units: torch.Tensor
    weight: torch.Tensor
    bias: torch.Tensor
    error: float


@torch.no_grad()
def eliminate_units(
    statistics: Moments, weight: torch.Tensor, bias: torch.Tensor, widths: Iterable[int], ridge: float
) -> dict[int, PrunedUnits]:
    """Take hidden units away down to each of `widths`.

    `statistics`: of the hidden units `(n, h)`; `weight (q, h)`, `bias (q,)`: the FFN's second map; `ridge`: as a share of
    each unit's variance.
    """
    device = statistics.xx.device
    mean, gram = statistics.x_mean, statistics.xx / max(1, statistics.n)
    hidden = gram.shape[0]
    w, before = weight.to(gram).T.clone(), weight.to(gram).T
    spread = float((before * (gram @ before)).sum())
    # A unit that never differs from its mean must not divide by nothing.
    floor = 1e-9 * float(gram.diagonal().mean()) + torch.finfo(torch.float32).tiny
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(gram + torch.diag(ridge * gram.diagonal() + floor)))
    alive = torch.ones(hidden, dtype=torch.bool, device=device)
    made: dict[int, PrunedUnits] = {}
    wanted = sorted(set(widths), reverse=True)
    for left in range(hidden, wanted[-1] - 1, -1):
        if left in wanted:
            units = alive.nonzero().flatten()
            change = w - before
            error = float((change * (gram @ change)).sum()) / spread if spread > 0 else 0.0
            made[left] = PrunedUnits(units, w[units].T.contiguous(), bias.to(mean) - change.T @ mean, error)
        if left == wanted[-1]:
            return made
        diagonal = inverse.diagonal()
        costs = torch.where(alive, w.square().sum(1) / diagonal, torch.inf)
        unit = int(costs.argmin())
        column = inverse[:, unit] / diagonal[unit]
        w -= torch.outer(column, w[unit])
        inverse -= torch.outer(column, inverse[unit].clone())
        alive[unit] = False
        # Exactly nothing from here on, and a diagonal to divide by.
        w[unit], inverse[unit], inverse[:, unit], inverse[unit, unit] = 0, 0, 0, 1
    raise AssertionError("unreachable")


class PrunedFfn(nn.Module):
    """By stream, the two linear maps of one block's FFN with fewer hidden units between them."""

    def __init__(self, maps: Mapping[str, tuple[nn.Linear, nn.Linear]]):
        super().__init__()
        self.up = nn.ModuleDict({stream: up for stream, (up, _) in maps.items()})
        self.down = nn.ModuleDict({stream: down for stream, (_, down) in maps.items()})

    @classmethod
    def new(cls, adapter: ModelAdapter, block: nn.Module, parts: Mapping[str, BlockParts], kept: int) -> PrunedFfn:
        """With the first units of the block's own; `kept`: percent of them, rounded, at least one."""
        maps = {}
        for stream, where in parts.items():
            up, down = (submodule(block, f"{where.ffn}.{name}") for name in (adapter.ffn_up, adapter.ffn_down))
            units = torch.arange(max(1, round(up.out_features * kept / 100)))
            maps[stream] = _of(up, units), _linear(down.weight[:, units], down.bias)
        return cls(maps)

    @torch.no_grad()
    def set(self, stream: str, up: nn.Linear, made: PrunedUnits) -> None:
        """Take the units of the block's own first map `up`, and the second map that belongs to them."""
        new = self.up[stream], self.down[stream]
        for mine, made_of in zip(
            new, (_of(up, made.units.to(up.weight.device)), _linear(made.weight, made.bias)), strict=True
        ):
            mine.weight.copy_(made_of.weight)
            mine.bias.copy_(made_of.bias)


def pruned_parts(adapter: ModelAdapter, parts: Mapping[str, BlockParts], maps: PrunedFfn) -> dict[str, nn.Module]:
    """What to put where in a block, for the streams of `parts`: the two maps, with the stock FFN around them."""
    placed: dict[str, nn.Module] = {}
    for stream, where in parts.items():
        placed[f"{where.ffn}.{adapter.ffn_up}"] = maps.up[stream]
        placed[f"{where.ffn}.{adapter.ffn_down}"] = maps.down[stream]
    return placed


def _of(linear: nn.Linear, units: torch.Tensor) -> nn.Linear:
    return _linear(linear.weight[units], linear.bias[units])


def _linear(weight: torch.Tensor, bias: torch.Tensor) -> nn.Linear:
    made = nn.Linear(weight.shape[1], weight.shape[0], device="meta")
    made.weight, made.bias = nn.Parameter(weight.detach().clone()), nn.Parameter(bias.detach().clone())
    return made
