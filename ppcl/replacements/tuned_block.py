"""The teacher's own block with other weights, where one plan is fine-tuned in full (as PPCL fine-tunes).

It has the structure of the teacher's block, so a plan has as many parameters with it as without. No plan names it: the
one that was trained in full takes it along, see `ppcl.replacements.finetuned_selection`.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import nn

from ppcl.models.block_view import view
from ppcl.models.lora_linear import LoraLinear
from ppcl.replacements.replacement import Assembly, OneBlock, Replacement, TeacherStructure

if TYPE_CHECKING:
    from ppcl.models.teacher import Teacher
    from ppcl.replacements.parameter_counts import ParameterCounts


class LeftOut(nn.Identity):
    """A part of a tuned block that its plan does not run, such as an FFN that another replacement stands for."""


@dataclass(frozen=True)
class TunedBlock(OneBlock[nn.Module]):
    """Block `block`, which stays in a plan and was trained with it. Its module is a stock block.

    FFNs, text runs and modulations of the plan are put into it as they are into the teacher's.
    """

    label = "tuned block"
    text_form = re.compile(r"block:(?P<block>\d+)")
    file_form = re.compile(r"block-(?P<block>\d+)")
    # The other kinds make their views of it.
    assembly_order = -1
    in_plans = False

    @property
    def phrase(self) -> str:
        return f"the tuned block {self.block}"

    def __str__(self) -> str:
        return f"block:{self.block}"

    @property
    def name(self) -> str:
        return f"block-{self.block:02d}"

    @property
    def where(self) -> str:
        return str(self.block)

    def empty_module(
        self, tensors: Mapping[str, torch.Tensor], metadata: Mapping[str, str], teacher: Teacher
    ) -> nn.Module:
        block = teacher.adapter.blocks(teacher.empty_transformer())[self.block]
        own = [path for path, names in own_tensors(block).items() if not any(name in tensors for name in names)]
        return without_parts(block, own)

    def assemble(self, module: nn.Module, variant: Assembly) -> None:
        """It stands for the teacher's block, whose parts it takes where it has none, and whose LoRA."""
        structure = variant.structure
        own = structure.blocks[self.block]
        parts: dict[str, nn.Module] = {
            path: own.get_submodule(path) for path, part in module.named_modules() if isinstance(part, LeftOut)
        }
        for path, part in own.named_modules(remove_duplicate=False):
            if isinstance(part, LoraLinear) and path not in parts:
                parts[path] = part.rows(module.get_submodule(path), slice(None))
        block = view(module, parts)
        blocks = [*structure.blocks[: self.block], block, *structure.blocks[self.block + 1 :]]
        variant.structure = TeacherStructure(structure.adapter, structure.transformer, blocks)
        variant.standing[self.block] = block

    def parameters_removed(self, teacher: ParameterCounts, within: Replacement | None) -> int:
        return 0

    def parameters_brought(self, sizes: Mapping[str, int], teacher: ParameterCounts, within: Replacement | None) -> int:
        # As many as the teacher's, which it stands for.
        return 0

    def least_brought(self, teacher: ParameterCounts, structure: TeacherStructure, student_keep: int) -> dict[str, int]:
        return {}


def own_tensors(block: nn.Module) -> dict[str, list[str]]:
    """By path of a block's sub-modules with tensors of their own, the names of these in the block."""
    found: dict[str, list[str]] = {}
    for name in block.state_dict():
        found.setdefault(name.rpartition(".")[0], []).append(name)
    return found


def without_parts(block: nn.Module, paths: Iterable[str]) -> nn.Module:
    """The block itself, with some of its parts left out."""
    for path in paths:
        block.set_submodule(path, LeftOut())
    return block
