"""Fewer hidden units for a block's FFNs, in closed form alone: the least-squares choice of them."""

from __future__ import annotations

from collections.abc import Iterator

from torch import nn

from ppcl.config.schema import Distillation
from ppcl.models import FusedParts
from ppcl.models.block_view import linear_at
from ppcl.models.fused_output import unfused
from ppcl.replacements.pruned_ffn import PrunedFfn, PrunedFfnMaps
from ppcl.training.captured import JOINT, CapturedActivations, CaptureSpec
from ppcl.training.distillation.objectives.base import (
    DistillationObjective,
    Gradient,
    MomentUpdate,
    Solutions,
    TeacherBlocks,
)


class PrunedFfnObjective(DistillationObjective):
    """See `ppcl.replacements.pruned_ffn`. What is gained by training them is gained end to end, in fine-tuning."""

    gradient = Gradient.NONE
    replacement: PrunedFfn
    module: PrunedFfnMaps

    def __init__(self, teacher: TeacherBlocks, replacement: PrunedFfn, settings: Distillation):
        self.replacement, self.adapter = replacement, teacher.adapter
        self.parts = teacher.parts(replacement.block)
        self.block = unfused(teacher.blocks[replacement.block], self.parts.values())
        self.module = PrunedFfnMaps.new(teacher.adapter, self.block, self.parts, replacement.keep_percent)
        self.capture = CaptureSpec()
        self.init_capture = CaptureSpec(hidden=frozenset({replacement.block}))

    def moments(self) -> dict[str, tuple[int, int]]:
        return {self._moment(stream): (self._maps(stream)[1].in_features, 0) for stream in self.parts}

    def updates(self, captured: CapturedActivations) -> Iterator[MomentUpdate]:
        for stream in self.parts:
            joint = isinstance(self.parts[stream], FusedParts)
            x = captured.tokens(captured.hidden[self.replacement.block, stream], JOINT if joint else stream)
            yield self._moment(stream), x, x[:, :0]

    def kept_units(self) -> dict[str, int]:
        return {self._moment(stream): self.module.maps(stream)[0].out_features for stream in self.parts}

    def initialize(self, solutions: Solutions) -> None:
        kept = self.kept_units()
        for stream in self.parts:
            up, down = self._maps(stream)
            name = self._moment(stream)
            self.module.set(stream, up, solutions.pruned(name, down, kept[name]))

    def _moment(self, stream: str) -> str:
        # One Gram matrix for all widths of the block.
        return f"hidden-{self.replacement.block}-{stream}"

    def _maps(self, stream: str) -> tuple[nn.Linear, nn.Linear]:
        """The teacher's own two maps."""
        up, down = self.adapter.ffn_maps(self.parts[stream])
        return linear_at(self.block, up), linear_at(self.block, down)
