"""Which inputs of a linear map to keep, and what the map then is: a least-squares problem, solved in blocked products.

The map is `y = W x + b`, where `x` are hidden units. Taking unit `j` away costs least when the other units' columns of
`W` make up for it; with `G` the centred Gram matrix of the units, that least squared error is `‖w_j‖² / (G⁻¹)_jj`, and
the other columns change by `-w_j (G⁻¹)_kj / (G⁻¹)_jj` (the optimal brain surgeon of Hassibi and Stork 1993, for whole
units as in ZipLM, arXiv 2302.04089). Only `G` and the mean are needed: sums that add up exactly over batches and
workers.

Units leave in groups. Which ones is decided one unit at a time among a pool of the cheapest, which needs the pool's own
rows alone; what their leaving does to all others is one exact update, a product of matrices.

Inputs that can only leave together, such as those that an attention head gives, are the same problem: for a group `g`
the least squared error is `tr(W_g ((G⁻¹)_gg)⁻¹ W_gᵀ)`. Where groups leave several maps at once, their errors add up.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from ppcl.linalg.moments import Moments

# The share of the units left that leave together, and how many times as many are looked at for it.
_GROUP = 1 / 64
_POOL = 3
# Below this share of the mean diagonal a Gram matrix has no direction of its own, as far as float64 can tell.
_FLOOR = 1e-9
# How much the floor grows where the matrix cannot be factored all the same, and how often that is tried.
_GROWTH = 100.0
_TRIES = 5


@dataclass(frozen=True)
class PrunedUnits:
    """A linear map on the hidden units that stay.

    `units (k,)`: their numbers, ascending. `weight (q, k)`, `bias (q,)`: the map. `error`: its squared error a token,
    as a share of the variance of the whole map's output.
    """

    units: torch.Tensor
    weight: torch.Tensor
    bias: torch.Tensor
    error: float


@dataclass(frozen=True)
class FittedMap:
    """A linear map `weight (q, p)`, `bias (q,)`, and the moments of its inputs `(n, p)`."""

    moments: Moments
    weight: torch.Tensor
    bias: torch.Tensor


@dataclass(frozen=True)
class PrunedGroups:
    """The groups that stay, `(k,)` ascending, and each of the maps on their inputs."""

    groups: torch.Tensor
    maps: tuple[PrunedUnits, ...]


@torch.no_grad()
def eliminate_units(
    moments: Moments,
    weight: torch.Tensor,
    bias: torch.Tensor,
    widths: Iterable[int],
    ridge: float,
    on_progress: Callable[[float], None] = lambda share: None,
) -> dict[int, PrunedUnits]:
    """Take hidden units away down to each of `widths`, in one elimination, on the device of `moments`.

    `moments`: of the hidden units `(n, h)`; `weight (q, h)`, `bias (q,)`: the map; `ridge`: as a share of each unit's
    variance. `on_progress(share)`: called after each group of units, with the share of the work that is done, about.
    Cost: `O(h³ + h² q)` operations in products of matrices, for all widths together, in float64; memory
    `4 h² + 2 h q` numbers.
    """
    problem = _Problem.of(FittedMap(moments, weight, bias), ridge)
    gram, full = problem.gram, problem.full
    elimination = _Elimination(problem, full)
    results: dict[int, PrunedUnits] = {}
    for width in sorted(set(widths), reverse=True):
        # What is left to do falls with the cube of the units left.
        elimination.reduce_to(width, lambda left: on_progress(1 - (left / len(full)) ** 3))
        results[width] = problem.solution(elimination.units, bias.to(gram), moments.x_mean)
    return results


@torch.no_grad()
def eliminate_groups(
    maps: Sequence[FittedMap],
    size: int,
    counts: Iterable[int],
    ridge: float,
    on_progress: Callable[[float], None] = lambda share: None,
) -> dict[int, PrunedGroups]:
    """Take groups of `size` consecutive inputs away from all `maps` together, down to each of `counts` groups.

    One group leaves at a time: that whose leaving adds least to the sum of the maps' squared errors, each as a share of
    the variance of its output. All maps have the same number `p` of inputs. `ridge`, `on_progress`: as in
    `eliminate_units`. Cost: for each map `O(p³ + p² q)` operations in products of matrices, for all counts together, in
    float64; memory `4 p² + 2 p q` numbers, and twice `p²` for a moment.
    """
    problems = [_Problem.of(one, ridge) for one in maps]
    eliminations = [_Elimination(problem, problem.full) for problem in problems]
    weights = [1 / max(problem.variance, torch.finfo(torch.float64).tiny) for problem in problems]
    total = len(problems[0].full) // size
    groups = torch.arange(total, device=problems[0].full.device)
    results: dict[int, PrunedGroups] = {}
    for count in sorted(set(counts), reverse=True):
        while len(groups) > count:
            costs = sum(w * e.group_costs(size).to(groups.device) for w, e in zip(weights, eliminations, strict=True))
            assert isinstance(costs, torch.Tensor)
            place = int(costs.argmin())
            for elimination in eliminations:
                inputs = torch.arange(place * size, (place + 1) * size, device=elimination.units.device)
                elimination.remove(inputs)
            groups = torch.cat([groups[:place], groups[place + 1 :]])
            on_progress(1 - (len(groups) / total) ** 3)
        solved = (
            problem.solution(elimination.units, one.bias.to(problem.gram), one.moments.x_mean)
            for problem, elimination, one in zip(problems, eliminations, maps, strict=True)
        )
        results[count] = PrunedGroups(groups, tuple(solved))
    return results


class _Problem:
    """The least-squares problem: `gram (h, h)` with its ridge, the map's columns `full (h, q)`, and their product."""

    def __init__(self, gram: torch.Tensor, full: torch.Tensor, ridge: float):
        self.gram, self.full = gram, full
        self.image = gram @ full
        self.variance = float((full * self.image).sum())
        # A unit that never differs from its mean must not divide by nothing.
        self.floor = _FLOOR * float(gram.diagonal().mean()) + torch.finfo(torch.float32).tiny
        self.ridge = ridge * gram.diagonal()

    @classmethod
    def of(cls, one: FittedMap, ridge: float) -> _Problem:
        gram = one.moments.xx / max(1, one.moments.n)
        return cls(gram, one.weight.to(gram).T, ridge)

    def regularised(self, units: torch.Tensor) -> torch.Tensor:
        """The Gram matrix of some units, with the ridge."""
        sub = self.gram[units][:, units]
        sub.diagonal().add_(self.ridge[units] + self.floor)
        return sub

    def factor(self, units: torch.Tensor) -> torch.Tensor:
        """The Cholesky factor of the regularised Gram matrix of some units; the floor grows until there is one."""
        for _ in range(_TRIES):
            factor, failed = torch.linalg.cholesky_ex(self.regularised(units))
            if not failed:
                return factor
            self.floor *= _GROWTH
        raise ArithmeticError("the Gram matrix of a map's inputs cannot be factored")

    def solution(self, units: torch.Tensor, bias: torch.Tensor, mean: torch.Tensor) -> PrunedUnits:
        """The least-squares map on some units, solved anew: no rounding of the elimination is left in it."""
        columns = self.full[units]
        target = self.image[units] + (self.ridge[units] + self.floor)[:, None] * columns
        solved = torch.cholesky_solve(target, self.factor(units))
        within = self.gram[units][:, units] @ solved
        left = self.variance - 2 * float((solved * self.image[units]).sum()) + float((solved * within).sum())
        error = max(left, 0.0) / self.variance if self.variance > 0 else 0.0
        shift = mean @ self.full - mean[units] @ solved
        return PrunedUnits(units, solved.T.contiguous(), bias + shift, error)


class _Elimination:
    """The units left, `units (k,)` ascending, the inverse of their Gram matrix, and the columns as they now are."""

    def __init__(self, problem: _Problem, full: torch.Tensor):
        self.problem = problem
        self.units = torch.arange(len(full), device=full.device)
        self.inverse = torch.cholesky_inverse(problem.factor(self.units))
        self.columns = full.clone()

    def reduce_to(self, width: int, on_group: Callable[[int], None]) -> None:
        """Let units go, group after group, until `width` are left; `on_group(left)` is called after each."""
        while len(self.units) > width:
            count = min(max(1, int(len(self.units) * _GROUP)), len(self.units) - width)
            self.remove(self._cheapest(count))
            on_group(len(self.units))

    def _cheapest(self, count: int) -> torch.Tensor:
        """The places of `count` units, chosen one at a time among a pool of the cheapest."""
        diagonal = self.inverse.diagonal()
        if not bool((diagonal > 0).all()):
            self._renew()
            diagonal = self.inverse.diagonal()
        costs = self.columns.square().sum(1) / diagonal
        pool = costs.topk(min(_POOL * count, len(costs)), largest=False).indices
        columns = self.columns[pool]
        inverse, products = self.inverse[pool][:, pool].cpu().numpy(), (columns @ columns.T).cpu().numpy()
        return pool[torch.tensor(_one_by_one(inverse, products, count), device=pool.device)]

    def group_costs(self, size: int) -> torch.Tensor:
        """By group of `size` consecutive units of those left, the squared error that its leaving costs."""
        factors, failed = torch.linalg.cholesky_ex(self._own_blocks(size))
        if bool(failed.any()):
            self._renew()
            factors = torch.linalg.cholesky(self._own_blocks(size))
        columns = self.columns.unflatten(0, (-1, size))
        return torch.linalg.solve_triangular(factors, columns, upper=False).square().sum((1, 2))

    def _own_blocks(self, size: int) -> torch.Tensor:
        """The blocks on the diagonal of the inverse, `(groups, size, size)`."""
        blocks = self.inverse.unflatten(1, (-1, size)).unflatten(0, (-1, size))
        return blocks.diagonal(dim1=0, dim2=2).permute(2, 0, 1)

    def _renew(self) -> None:
        """Rounding has eaten the inverse up: it is made anew from the Gram matrix."""
        self.inverse = torch.cholesky_inverse(self.problem.factor(self.units))

    def remove(self, places: torch.Tensor) -> None:
        """Let the units at some places go at once: the others make up for them, and the inverse loses their rows."""
        stays = torch.ones(len(self.units), dtype=torch.bool, device=places.device)
        stays[places] = False
        factor = torch.linalg.cholesky(self.inverse[places][:, places])
        across = self.inverse[stays][:, places]
        self.columns = self.columns[stays] - across @ torch.cholesky_solve(self.columns[places], factor)
        self.inverse = self.inverse[stays][:, stays] - across @ torch.cholesky_solve(across.T, factor)
        self.units = self.units[stays]


def _one_by_one(inverse: np.ndarray, products: np.ndarray, count: int) -> list[int]:
    """The places of `count` units of a pool, the cheapest first, each with the others' columns made up before the next.

    `inverse (m, m)`: the pool's part of the inverse Gram matrix. `products (m, m)`: those of the pool's columns. Both
    are overwritten. Small matrices and a choice at every step: work for the CPU, whatever the device.
    """
    gone: list[int] = []
    for _ in range(count):
        costs = products.diagonal() / np.maximum(inverse.diagonal(), np.finfo(inverse.dtype).tiny)
        costs[gone] = np.inf
        place = int(costs.argmin())
        share = inverse[:, place] / max(inverse[place, place], np.finfo(inverse.dtype).tiny)
        inverse -= np.multiply.outer(share, inverse[place])
        products -= np.multiply.outer(share, products[place])
        products -= np.multiply.outer(products[:, place], share)
        gone.append(place)
    return gone
