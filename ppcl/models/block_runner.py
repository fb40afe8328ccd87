"""Running a stock transformer in parts: `embed → blocks → head`, the stock forward untouched.

`X_0`, the context of the blocks and the head all come from the stock forward itself, run with its block lists' entries
swapped for a tap and pass-throughs. Nothing of any model's forward is written again here.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator, Mapping
from types import SimpleNamespace
from typing import Any

import torch
from torch import nn

from ppcl.models.adapter import ModelAdapter, Streams, adapter_of
from ppcl.models.block_layout import BlockLayout, Context


class IdentityBlock(nn.Module):
    """A block that returns its input streams. It replaces a removed block, so the block lists keep their length.

    `layout`: how blocks in that place take and return the streams. `replaced`: the block that stood there. A
    ControlNet's residual is added behind the identity, unless the block drops the text stream.
    """

    # Read by the stock SD3 forward between blocks.
    context_pre_only = False

    def __init__(self, adapter: ModelAdapter, layout: BlockLayout, replaced: nn.Module | None = None):
        super().__init__()
        self.adapter, self.layout = adapter, layout
        self.context_pre_only = bool(getattr(replaced, "context_pre_only", False))
        show_processor(self, replaced)

    def forward(self, *arguments: Any, **named: Any) -> Any:
        return self.returned(self.streams_of(self.layout.named(arguments, named)))

    def streams_of(self, arguments: dict[str, Any]) -> Streams:
        return self.adapter.parted(self.layout, arguments)[0]

    def returned(self, streams: Streams) -> Any:
        return streams.joined() if self.layout.txt is None else self.adapter.to_returned(streams)


class _Tap(IdentityBlock):
    """Keeps the streams and the context that it is given; returns `answer` in place of the streams if it is given."""

    streams: Streams
    context: dict[str, Any]

    def __init__(self, adapter: ModelAdapter, layout: BlockLayout, replaced: nn.Module, answer: Streams | None = None):
        super().__init__(adapter, layout, replaced)
        self.answer = answer

    def forward(self, *arguments: Any, **named: Any) -> Any:
        self.streams, self.context = self.adapter.parted(self.layout, self.layout.named(arguments, named))
        return self.returned(self.answer or self.streams)


def show_processor(module: nn.Module, block: nn.Module | None) -> None:
    """Let a module that stands for a block show the block's attention processor, which some stock forwards look at."""
    processor = getattr(getattr(block, "attn", None), "processor", None)
    if processor is not None and not hasattr(module, "attn"):
        module.__dict__["attn"] = SimpleNamespace(processor=processor)


def swap(transformer: nn.Module, entries: Mapping[int, nn.Module]) -> dict[int, nn.Module]:
    """Put modules at block numbers and return those that stood there. Moves references only.

    Raises `UserError` for a block that does not exist, before anything is changed.
    """
    adapter = adapter_of(transformer)
    places = {block: adapter.entry(transformer, block) for block in entries}
    before = {block: blocks[index] for block, (blocks, index) in places.items()}
    for block, (blocks, index) in places.items():
        # ModuleList's own assignment re-registers the module; the dictionary alone is what its iteration reads.
        blocks._modules[str(index)] = entries[block]
    return before


@contextlib.contextmanager
def swapped(transformer: nn.Module, entries: Mapping[int, nn.Module]) -> Iterator[nn.Module]:
    """Like `swap`, for the length of a `with` block."""
    before = swap(transformer, entries)
    try:
        yield transformer
    finally:
        swap(transformer, before)


@torch.no_grad()
def embed(transformer: nn.Module, inputs: Mapping[str, Any]) -> tuple[Streams, Context]:
    """`X_0`, the streams before the first block, and the context: the other arguments of every block.

    `inputs`: arguments of the stock forward. No block needs to be loaded.
    """
    adapter = adapter_of(transformer)
    layouts, blocks = _layouts(adapter, transformer), adapter.blocks(transformer)
    taps = {number: _Tap(adapter, layout, blocks[number]) for number, layout in layouts.items()}
    with swapped(transformer, taps):
        transformer(**inputs)
    return taps[0].streams, Context({number: tap.context for number, tap in taps.items()}, layouts)


def head(transformer: nn.Module, streams: Streams, inputs: Mapping[str, Any]) -> Any:
    """The velocity that the stock head makes of the streams after the last block, shaped like the stock output."""
    adapter = adapter_of(transformer)
    layouts, blocks = _layouts(adapter, transformer), adapter.blocks(transformer)
    # Only what the last block returns is used.
    through = {number: IdentityBlock(adapter, layout, blocks[number]) for number, layout in layouts.items()}
    last = max(layouts)
    with swapped(transformer, through | {last: _Tap(adapter, layouts[last], blocks[last], streams)}):
        return transformer(**{**inputs, "return_dict": False})[0]


def _layouts(adapter: ModelAdapter, transformer: nn.Module) -> dict[int, BlockLayout]:
    """By block number."""
    ranges = zip(adapter.block_lists, adapter.block_ranges(transformer), strict=True)
    return {number: adapter.layout(name) for name, span in ranges for number in span}


def run_blocks(
    adapter: ModelAdapter,
    blocks: Iterable[nn.Module],
    streams: Streams,
    context: Mapping[str, Any],
    first: int | None = None,
) -> Streams:
    """Run some blocks alone: with those of `u..v`, `X_{u-1}` becomes `X_v`.

    `first`: the number of the first of them, which may be left out where a model calls all its blocks alike.
    """
    for index, block in enumerate(blocks):
        number = None if first is None else first + index
        streams = adapter.from_returned(block(**adapter.join(streams, context, number)), streams)
    return streams
