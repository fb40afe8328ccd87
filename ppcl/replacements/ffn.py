"""What the two kinds of FFN replacements share: a block, its streams, and how their maps are put into the block."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeVar

from torch import nn

from ppcl.models import ModelAdapter, Parts
from ppcl.models.block_view import view
from ppcl.models.fused_output import unfused
from ppcl.replacements.replacement import Assembly, OneBlock, Replacement

if TYPE_CHECKING:
    from ppcl.replacements.parameter_counts import ParameterCounts


class FfnMaps(nn.Module, ABC):
    """The maps that replace the FFNs of one block, by stream."""

    @abstractmethod
    def replaced_parts(
        self, adapter: ModelAdapter, block: nn.Module, parts: Mapping[str, Parts]
    ) -> dict[str, nn.Module]:
        """By path in the block, what to put there, for the streams of `parts`. `block`: as `unfused` gives it."""


MapsT = TypeVar("MapsT", bound=FfnMaps)


@dataclass(frozen=True)
class Ffn(OneBlock[MapsT]):
    """A replacement of the FFNs of one block, of the image stream and of the text stream where the block has one."""

    label = "FFN"

    @property
    def phrase(self) -> str:
        return f"the FFN {str(self).removeprefix('ffn:')}"

    def assemble(self, module: MapsT, variant: Assembly) -> None:
        structure, block = variant.structure, variant.structure.blocks[self.block]
        variant.standing[self.block] = with_ffn(structure.adapter, block, structure.parts(self.block), module)

    def streams(self, teacher: ParameterCounts, within: Replacement | None) -> set[str]:
        """The streams whose FFN is replaced; after a text run's first block the text's is gone already."""
        if within is not None and self.block != within.first:
            return {"img"}
        return set(teacher.ffns[self.block])

    def parameters_removed(self, teacher: ParameterCounts, within: Replacement | None) -> int:
        return sum(self.stream_parameters(teacher, stream) for stream in self.streams(teacher, within))

    @abstractmethod
    def stream_parameters(self, teacher: ParameterCounts, stream: str) -> int:
        """The teacher's parameters that go with one stream's FFN."""

    def parameters_brought(self, sizes: Mapping[str, int], teacher: ParameterCounts, within: Replacement | None) -> int:
        # Tensors are called `img.weight`, or `up.img.weight`.
        streams = self.streams(teacher, within)
        return sum(size for name, size in sizes.items() if streams & set(name.split(".")))


def with_ffn(adapter: ModelAdapter, block: nn.Module, parts: Mapping[str, Parts], maps: FfnMaps) -> nn.Module:
    """The block with its FFNs replaced, as a view of it."""
    block = unfused(block, parts.values())
    return view(block, maps.replaced_parts(adapter, block, parts))
