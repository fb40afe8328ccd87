"""Text-stream replacement (Eq. 7, 8): in a run of blocks, linear projectors replace the text stream.

The run's first block `r` is whole. Every other block `p` keeps the projections that give the text's queries, keys and
values, so the image attends to text as before; their input is `l_z,p(z_r)`, where `z_r` is the modulated text input
of block `r`'s attention. The text's output projection, FFN and modulation are gone. After the run the text stream is
`h_r + l_h(h_r)`, where `h_r` is that after block `r`.

Between the blocks of a run the text stream travels as `(h_r, z_r)`, one behind the other along the features: nothing is
remembered outside of the streams.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from ppcl.config import plan_syntax
from ppcl.models import BlockParts, ModelAdapter, Parts, Streams
from ppcl.models.block_view import linear_at, view
from ppcl.replacements.ffn import Ffn, FfnMaps, with_ffn
from ppcl.replacements.modulation import Modulation
from ppcl.replacements.replacement import Assembly, BlockRun, Replacement, TeacherStructure

if TYPE_CHECKING:
    from ppcl.models.teacher import Teacher
    from ppcl.replacements.parameter_counts import ParameterCounts


class TextProjectors(nn.Module):
    """The maps of one run, `(…, d) → (…, d)`: `z` by block, and `h`, residual, or None where no block comes after."""

    h: nn.Linear | None

    def __init__(self, run: TextRun, width: int, text_goes_on: bool):
        super().__init__()
        self.run = run
        self.z = nn.ModuleDict({str(block): nn.Linear(width, width) for block in run.blocks[1:]})
        self.h = nn.Linear(width, width) if text_goes_on else None

    def z_map(self, block: int) -> nn.Linear:
        """`l_z` of one block."""
        return linear_at(self.z, str(block))

    def after(self, h: torch.Tensor) -> torch.Tensor:
        """The text stream after the run, from that after its first block."""
        return h if self.h is None else h + self.h(h)


class _TextInputRecorder(nn.Module):
    """An attention that keeps the text input of its last call until `take` asks for it."""

    def __init__(self, attention: nn.Module, argument: str):
        super().__init__()
        self.attention, self.argument = attention, argument
        self.recorded: list[torch.Tensor] = []

    def forward(self, *arguments: Any, **named: Any) -> Any:
        self.recorded = [named[self.argument]]
        return self.attention(*arguments, **named)

    def take(self) -> torch.Tensor:
        return self.recorded.pop()


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
        self.recorder = _TextInputRecorder(block.get_submodule(adapter.attention), adapter.txt)
        self.block = view(block, {adapter.attention: self.recorder})

    def forward(self, *arguments: Any, **named: Any) -> tuple:
        streams = self.adapter.from_returned(self.block(*arguments, **named))
        txt = torch.cat([streams.require_txt(), self.recorder.take()], dim=-1)
        return self.adapter.to_returned(streams._replace(txt=txt))


class RunBlock(_InRun):
    """A later block of a run: the image stream as before, the text stream from the run's first block."""

    projectors: TextProjectors

    def __init__(self, adapter: ModelAdapter, block: nn.Module, last: bool, projectors: TextProjectors):
        super().__init__(adapter)
        self.block, self.last = block, last
        # Not a sub-module: the maps belong to the run, and would be counted at every block of it.
        self.__dict__["projectors"] = projectors
        if last and projectors.h is not None:
            self.h = projectors.h

    def forward(self, *arguments: Any, **named: Any) -> tuple:
        streams, context = self.adapter.split(self.adapter.layout(self.adapter.block_lists[0]).named(arguments, named))
        h, z = streams.require_txt().chunk(2, dim=-1)
        made = self.adapter.from_returned(self.block(**self.adapter.join(Streams(streams.img, z), context)))
        txt = self.projectors.after(h) if self.last else streams.txt
        return self.adapter.to_returned(Streams(made.img, txt))


def text_parts(block: nn.Module, parts: BlockParts, z: nn.Linear) -> dict[str, nn.Module]:
    """What to put where in a block whose text input is `z_r`: `l_z` for the first norm, nothing after the attention."""
    width = z.out_features
    modulation = linear_at(block, parts.modulation)
    chunks = modulation.weight.shape[0] // width
    return {
        parts.norm1: z,
        # Shift and scale 0 leave what `z` gives as it is; the gates 0 take away what the text stream would become.
        parts.modulation: Modulation(modulation, width, dict.fromkeys(range(chunks), 0.0)),
        parts.norm2: nn.Identity(),
        parts.ffn: nn.Identity(),
        parts.out: nn.Identity(),
    }


def text_run(
    adapter: ModelAdapter,
    blocks: Mapping[int, nn.Module],
    parts: Mapping[str, Parts],
    projectors: TextProjectors,
    ffns: Mapping[int, FfnMaps] | None = None,
) -> dict[int, nn.Module]:
    """The blocks at the block numbers of a run, from the teacher's own `blocks` by number.

    `ffns`: by block, what stands for its FFNs where they are replaced too; of later blocks only the image's is left.
    """
    run, ffns = projectors.run, ffns or {}
    standing: dict[int, nn.Module] = {}
    for number in run.blocks:
        block, maps = blocks[number], ffns.get(number)
        if number == run.first:
            standing[number] = RunStart(adapter, with_ffn(adapter, block, parts, maps) if maps else block)
            continue
        text = parts["txt"]
        assert isinstance(text, BlockParts)
        exchanged = text_parts(block, text, projectors.z_map(number))
        if maps:
            exchanged |= maps.replaced_parts(adapter, block, {"img": parts["img"]})
        standing[number] = RunBlock(adapter, view(block, exchanged), number == run.last, projectors)
    return standing


@dataclass(frozen=True)
class TextRun(BlockRun[TextProjectors]):
    """Blocks `first..last`: the first keeps its text stream, the others take theirs from it (PPCL: Eq. 7, 8)."""

    label = "text run"
    text_form = re.compile(plan_syntax.TEXT_RUN)
    file_form = re.compile(r"text-(?P<first>\d+)-(?P<last>\d+)")
    # Blocks whose FFN is replaced are then part of the run.
    assembly_order = 1

    def contains(self, other: Replacement) -> bool:
        """An FFN can be replaced within a run; after the first block its text part is gone."""
        return isinstance(other, Ffn) and other.block in self.blocks

    def __str__(self) -> str:
        return f"text:{self.first}-{self.last}"

    @property
    def name(self) -> str:
        return f"text-{self.first:02d}-{self.last:02d}"

    def empty_module(
        self, tensors: Mapping[str, torch.Tensor], metadata: Mapping[str, str], teacher: Teacher
    ) -> TextProjectors:
        width = tensors[f"z.{self.last}.weight"].shape[0]
        with torch.device("meta"):
            return TextProjectors(self, width, "h.weight" in tensors)

    def assemble(self, module: TextProjectors, variant: Assembly) -> None:
        structure = variant.structure
        own = {number: structure.blocks[number] for number in self.blocks}
        ffns = {ffn.first: maps for ffn, maps in variant.inside(self) if isinstance(maps, FfnMaps)}
        variant.standing |= text_run(structure.adapter, own, structure.parts(self.first), module, ffns)

    def exported(self, module: TextProjectors, block: int, structure: TeacherStructure) -> dict[str, Any]:
        if block == self.last:
            return {"text_run": "ends", "text_goes_on": module.h is not None}
        return {"text_run": "starts" if block == self.first else "inside"}

    def parameters_removed(self, teacher: ParameterCounts, within: Replacement | None) -> int:
        return sum(teacher.texts[block] for block in self.blocks[1:])

    def modulation_rows_removed(self, teacher: ParameterCounts, within: Replacement | None) -> int:
        return sum(teacher.rows[block]["txt"] for block in self.blocks[1:])

    def least_brought(self, teacher: ParameterCounts, structure: TeacherStructure, student_keep: int) -> dict[str, int]:
        # Not counted: the text stream that is taken away is far larger.
        return {}
