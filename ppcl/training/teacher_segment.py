"""One rank's blocks of the teacher, run on a batch, with what goes on inside of them captured."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch

from ppcl.models import Architecture, embed, run_blocks
from ppcl.models.teacher import Teacher
from ppcl.replacements.block_view import at
from ppcl.replacements.plan import Entry
from ppcl.training.captured import Seen, Wanted
from ppcl.training.pipeline import Chain


def text_mask(architecture: Architecture, context: dict[str, Any]) -> torch.Tensor | None:
    """`(B, T)`, true where a text token is no padding; None where all count."""
    mask = context.get(architecture.text_mask) if architecture.text_mask else None
    return None if mask is None else mask.bool()


class Segment:
    """One rank's blocks, and what its lessons must see of them."""

    def __init__(self, teacher: Teacher, blocks: range, plan: Sequence[Entry], device: str, dtype: torch.dtype):
        self.architecture = teacher.architecture
        self.range = blocks
        self.plan = [entry for entry in plan if entry.first in blocks]
        self.device, self.dtype = device, dtype
        self.transformer = teacher.transformer(keep=blocks, device=device, dtype=dtype)
        self.blocks = {b: self.architecture.blocks(self.transformer)[b] for b in blocks}

    @torch.no_grad()
    def run(self, inputs: dict[str, Any], chain: Chain, wanted: Wanted) -> Seen:
        """One batch through the segment. The last block's output is boundary `stop`."""
        start, context = embed(self.transformer, inputs)
        streams = chain.receive(start)
        seen = Seen(context=context, text_mask=text_mask(self.architecture, context))
        if self.range.start in wanted.boundaries:
            seen.boundaries[self.range.start] = streams
        with self.listening(seen, wanted):
            for number, block in self.blocks.items():
                streams = run_blocks(self.architecture, [block], streams, context)
                if number + 1 in wanted.boundaries:
                    seen.boundaries[number + 1] = streams
        chain.send(streams)
        return seen

    @contextmanager
    def listening(self, seen: Seen, wanted: Wanted) -> Iterator[None]:
        """Hooks that keep what goes on inside of blocks."""
        handles = []

        def listen(module: torch.nn.Module, keep: Callable[[tuple, dict], None]) -> None:
            handles.append(module.register_forward_pre_hook(lambda _, args, named: keep(args, named), with_kwargs=True))

        for number, block in self.blocks.items():
            if number in wanted.text_inputs:

                def text(args: tuple, named: dict, number: int = number) -> None:
                    seen.text_inputs[number] = named[self.architecture.txt]

                listen(at(block, self.architecture.attention), text)
            if number in wanted.residuals:
                for stream, parts in self.architecture.parts_of(self.transformer, number, block).items():

                    def residual(args: tuple, named: dict, key: tuple[int, str] = (number, stream)) -> None:
                        seen.residuals[key] = args[0]

                    listen(at(block, parts.norm2), residual)
            if number in wanted.hidden:
                for stream, parts in self.architecture.parts_of(self.transformer, number, block).items():

                    def hidden(args: tuple, named: dict, key: tuple[int, str] = (number, stream)) -> None:
                        seen.hidden[key] = args[0]

                    listen(at(block, f"{parts.ffn}.{self.architecture.ffn_down}"), hidden)
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()
