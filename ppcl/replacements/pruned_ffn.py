"""FFNs with fewer hidden units. Which ones stay, and what the second map then is, is a least-squares problem.

See `ppcl.linalg.elimination`: one elimination gives every width. Not in the PPCL paper, which replaces an FFN by a
linear map or not at all. Of a single-stream block the problem is that of the FFN's part of the fused output projection,
over all tokens: at `d = 3072` and 12288 hidden units 1.2 GB of a Gram matrix and `2.3e12` multiplications a block.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.nn import functional as F

from ppcl.config import plan_syntax
from ppcl.linalg import PrunedUnits
from ppcl.models import ModelAdapter, Parts, Streams
from ppcl.models.block_view import linear_at, linear_rows, new_linear
from ppcl.models.fused_output import unfused
from ppcl.models.lora_linear import LoraLinear
from ppcl.models.weight_cache import host_original
from ppcl.replacements.ffn import Ffn, FfnMaps
from ppcl.replacements.replacement import TeacherStructure

if TYPE_CHECKING:
    from ppcl.models.teacher import Teacher
    from ppcl.replacements.parameter_counts import ParameterCounts


# Hidden units that are looked for at once.
_ROWS = 1024


class PrunedFfnMaps(FfnMaps):
    """By stream, the two linear maps of one block's FFN with fewer hidden units between them."""

    def __init__(self, maps: Mapping[str, tuple[nn.Linear, nn.Linear]]):
        super().__init__()
        self.up = nn.ModuleDict({stream: up for stream, (up, _) in maps.items()})
        self.down = nn.ModuleDict({stream: down for stream, (_, down) in maps.items()})
        self._units: dict[str, torch.Tensor] = {}

    @classmethod
    def new(
        cls, adapter: ModelAdapter, block: nn.Module, parts: Mapping[str, Parts], keep_percent: int
    ) -> PrunedFfnMaps:
        """With the first units of the block's own; `keep_percent` of them, rounded, at least one."""
        maps, block = {}, unfused(block, parts.values())
        for stream, where in parts.items():
            up, down = (linear_at(block, path) for path in adapter.ffn_maps(where))
            units = torch.arange(max(1, round(up.out_features * keep_percent / 100)))
            maps[stream] = linear_rows(up, units), new_linear(down.weight[:, units], down.bias)
        return cls(maps)

    def maps(self, stream: str) -> tuple[nn.Linear, nn.Linear]:
        """The first and the second map of one stream's FFN."""
        return linear_at(self.up, stream), linear_at(self.down, stream)

    @torch.no_grad()
    def set(self, stream: str, up: nn.Linear, pruned: PrunedUnits) -> None:
        """Take the units of the block's own first map `up`, and the second map that belongs to them."""
        new_up, new_down = self.maps(stream)
        units = pruned.units.to(up.weight.device)
        new_up.weight.copy_(up.weight[units])
        new_up.bias.copy_(up.bias[units])
        new_down.weight.copy_(pruned.weight)
        new_down.bias.copy_(pruned.bias)

    def replaced_parts(
        self, adapter: ModelAdapter, block: nn.Module, parts: Mapping[str, Parts]
    ) -> dict[str, nn.Module]:
        """The two maps, with the stock FFN around them; a LoRA of the block's own is cut to the units that stay."""
        replaced: dict[str, nn.Module] = {}
        for stream, where in parts.items():
            paths = adapter.ffn_maps(where)
            own = [block.get_submodule(path) for path in paths]
            replaced |= dict(zip(paths, self._with_lora(stream, *own), strict=True))
        return replaced

    def _with_lora(self, stream: str, own_up: nn.Module, own_down: nn.Module) -> tuple[nn.Module, nn.Module]:
        up, down = self.maps(stream)
        if not isinstance(own_up, LoraLinear) and not isinstance(own_down, LoraLinear):
            return up, down
        plain = own_up.base_linear if isinstance(own_up, LoraLinear) else linear_at(own_up, "")
        if stream not in self._units:
            # The same for every LoRA, and a product of all units with all units.
            self._units[stream] = kept_units(up.weight, plain.weight)
        units = self._units[stream]
        return (
            own_up.rows(up, units) if isinstance(own_up, LoraLinear) else up,
            own_down.columns(down, units) if isinstance(own_down, LoraLinear) else down,
        )


@dataclass(frozen=True)
class PrunedFfn(Ffn[PrunedFfnMaps]):
    """Block `block`, whose image and text FFN keep `keep_percent` percent of their hidden units, 1 to 99."""

    text_form = re.compile(plan_syntax.PRUNED_FFN)
    file_form = re.compile(r"ffn-(?P<block>\d+)-(?P<keep_percent>0*[1-9]\d?)")

    keep_percent: int

    @property
    def detail(self) -> int:
        return self.keep_percent

    def __str__(self) -> str:
        return f"ffn:{self.block}/{self.keep_percent}"

    @property
    def name(self) -> str:
        return f"ffn-{self.block:02d}-{self.keep_percent:02d}"

    @property
    def where(self) -> str:
        return f"{self.block}, {self.keep_percent} % kept"

    def empty_module(
        self, tensors: Mapping[str, torch.Tensor], metadata: Mapping[str, str], teacher: Teacher
    ) -> PrunedFfnMaps:
        maps = {}
        for stream in Streams._fields:
            if f"up.{stream}.weight" in tensors:
                kept, width = tensors[f"up.{stream}.weight"].shape
                maps[stream] = nn.Linear(width, kept, device="meta"), nn.Linear(kept, width, device="meta")
        return PrunedFfnMaps(maps)

    def exported(self, module: PrunedFfnMaps, block: int, structure: TeacherStructure) -> dict[str, Any]:
        return {"hidden": {stream: module.maps(stream)[0].out_features for stream in module.up}}

    def stream_parameters(self, teacher: ParameterCounts, stream: str) -> int:
        return teacher.ffns[self.block][stream]

    def least_brought(self, teacher: ParameterCounts, structure: TeacherStructure, student_keep: int) -> dict[str, int]:
        kept = kept_parameters(teacher, structure, self.block, self.keep_percent)
        return {f"{stream}.weight": parameters for stream, parameters in kept.items()}


def kept_parameters(
    teacher: ParameterCounts, structure: TeacherStructure, block: int, keep_percent: int
) -> dict[str, int]:
    """By stream, parameters of a block's FFN with `keep_percent` of its hidden units; its last bias counts in part."""
    sizes = {}
    for stream, where in structure.parts(block).items():
        hidden = linear_at(structure.blocks[block], structure.adapter.ffn_maps(where)[0]).out_features
        sizes[stream] = teacher.ffns[block][stream] * max(1, round(hidden * keep_percent / 100)) // hidden
    return sizes


@torch.no_grad()
def kept_units(kept: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """Which rows of `weight (h, d)` those of `kept (k, d)` come from, `(k,)`: the ones they are most alike.

    They are the same rows until fine-tuning moves them. `O(h k d)`, in blocks of rows.
    """
    kept, weight = host_original(kept).float(), host_original(weight).float()
    weight = F.normalize(weight, dim=1)
    return torch.cat([(F.normalize(rows, dim=1) @ weight.T).argmax(1) for rows in kept.split(_ROWS)])


def hidden_units(block: nn.Module, structure: TeacherStructure, number: int) -> dict[str, int]:
    """By stream, the hidden units of the FFNs of a block that is built as the teacher's block `number` is."""
    ups = {stream: structure.adapter.ffn_maps(where)[0] for stream, where in structure.parts(number).items()}
    return {stream: linear_at(block, path).out_features for stream, path in ups.items()}
