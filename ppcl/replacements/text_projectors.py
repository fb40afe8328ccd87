"""Text-stream replacement (Eq. 7, 8): in a run of blocks, linear projectors stand in for the text stream.

The run's first block `r` is whole. Every other block `p` keeps the projections that give the text's queries, keys and
values, so the image attends to text as before; what they read is `l_z,p(z_r)`, where `z_r` is the modulated text input
of block `r`'s attention. The text's output projection, FFN and modulation are gone. After the run the text stream is
`h_r + l_h(h_r)`, where `h_r` is that after block `r`.

Between the blocks of a run the text stream travels as `(h_r, z_r)`, one behind the other along the features: nothing is
remembered outside of the streams.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from ppcl.models import BlockParts, ModelAdapter, Streams
from ppcl.replacements.block_view import Modulation, submodule, view
from ppcl.replacements.linear_ffn import LinearFfn, ffn_parts
from ppcl.replacements.plan import TextRun
from ppcl.replacements.pruned_ffn import PrunedFfn


class TextProjectors(nn.Module):
    """The maps of one run: `z` by block number, `(…, d) → (…, d)`, and `h`, residual, None where no block comes after."""

    def __init__(self, run: TextRun, width: int, text_goes_on: bool):
        super().__init__()
        self.run = run
        self.z = nn.ModuleDict({str(block): nn.Linear(width, width) for block in run.blocks[1:]})
        self.h = nn.Linear(width, width) if text_goes_on else None

    def after(self, h: torch.Tensor) -> torch.Tensor:
        """The text stream after the run, from that after its first block."""
        return h if self.h is None else h + self.h(h)


class _Listening(nn.Module):
    """An attention that keeps the text input it was called with until it is asked for it."""

    def __init__(self, attention: nn.Module, argument: str):
        super().__init__()
        self.attention, self.argument = attention, argument
        self.heard: torch.Tensor | None = None

    def forward(self, *arguments: Any, **named: Any) -> Any:
        self.heard = named[self.argument]
        return self.attention(*arguments, **named)

    def take(self) -> torch.Tensor:
        heard, self.heard = self.heard, None
        return heard


class _InRun(nn.Module):
    # Read by the stock SD3 forward between blocks.
    context_pre_only = False

    def __init__(self, adapter: ModelAdapter):
        super().__init__()
        self.adapter = adapter


class RunStart(_InRun):
    """Block `r`: sends `z_r` on with the text stream."""

    def __init__(self, adapter: ModelAdapter, block: nn.Module):
        super().__init__(adapter)
        self.listening = _Listening(submodule(block, adapter.attention), adapter.txt)
        self.block = view(block, {adapter.attention: self.listening})

    def forward(self, **arguments: Any) -> tuple:
        streams = self.adapter.from_returned(self.block(**arguments))
        return self.adapter.to_returned(streams._replace(txt=torch.cat([streams.txt, self.listening.take()], dim=-1)))


class RunBlock(_InRun):
    """A later block of a run: the image stream as before, the text stream from the run's first block."""

    def __init__(self, adapter: ModelAdapter, block: nn.Module, last: bool, projectors: TextProjectors):
        super().__init__(adapter)
        self.block, self.last = block, last
        # Not a sub-module: the maps belong to the run, and would be counted at every block of it.
        self.__dict__["projectors"] = projectors
        if last and projectors.h is not None:
            self.h = projectors.h

    def forward(self, **arguments: Any) -> tuple:
        streams, context = self.adapter.split(arguments)
        h, z = streams.txt.chunk(2, dim=-1)
        made = self.adapter.from_returned(self.block(**self.adapter.join(Streams(streams.img, z), context)))
        txt = self.projectors.after(h) if self.last else streams.txt
        return self.adapter.to_returned(Streams(made.img, txt))


def text_parts(block: nn.Module, parts: BlockParts, z: nn.Linear) -> dict[str, nn.Module]:
    """What to put where in a block whose text input is `z_r`: `l_z` for the first norm, and nothing after the attention."""
    width = z.out_features
    modulation = submodule(block, parts.modulation)
    return {
        parts.norm1: z,
        # Shift and scale 0 leave what `z` gives as it is; the gates 0 take away what the text stream would become.
        parts.modulation: Modulation(modulation, width, dict.fromkeys(range(modulation.weight.shape[0] // width), 0.0)),
        parts.norm2: nn.Identity(),
        parts.ffn: nn.Identity(),
        parts.out: nn.Identity(),
    }


def text_run(
    adapter: ModelAdapter,
    blocks: Mapping[int, nn.Module],
    parts: Mapping[str, BlockParts],
    projectors: TextProjectors,
    ffn: Mapping[int, LinearFfn | PrunedFfn] | None = None,
) -> dict[int, nn.Module]:
    """What stands at the block numbers of a run, from the teacher's own `blocks` by number.

    `ffn`: what stands for the FFNs of those of its blocks where they are replaced too; of the later blocks only the image's is left.
    """
    run, ffn = projectors.run, ffn or {}
    placed: dict[int, nn.Module] = {}
    for number in run.blocks:
        block, maps = blocks[number], ffn.get(number)
        if number == run.first:
            whole = view(block, ffn_parts(adapter, block, parts, maps)) if maps else block
            placed[number] = RunStart(adapter, whole)
            continue
        exchanged = text_parts(block, parts["txt"], projectors.z[str(number)])
        if maps:
            exchanged |= ffn_parts(adapter, block, {"img": parts["img"]}, maps)
        placed[number] = RunBlock(adapter, view(block, exchanged), number == run.last, projectors)
    return placed
