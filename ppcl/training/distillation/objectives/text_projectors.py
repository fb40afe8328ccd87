"""Projectors for a run of text streams (Eq. 7, 8)."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import nn

from ppcl.config.schema import Distillation
from ppcl.models import Streams, run_blocks
from ppcl.replacements.text_projectors import TextProjectors, TextRun, text_run
from ppcl.training.captured import CapturedActivations, CaptureSpec
from ppcl.training.distillation.objectives.base import Gradient, LeastSquaresObjective, MomentUpdate, TeacherBlocks
from ppcl.training.losses import Loss, LossTerm, relative


class TextProjectorsObjective(LeastSquaresObjective):
    """Every block's image output, and the projectors' own outputs."""

    gradient = Gradient.OPTIONAL
    replacement: TextRun
    module: TextProjectors

    def __init__(self, teacher: TeacherBlocks, replacement: TextRun, settings: Distillation):
        self.replacement, self.adapter = replacement, teacher.adapter
        # Behind the last block nothing reads the text stream.
        goes_on = replacement.last < teacher.count - 1
        self.module = TextProjectors(replacement, teacher.width(replacement.first), goes_on)
        own = {number: teacher.blocks[number] for number in replacement.blocks}
        self.standing = text_run(teacher.adapter, own, teacher.parts(replacement.first), self.module)
        numbers = frozenset(replacement.blocks)
        self.capture = self.init_capture = CaptureSpec(frozenset(b + 1 for b in numbers), text_inputs=numbers)

    def linears(self) -> dict[str, nn.Linear]:
        maps = {f"z.{number}": self.module.z_map(number) for number in self.replacement.blocks[1:]}
        return maps if self.module.h is None else maps | {"h": self.module.h}

    def pairs(self, captured: CapturedActivations) -> Iterator[MomentUpdate]:
        z = captured.tokens(captured.text_inputs[self.replacement.first], "txt")
        for number in self.replacement.blocks[1:]:
            yield f"z.{number}", z, captured.tokens(captured.text_inputs[number], "txt")
        if self.module.h is not None:
            h, after = (captured.tokens(self._text_after(captured, b), "txt") for b in self._ends())
            yield "h", h, after - h

    def losses(self, captured: CapturedActivations, loss_of: Loss) -> dict[str, LossTerm]:
        mask = captured.text_mask
        first, last = self._ends()
        z, h = captured.text_inputs[first], self._text_after(captured, first)
        parts: dict[str, LossTerm] = {}
        for number in self.replacement.blocks[1:]:
            # The teacher's own image stream goes into every block of the run.
            streams = Streams(captured.boundaries[number].img, torch.cat([h, z], -1))
            output = run_blocks(self.adapter, [self.standing[number]], streams, captured.context, number)
            parts[f"img_{number:02d}"] = loss_of(output.img, captured.boundaries[number + 1].img, None)
            parts[f"z_{number:02d}"] = relative(self.module.z_map(number)(z), captured.text_inputs[number], mask)
        if self.module.h is not None:
            after = self._text_after(captured, last)
            parts["txt"] = loss_of(self.module.after(h), after, mask)
            parts["h"] = relative(self.module.h(h), after - h, mask)
        return parts

    def _ends(self) -> tuple[int, int]:
        return self.replacement.first, self.replacement.last

    @staticmethod
    def _text_after(captured: CapturedActivations, block: int) -> torch.Tensor:
        return captured.boundaries[block + 1].require_txt()
