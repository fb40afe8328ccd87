"""Running a stock transformer in parts: `embed → blocks → head`, the stock forward untouched.

`X_0`, the context of the blocks and the head all come from the stock forward itself, run with its block lists' entries
swapped for a tap and pass-throughs. Nothing of any model's forward is written again here.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import nn

from ppcl.models.adapter import ModelAdapter, Streams, adapter_of


class IdentityBlock(nn.Module):
    """A block that returns its input streams. It replaces a removed block, so the block lists keep their length.

    `replaced`: that block. A ControlNet's residual is added behind it, unless the block drops the text stream.
    """

    # Read by the stock SD3 forward between blocks.
    context_pre_only = False

    def __init__(self, adapter: ModelAdapter, replaced: nn.Module | None = None):
        super().__init__()
        self.adapter = adapter
        self.context_pre_only = bool(getattr(replaced, "context_pre_only", False))

    def forward(self, **arguments: Any) -> tuple:
        return self.adapter.to_returned(self.adapter.split(arguments)[0])


class _Tap(IdentityBlock):
    """Keeps the first block's input streams and context; returns `answer` in place of the streams if it is given."""

    streams: Streams
    context: dict[str, Any]

    def __init__(self, adapter: ModelAdapter, answer: Streams | None = None):
        super().__init__(adapter)
        self.answer = answer

    def forward(self, **arguments: Any) -> tuple:
        self.streams, self.context = self.adapter.split(arguments)
        return self.adapter.to_returned(self.answer or self.streams)


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


def _tapped(transformer: nn.Module, tap: _Tap) -> contextlib.AbstractContextManager:
    adapter = tap.adapter
    count = len(adapter.blocks(transformer))
    through = IdentityBlock(adapter)
    return swapped(transformer, {0: tap} | {block: through for block in range(1, count)})


@torch.no_grad()
def embed(transformer: nn.Module, inputs: Mapping[str, Any]) -> tuple[Streams, dict[str, Any]]:
    """`X_0`, the streams before the first block, and the context: the other arguments of every block.

    `inputs`: arguments of the stock forward. No block needs to be loaded.
    """
    tap = _Tap(adapter_of(transformer))
    with _tapped(transformer, tap):
        transformer(**inputs)
    return tap.streams, tap.context


def head(transformer: nn.Module, streams: Streams, inputs: Mapping[str, Any]) -> torch.Tensor:
    """The velocity that the stock head makes of the streams after the last block, shaped like the stock output."""
    with _tapped(transformer, _Tap(adapter_of(transformer), streams)):
        return transformer(**{**inputs, "return_dict": False})[0]


def run_blocks(
    adapter: ModelAdapter, blocks: Iterable[nn.Module], streams: Streams, context: Mapping[str, Any]
) -> Streams:
    """Run some blocks alone: with those of `u..v`, `X_{u-1}` becomes `X_v`."""
    for block in blocks:
        streams = adapter.from_returned(block(**adapter.join(streams, context)))
    return streams
