"""FFN replacement: image and text FFN, with norm, modulation and gate, become one residual linear map each (Eq. 9).

`h = g + l(g)`, where `g` is the stream after the attention's residual. In the stock forward of a block: the norm in
front of the FFN lets everything through, its modulation is shift 0, scale 0 and gate 1, and the FFN is `l`.
"""

from __future__ import annotations

from collections.abc import Mapping

from torch import nn

from ppcl.models import BlockParts, ModelAdapter
from ppcl.replacements.block_view import GATE2, SCALE2, SHIFT2, Modulation, submodule, view
from ppcl.replacements.pruned_ffn import PrunedFfn, pruned_parts


class LinearFfn(nn.ModuleDict):
    """By stream, the map `l: (…, d) → (…, d)` of one block's FFN."""

    @classmethod
    def new(cls, parts: Mapping[str, BlockParts], width: int) -> LinearFfn:
        return cls({stream: nn.Linear(width, width) for stream in parts})


def ffn_parts(
    adapter: ModelAdapter, block: nn.Module, parts: Mapping[str, BlockParts], maps: LinearFfn | PrunedFfn
) -> dict[str, nn.Module]:
    """What to put where in a block, for the streams of `parts`."""
    if isinstance(maps, PrunedFfn):
        return pruned_parts(adapter, parts, maps)
    placed: dict[str, nn.Module] = {}
    for stream, where in parts.items():
        modulation = submodule(block, where.modulation)
        placed[where.modulation] = Modulation(
            modulation, maps[stream].in_features, {SHIFT2: 0.0, SCALE2: 0.0, GATE2: 1.0}
        )
        placed[where.norm2] = nn.Identity()
        placed[where.ffn] = maps[stream]
    return placed


def with_ffn(
    adapter: ModelAdapter, block: nn.Module, parts: Mapping[str, BlockParts], maps: LinearFfn | PrunedFfn
) -> nn.Module:
    """The block with its FFNs replaced, as a view of it."""
    return view(block, ffn_parts(adapter, block, parts, maps))
