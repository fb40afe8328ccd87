"""Depth: a run of blocks becomes one student block, with an affine map behind it or none (PPCL, Eq. 6)."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from ppcl.config import plan_syntax
from ppcl.models import FusedParts, IdentityBlock, ModelAdapter, Streams, run_blocks, show_processor
from ppcl.models.fused_output import separate_output
from ppcl.replacements.pruned_ffn import hidden_units, kept_parameters
from ppcl.replacements.replacement import Assembly, BlockRun, Replacement, TeacherStructure

if TYPE_CHECKING:
    from ppcl.models.teacher import Teacher
    from ppcl.replacements.parameter_counts import ParameterCounts


class StudentBlock(nn.Module):
    """Called exactly as a block is, and returns what a block does.

    `block`: of the same kind as the teacher's block `source`. `affine`: by stream, a residual map `x + W x + b` behind
    the block, the closed-form start of a student; empty for the paper's start, with which it ends as a stock block.
    PPCL, arXiv 2511.16156, Eq. 6.
    """

    # Read by the stock SD3 forward between blocks.
    context_pre_only = False
    block: nn.Module
    affine: nn.ModuleDict

    def __init__(
        self,
        adapter: ModelAdapter,
        interval: Interval,
        source: int,
        block: nn.Module,
        affine: dict[str, nn.Linear] | None = None,
    ):
        super().__init__()
        self.adapter = adapter
        self.interval = interval
        self.source = source
        self.block = block
        self.affine = nn.ModuleDict(affine or {})
        show_processor(self, block)

    def forward(self, *arguments: Any, **named: Any) -> Any:
        returned = self.block(*arguments, **named)
        streams = self.adapter.from_returned(returned)
        mapped = {name: x + self.affine[name](x) for name, x in streams._asdict().items() if name in self.affine}
        return self.adapter.to_returned(streams._replace(**mapped), returned)

    def streams(self, streams: Streams, context: Mapping[str, Any]) -> Streams:
        """The same on streams: `(X_{u-1}, context)` to the student's `X_v`."""
        return run_blocks(self.adapter, [self], streams, context, self.interval.first)


@dataclass(frozen=True)
class Interval(BlockRun[StudentBlock]):
    """Blocks `first..last` that become one student block (PPCL: `[u, v]`)."""

    label = "interval"
    text_form = re.compile(plan_syntax.INTERVAL)
    file_form = re.compile(r"(?P<first>\d+)-(?P<last>\d+)")

    @property
    def removed(self) -> int:
        return self.last - self.first

    def __str__(self) -> str:
        return f"{self.first}-{self.last}"

    @property
    def name(self) -> str:
        return f"{self.first:02d}-{self.last:02d}"

    def empty_module(
        self, tensors: Mapping[str, torch.Tensor], metadata: Mapping[str, str], teacher: Teacher
    ) -> StudentBlock:
        source = int(metadata["source"])
        affine = {}
        for stream in Streams._fields:
            weight = tensors.get(f"affine.{stream}.weight")
            if weight is not None:
                affine[stream] = nn.Linear(weight.shape[1], weight.shape[0], device="meta")
        return StudentBlock(teacher.adapter, self, source, _block_as_stored(teacher, source, tensors), affine)

    def metadata(self, module: StudentBlock) -> dict[str, str]:
        return {"source": str(module.source)}

    def assemble(self, module: StudentBlock, variant: Assembly) -> None:
        """The student is at `u`, identities are at `u+1..v`, so that the block lists keep their length.

        A ControlNet's residuals for the blocks of the interval are so all added behind the student.
        """
        structure = variant.structure
        for number in self.blocks[1:]:
            layout = structure.adapter.layout_at(structure.transformer, number)
            variant.standing[number] = IdentityBlock(structure.adapter, layout, structure.blocks[number])
        variant.standing[self.first] = module

    def exported(self, module: StudentBlock, block: int, structure: TeacherStructure) -> dict[str, Any]:
        """The blocks that it stands for, its affine maps, and its hidden units where they are fewer."""
        entry: dict[str, Any] = {"teacher": str(self)}
        if module.affine:
            entry["affine"] = list(module.affine)
        units = [
            hidden_units(each, structure, module.source) for each in (module.block, structure.blocks[module.source])
        ]
        if units[0] != units[1]:
            entry["hidden"] = units[0]
        return entry

    def parameters_removed(self, teacher: ParameterCounts, within: Replacement | None) -> int:
        return sum(teacher.blocks[block] for block in self.blocks)

    def modulation_rows_removed(self, teacher: ParameterCounts, within: Replacement | None) -> int:
        # The student has those of one block.
        rows = [sum(teacher.rows.get(block, {}).values()) for block in self.blocks]
        return sum(rows) - rows[0]

    def least_brought(self, teacher: ParameterCounts, structure: TeacherStructure, student_keep: int) -> dict[str, int]:
        """A student is one of the interval's blocks, with fewer hidden units and possibly affine maps behind it."""
        sizes = []
        for block in self.blocks:
            without_ffn = teacher.blocks[block] - sum(teacher.ffns.get(block, {}).values())
            sizes.append(without_ffn + sum(kept_parameters(teacher, structure, block, student_keep).values()))
        return {"block": min(sizes)}


def affine_map(width: int) -> nn.Linear:
    """A residual affine map that changes nothing yet."""
    linear = nn.Linear(width, width)
    nn.init.zeros_(linear.weight)
    nn.init.zeros_(linear.bias)
    return linear


def _block_as_stored(teacher: Teacher, source: int, tensors: Mapping[str, torch.Tensor]) -> nn.Module:
    """The structure of a student's block: the teacher's block `source`, with as many hidden units as its file has."""
    structure = TeacherStructure(teacher.adapter, teacher.empty_transformer())
    block = structure.blocks[source]
    for where in structure.parts(source).values():
        paths = teacher.adapter.ffn_maps(where)
        if isinstance(where, FusedParts):
            if f"block.{where.fused}.weight" in tensors:
                # Whole: it was never taken apart.
                continue
            block.set_submodule(where.fused, separate_output(block, where))
        for path in paths:
            rows, columns = tensors[f"block.{path}.weight"].shape
            block.set_submodule(path, nn.Linear(columns, rows, device="meta"))
    return block
