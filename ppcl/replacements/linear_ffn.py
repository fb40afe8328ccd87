"""FFN replacement: image and text FFN, with norm, modulation and gate, become one residual linear map each (Eq. 9).

`h = g + l(g)`, where `g` is the stream after the attention's residual. In the stock forward of a block: the norm in
front of the FFN lets everything through, its modulation is shift 0, scale 0 and gate 1, and the FFN is `l`.
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
from ppcl.models.block_view import linear_at
from ppcl.replacements.ffn import Ffn, FfnMaps
from ppcl.replacements.modulation import GATE2, SCALE2, SHIFT2, Modulation
from ppcl.replacements.replacement import Replacement, TeacherStructure

if TYPE_CHECKING:
    from ppcl.models.teacher import Teacher
    from ppcl.replacements.parameter_counts import ParameterCounts


class LinearFfnMaps(nn.ModuleDict, FfnMaps):
    """By stream, the map `l: (…, d) → (…, d)` of one block's FFN."""

    @classmethod
    def new(cls, parts: Mapping[str, Parts], width: int) -> LinearFfnMaps:
        return cls({stream: nn.Linear(width, width) for stream in parts})

    def linears(self) -> dict[str, nn.Linear]:
        return {stream: linear for stream, linear in self.items() if isinstance(linear, nn.Linear)}

    def replaced_parts(
        self, adapter: ModelAdapter, block: nn.Module, parts: Mapping[str, Parts]
    ) -> dict[str, nn.Module]:
        replaced: dict[str, nn.Module] = {}
        linears = self.linears()
        for stream, where in parts.items():
            # A single-stream block's FFN has no norm, modulation and gate of its own to take away.
            assert isinstance(where, BlockParts)
            constants = {SHIFT2: 0.0, SCALE2: 0.0, GATE2: 1.0}
            modulation = linear_at(block, where.modulation)
            replaced[where.modulation] = Modulation(modulation, linears[stream].in_features, constants)
            replaced[where.norm2] = nn.Identity()
            replaced[where.ffn] = linears[stream]
        return replaced


@dataclass(frozen=True)
class LinearFfn(Ffn[LinearFfnMaps]):
    """Block `block`, whose image and text FFN become one residual linear map each (PPCL: Eq. 9)."""

    text_form = re.compile(plan_syntax.LINEAR_FFN)
    file_form = re.compile(r"ffn-(?P<block>\d+)")

    def __str__(self) -> str:
        return f"ffn:{self.block}"

    @property
    def name(self) -> str:
        return f"ffn-{self.block:02d}"

    @property
    def where(self) -> str:
        return str(self.block)

    def empty_module(
        self, tensors: Mapping[str, torch.Tensor], metadata: Mapping[str, str], teacher: Teacher
    ) -> LinearFfnMaps:
        widths = {s: tensors[f"{s}.weight"].shape[0] for s in Streams._fields if f"{s}.weight" in tensors}
        return LinearFfnMaps({s: nn.Linear(width, width, device="meta") for s, width in widths.items()})

    def exported(self, module: LinearFfnMaps, block: int, structure: TeacherStructure) -> dict[str, Any]:
        return {"linear_ffn": list(module)}

    def stream_parameters(self, teacher: ParameterCounts, stream: str) -> int:
        # Shift, scale and gate of the FFN go too.
        return teacher.ffns[self.block][stream] + teacher.chunks[self.block][stream]

    def modulation_rows_removed(self, teacher: ParameterCounts, within: Replacement | None) -> int:
        return 3 * teacher.width * len(self.streams(teacher, within))

    def least_brought(self, teacher: ParameterCounts, structure: TeacherStructure, student_keep: int) -> dict[str, int]:
        return {f"{stream}.weight": teacher.width**2 for stream in teacher.ffns[self.block]}
