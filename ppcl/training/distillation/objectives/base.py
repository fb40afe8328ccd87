"""What an objective is: what of the teacher it needs, where it starts in closed form, and what its losses are."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from enum import Enum
from typing import ClassVar

import torch
from torch import nn

from ppcl.linalg import (
    Affine,
    FittedMap,
    Moments,
    PrunedGroups,
    PrunedUnits,
    eliminate_groups,
    eliminate_units,
    fit_affine,
)
from ppcl.models import ModelAdapter, Parts
from ppcl.replacements.replacement import Replacement
from ppcl.training.captured import CapturedActivations, CaptureSpec
from ppcl.training.losses import Loss, LossTerm

# The moments' name, the tokens `(n, p)` that are read, and those `(n, q)` that are predicted from them.
MomentUpdate = tuple[str, torch.Tensor, torch.Tensor]


class Solutions:
    """The least-squares problems of some objectives, each solved when it is first asked for.

    `widths`: by elimination, all numbers of units or heads that objectives keep: one elimination gives them all. Of
    hidden units it is called by their moments' name.
    """

    def __init__(
        self,
        moments: dict[str, Moments],
        ridge: float,
        widths: Mapping[str, Iterable[int]],
        on_progress: Callable[[float], None] = lambda done: None,
    ):
        """`on_progress(done)`: called often during eliminations; 2.5: two eliminations and half of the third."""
        self.moments, self.ridge, self.widths, self.on_progress = moments, ridge, widths, on_progress
        self._pruned: dict[str, dict[int, PrunedUnits]] = {}
        self._heads: dict[str, dict[int, PrunedGroups]] = {}

    def affine(self, name: str) -> Affine:
        """The affine map that the moments give."""
        return fit_affine(self.moments[name], self.ridge)

    def pruned(self, name: str, linear: nn.Linear, width: int) -> PrunedUnits:
        """`linear` on `width` of the hidden units whose moments these are; the moments are dropped then."""
        if name not in self._pruned:
            weight, bias = linear.weight.detach(), linear.bias.detach()
            moments, before = self.moments.pop(name), self._eliminations
            self._pruned[name] = eliminate_units(
                moments, weight, bias, self.widths[name], self.ridge, lambda share: self.on_progress(before + share)
            )
            self.on_progress(before + 1)
        return self._pruned[name][width]

    def heads(self, name: str, linears: Mapping[str, nn.Linear], size: int, count: int) -> PrunedGroups:
        """`linears`, by their inputs' moments, on what `count` heads give; the moments are dropped then.

        `size`: how many inputs come from a head. `name`: that of the elimination.
        """
        if name not in self._heads:
            before = self._eliminations
            maps = [
                FittedMap(
                    self.moments.pop(moments),
                    linear.weight.detach(),
                    linear.weight.new_zeros(linear.out_features) if linear.bias is None else linear.bias.detach(),
                )
                for moments, linear in linears.items()
            ]
            self._heads[name] = eliminate_groups(
                maps, size, self.widths[name], self.ridge, lambda share: self.on_progress(before + share)
            )
            self.on_progress(before + 1)
        return self._heads[name][count]

    @property
    def _eliminations(self) -> int:
        """How many are done."""
        return len(self._pruned) + len(self._heads)


class Gradient(Enum):
    """Whether an objective is trained by gradient."""

    NEEDED = "needed"  # the initialisation is a start
    OPTIONAL = "optional"  # the initialisation is the least-squares optimum of the map alone
    NONE = "none"  # there are no losses


@dataclass(frozen=True)
class TeacherBlocks:
    """The teacher's own blocks that objectives are made from.

    `blocks`: by number, those of the replacement at least. `count`: how many the whole teacher has. `transformer`:
    tells where the parts of a block are; its weights are not read.
    """

    adapter: ModelAdapter
    transformer: nn.Module
    blocks: Mapping[int, nn.Module]
    count: int

    def parts(self, number: int) -> dict[str, Parts]:
        """By stream, the replaceable parts of a block."""
        return self.adapter.parts_of(self.transformer, number, self.blocks[number])

    def width(self, number: int) -> int:
        """`d`, the width of the streams."""
        return self.adapter.width(self.blocks[number])


class DistillationObjective(ABC):
    """What every replacement has: a module, and a closed-form initialisation of it.

    `capture`: what its losses are computed from; `init_capture`: what its closed-form initialisation is computed from.
    `gradient`: whether it needs training by gradient, is at its optimum without it, or has no losses at all.
    """

    gradient: ClassVar[Gradient]
    replacement: Replacement
    module: nn.Module
    capture: CaptureSpec
    init_capture: CaptureSpec

    @abstractmethod
    def moments(self) -> dict[str, tuple[int, int]]:
        """The moments that the initialisation is computed from: by name, `p` and `q`. Objectives may share some."""

    @abstractmethod
    def updates(self, captured: CapturedActivations) -> Iterator[MomentUpdate]:
        """What one batch adds to the moments."""

    def kept_units(self) -> dict[str, int]:
        """By elimination, how many hidden units or heads the module keeps; see `Solutions.widths`."""
        return {}

    @abstractmethod
    def initialize(self, solutions: Solutions) -> None:
        """Set the module to its closed-form initialisation."""


class GradientObjective(DistillationObjective):
    """An objective that gradient descent can improve after its initialisation."""

    @abstractmethod
    def losses(self, captured: CapturedActivations, loss_of: Loss) -> Mapping[str, LossTerm]:
        """The losses by name, which add up; `loss_of` compares a block's output with the teacher's."""


class LeastSquaresObjective(GradientObjective):
    """An objective whose closed form is one least-squares fit for each linear map."""

    @abstractmethod
    def linears(self) -> dict[str, nn.Linear]:
        """The maps that start in closed form, by name."""

    @abstractmethod
    def pairs(self, captured: CapturedActivations) -> Iterator[MomentUpdate]:
        """By the maps' names."""

    def moments(self) -> dict[str, tuple[int, int]]:
        return {
            f"{self.replacement.name}.{name}": (linear.in_features, linear.out_features)
            for name, linear in self.linears().items()
        }

    def updates(self, captured: CapturedActivations) -> Iterator[MomentUpdate]:
        for name, x, y in self.pairs(captured):
            yield f"{self.replacement.name}.{name}", x, y

    @torch.no_grad()
    def initialize(self, solutions: Solutions) -> None:
        for name, linear in self.linears().items():
            solved = solutions.affine(f"{self.replacement.name}.{name}")
            linear.weight.copy_(solved.weight)
            linear.bias.copy_(solved.bias)
