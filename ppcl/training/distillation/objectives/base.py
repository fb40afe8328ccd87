"""What an objective is: what of the teacher it needs, where it starts in closed form, and what its losses are."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from enum import Enum
from typing import ClassVar

import torch
from torch import nn

from ppcl.linalg import Moments, fit_affine
from ppcl.models import BlockParts, ModelAdapter
from ppcl.replacements.replacement import Replacement
from ppcl.training.captured import CapturedActivations, CaptureSpec
from ppcl.training.losses import Loss, LossTerm

# The moments' name, the tokens `(n, p)` that are read, and those `(n, q)` that are predicted from them.
MomentUpdate = tuple[str, torch.Tensor, torch.Tensor]


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

    def parts(self, number: int) -> dict[str, BlockParts]:
        """By stream, the replaceable parts of a block."""
        return self.adapter.parts_of(self.transformer, number, self.blocks[number])

    def width(self, number: int) -> int:
        """`d`, the width of the streams."""
        return next(p.shape[-1] for p in self.blocks[number].parameters() if p.ndim == 2)


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

    @abstractmethod
    def initialize(self, moments: Mapping[str, Moments], ridge: float) -> None:
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
    def initialize(self, moments: Mapping[str, Moments], ridge: float) -> None:
        for name, linear in self.linears().items():
            solved = fit_affine(moments[f"{self.replacement.name}.{name}"], ridge)
            linear.weight.copy_(solved.weight)
            linear.bias.copy_(solved.bias)
