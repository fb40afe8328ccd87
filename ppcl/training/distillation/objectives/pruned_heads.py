"""Fewer heads for a block's attention, in closed form alone: the least-squares choice of them."""

from __future__ import annotations

from collections.abc import Iterator

from ppcl.config.schema import Distillation
from ppcl.models.block_view import linear_at
from ppcl.models.fused_output import unfused
from ppcl.replacements.pruned_heads import HeadPaths, PrunedHeadMaps, PrunedHeads
from ppcl.training.captured import JOINT, CapturedActivations, CaptureSpec
from ppcl.training.distillation.objectives.base import (
    DistillationObjective,
    Gradient,
    MomentUpdate,
    Solutions,
    TeacherBlocks,
)


class PrunedHeadsObjective(DistillationObjective):
    """See `ppcl.replacements.pruned_heads`. The heads that stay get new output projections, in fine-tuning all maps."""

    gradient = Gradient.NONE
    replacement: PrunedHeads
    module: PrunedHeadMaps

    def __init__(self, teacher: TeacherBlocks, replacement: PrunedHeads, settings: Distillation):
        self.replacement, number = replacement, replacement.block
        self.paths = HeadPaths.of(teacher.adapter, teacher.transformer, number, teacher.blocks[number])
        self.block = unfused(teacher.blocks[number], self.paths.fused)
        self.module = PrunedHeadMaps.new(self.block, self.paths, replacement.keep_percent)
        self.capture = CaptureSpec()
        self.init_capture = CaptureSpec(attended=frozenset({number}))

    def moments(self) -> dict[str, tuple[int, int]]:
        # One Gram matrix for all numbers of heads.
        outs = {stream: linear_at(self.block, path) for stream, path in self.paths.out.items()}
        return {self._moment(stream): (out.in_features, 0) for stream, out in outs.items()}

    def updates(self, captured: CapturedActivations) -> Iterator[MomentUpdate]:
        for stream in self.paths.out:
            joint = bool(self.paths.fused)
            x = captured.tokens(captured.attended[self.replacement.block, stream], JOINT if joint else stream)
            yield self._moment(stream), x, x[:, :0]

    def kept_units(self) -> dict[str, int]:
        return {self._elimination: len(self.module.heads)}

    def initialize(self, solutions: Solutions) -> None:
        outs = {self._moment(stream): linear_at(self.block, path) for stream, path in self.paths.out.items()}
        width, kept = self.paths.head_width(self.block), len(self.module.heads)
        self.module.set(self.block, self.paths, solutions.heads(self._elimination, outs, width, kept))

    @property
    def _elimination(self) -> str:
        return f"heads-{self.replacement.block}"

    def _moment(self, stream: str) -> str:
        return f"attended-{self.replacement.block}-{stream}"
