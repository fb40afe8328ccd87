"""Residual linear maps for a block's FFNs (Eq. 9)."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import nn

from ppcl.config.schema import Distillation
from ppcl.replacements.linear_ffn import LinearFfn, LinearFfnMaps
from ppcl.training.captured import CapturedActivations, CaptureSpec
from ppcl.training.distillation.objectives.base import Gradient, LeastSquaresObjective, MomentUpdate, TeacherBlocks
from ppcl.training.losses import Loss, LossTerm, relative


class LinearFfnObjective(LeastSquaresObjective):
    """The block's output, and the maps' own outputs (plain squared error)."""

    gradient = Gradient.OPTIONAL
    replacement: LinearFfn
    module: LinearFfnMaps

    def __init__(self, teacher: TeacherBlocks, replacement: LinearFfn, settings: Distillation):
        self.replacement, block = replacement, replacement.block
        self.module = LinearFfnMaps.new(teacher.parts(block), teacher.width(block))
        self.capture = self.init_capture = CaptureSpec(frozenset({block + 1}), residuals=frozenset({block}))

    def linears(self) -> dict[str, nn.Linear]:
        return self.module.linears()

    def pairs(self, captured: CapturedActivations) -> Iterator[MomentUpdate]:
        for name in self.module:
            g, h = self._ends(captured, name)
            x = captured.tokens(g, name)
            yield name, x, captured.tokens(h, name) - x

    def losses(self, captured: CapturedActivations, loss_of: Loss) -> dict[str, LossTerm]:
        parts = {}
        for name, linear in self.module.items():
            g, h = self._ends(captured, name)
            added = linear(g)
            parts[name] = loss_of(g + added, h, captured.mask(name))
            parts[f"{name}_ffn"] = relative(added, h - g, captured.mask(name))
        return parts

    def _ends(self, captured: CapturedActivations, name: str) -> tuple[torch.Tensor, torch.Tensor]:
        """The stream before the FFN and behind it."""
        block = self.replacement.block
        return captured.residuals[block, name], getattr(captured.boundaries[block + 1], name)
