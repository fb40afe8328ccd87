"""One rank's blocks of the teacher, run on a batch while their activations are captured."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import reduce
from operator import or_
from typing import Any

import torch

from ppcl.models import FusedParts, ModelAdapter, embed, run_blocks
from ppcl.models.fused_output import reader_of
from ppcl.models.teacher import Teacher
from ppcl.replacements import Replacement
from ppcl.training.captured import CapturedActivations, CaptureSpec
from ppcl.training.pipeline import PipelineStage


def text_mask(adapter: ModelAdapter, context: dict[str, Any]) -> torch.Tensor | None:
    """`(B, T)`, true where a text token is not padding; None where none is."""
    mask = context.get(adapter.text_mask) if adapter.text_mask else None
    return None if mask is None else mask.bool()


@dataclass(frozen=True)
class Consumer:
    """Takes what `spec` names of a batch, as soon as the last of it is captured: `take(captured)`."""

    spec: CaptureSpec
    take: Callable[[CapturedActivations], None]


class TeacherSegment:
    """One rank's blocks of the teacher, frozen, and the replacements of `plan` that begin in them.

    `blocks`: their numbers. The embedders and the head are loaded too, no other block is.
    """

    def __init__(self, teacher: Teacher, blocks: range, plan: Sequence[Replacement], device: str, dtype: torch.dtype):
        self.adapter = teacher.adapter
        self.range = blocks
        self.plan = [replacement for replacement in plan if replacement.first in blocks]
        self.device, self.dtype = device, dtype
        self.transformer = teacher.transformer(keep=blocks, device=device, dtype=dtype)
        self.blocks = {b: self.adapter.blocks(self.transformer)[b] for b in blocks}

    @torch.no_grad()
    def run(self, inputs: dict[str, Any], pipeline_stage: PipelineStage, wanted: CaptureSpec) -> CapturedActivations:
        """Run one batch through the segment, between its pipeline neighbours; gives what `wanted` names.

        `inputs`: arguments of the transformer's call. The last block's output is boundary `stop`.
        """
        start, context = embed(self.transformer, inputs)
        streams = pipeline_stage.receive(start)
        captured = CapturedActivations(context=context, text_mask=text_mask(self.adapter, context))
        if self.range.start in wanted.boundaries:
            captured.boundaries[self.range.start] = streams
        with self.listening(captured, wanted):
            for number, block in self.blocks.items():
                streams = run_blocks(self.adapter, [block], streams, context, number)
                if number + 1 in wanted.boundaries:
                    captured.boundaries[number + 1] = streams
        pipeline_stage.send(streams)
        return captured

    @torch.no_grad()
    def stream(self, inputs: dict[str, Any], pipeline_stage: PipelineStage, consumers: Sequence[Consumer]) -> None:
        """One batch through the segment, block by block, each consumer served as soon as it can be.

        What no consumer needs any more is dropped at once: the inner tensors of one block are alive, not of all.
        """
        wanted = reduce(or_, (consumer.spec for consumer in consumers), CaptureSpec())
        last_use: dict[tuple[str, int], int] = {}
        for consumer in consumers:
            for name, number, _ in consumer.spec.items():
                last_use[name, number] = max(last_use.get((name, number), -1), consumer.spec.last_block)
        start, context = embed(self.transformer, inputs)
        streams = pipeline_stage.receive(start)
        captured = CapturedActivations(context=context, text_mask=text_mask(self.adapter, context))
        with self.listening(captured, wanted):
            for number in range(self.range.start - 1, self.range.stop):
                if number in self.blocks:
                    streams = run_blocks(self.adapter, [self.blocks[number]], streams, context, number)
                if number + 1 == self.range.stop:
                    pipeline_stage.send(streams)
                if number + 1 in wanted.boundaries:
                    captured.boundaries[number + 1] = streams
                for consumer in consumers:
                    if consumer.spec.last_block == number:
                        consumer.take(captured)
                for (name, item), last in last_use.items():
                    if last == number:
                        captured.drop(name, item)

    @contextmanager
    def listening(self, captured: CapturedActivations, wanted: CaptureSpec) -> Iterator[None]:
        """Capture inner activations of the blocks that run inside the `with` block."""
        handles = []

        def listen(module: torch.nn.Module, keep: Callable[[tuple, dict], None]) -> None:
            handles.append(module.register_forward_pre_hook(lambda _, args, named: keep(args, named), with_kwargs=True))

        for number, block in self.blocks.items():
            if number in wanted.text_inputs:

                def text(args: tuple, named: dict, number: int = number) -> None:
                    captured.text_inputs[number] = named[self.adapter.txt]

                listen(block.get_submodule(self.adapter.attention), text)
            if number in wanted.residuals:
                for stream, parts in self.adapter.parts_of(self.transformer, number, block).items():
                    if isinstance(parts, FusedParts):
                        # Nothing stands between its attention and its FFN.
                        continue

                    def residual(args: tuple, named: dict, key: tuple[int, str] = (number, stream)) -> None:
                        captured.residuals[key] = args[0]

                    listen(block.get_submodule(parts.norm2), residual)
            for stream, parts in self.adapter.parts_of(self.transformer, number, block).items():
                if number in wanted.hidden:
                    path, inputs = reader_of(block, parts, self.adapter.ffn_maps(parts)[1])

                    def hidden(
                        args: tuple, named: dict, key: tuple[int, str] = (number, stream), inputs: slice = inputs
                    ) -> None:
                        captured.hidden[key] = args[0][..., inputs]

                    listen(block.get_submodule(path), hidden)
                if number in wanted.attended:
                    path, inputs = reader_of(block, parts, parts.out)

                    def attended(
                        args: tuple, named: dict, key: tuple[int, str] = (number, stream), inputs: slice = inputs
                    ) -> None:
                        captured.attended[key] = args[0][..., inputs]

                    listen(block.get_submodule(path), attended)
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()
