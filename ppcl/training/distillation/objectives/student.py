"""A student block for an interval (Eq. 6), all of a block or with fewer hidden units in its FFNs."""

from __future__ import annotations

import copy
from collections.abc import Iterator

from torch import nn

from ppcl.config.schema import Distillation
from ppcl.models import FusedParts, Streams
from ppcl.models.block_view import linear_at
from ppcl.models.fused_output import separate_output
from ppcl.replacements.pruned_ffn import PrunedFfn
from ppcl.replacements.student_block import Interval, StudentBlock, affine_map
from ppcl.training.captured import CapturedActivations, CaptureSpec
from ppcl.training.distillation.objectives.base import (
    Gradient,
    LeastSquaresObjective,
    MomentUpdate,
    Solutions,
    TeacherBlocks,
)
from ppcl.training.distillation.objectives.pruned_ffn import PrunedFfnObjective
from ppcl.training.losses import Loss, LossTerm


class StudentObjective(LeastSquaresObjective):
    """The student's output against the teacher's behind the interval, stream by stream."""

    gradient = Gradient.NEEDED
    replacement: Interval
    module: StudentBlock

    def __init__(self, teacher: TeacherBlocks, replacement: Interval, settings: Distillation):
        self.replacement = replacement
        first, last = replacement.first, replacement.last
        source = (first + last) // 2 if settings.init == "middle" else first
        block = copy.deepcopy(teacher.blocks[source]).float()
        self.pruned: PrunedFfnObjective | None = None
        if settings.student_keep_percent < 100 and teacher.parts(source):
            self.pruned = PrunedFfnObjective(teacher, PrunedFfn(source, settings.student_keep_percent), settings)
            for where in teacher.parts(source).values():
                if isinstance(where, FusedParts):
                    block.set_submodule(where.fused, separate_output(block, where))
            replaced = self.pruned.module.replaced_parts(teacher.adapter, block, teacher.parts(source))
            for path, module in replaced.items():
                block.set_submodule(path, module)
        # Blocks that take text and image tokens as one stream have one map for all of them.
        self.one_stream = teacher.adapter.layout_at(teacher.transformer, first).txt is None
        affine = {}
        if settings.init == "affine":
            drops_text = getattr(teacher.blocks[last], "context_pre_only", False)
            streams = [name for name in Streams._fields if name == "img" or not (drops_text or self.one_stream)]
            affine = {name: affine_map(teacher.width(source)) for name in streams}
        self.module = StudentBlock(teacher.adapter, replacement, source, block, affine)
        self.capture = CaptureSpec(frozenset({first, last + 1}))
        # What the teacher's own block `u` makes is the affine map's input for the fit alone; then the student's block
        # makes it.
        self.init_capture = CaptureSpec(frozenset({first + 1, last + 1})) if affine else CaptureSpec()
        if self.pruned:
            self.init_capture |= self.pruned.init_capture

    def linears(self) -> dict[str, nn.Linear]:
        return {name: linear_at(self.module.affine, name) for name in self.module.affine}

    def moments(self) -> dict[str, tuple[int, int]]:
        return super().moments() | (self.pruned.moments() if self.pruned else {})

    def updates(self, captured: CapturedActivations) -> Iterator[MomentUpdate]:
        yield from super().updates(captured)
        if self.pruned:
            yield from self.pruned.updates(captured)

    def kept_units(self) -> dict[str, int]:
        return self.pruned.kept_units() if self.pruned else {}

    def initialize(self, solutions: Solutions) -> None:
        super().initialize(solutions)
        if self.pruned:
            # Its maps are those that stand in the student.
            self.pruned.initialize(solutions)

    def pairs(self, captured: CapturedActivations) -> Iterator[MomentUpdate]:
        """Block `u` on `X_{u-1}` gives the teacher's own `X_u`: the map is a fit between two boundaries."""
        if not self.module.affine:
            return
        before, after = captured.boundaries[self.replacement.first + 1], captured.boundaries[self.replacement.last + 1]
        for name in self.module.affine:
            x, y = (
                captured.all_tokens(streams) if self.one_stream else captured.tokens(getattr(streams, name), name)
                for streams in (before, after)
            )
            yield name, x, y - x

    def losses(self, captured: CapturedActivations, loss_of: Loss) -> dict[str, LossTerm]:
        output = self.module.streams(captured.boundaries[self.replacement.first], captured.context)
        target = captured.boundaries[self.replacement.last + 1]
        return {
            name: loss_of(getattr(output, name), x, captured.mask(name))
            for name, x in target._asdict().items()
            if x is not None
        }
