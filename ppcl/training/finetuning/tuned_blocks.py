"""Which of the teacher's own blocks a plan keeps, and copies of them to train with it (PPCL fine-tunes all parameters).

Embedders, final norm and head stay the teacher's: they are no part of any replacement.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from torch import nn

from ppcl.models.teacher import Teacher
from ppcl.replacements import Replacement, TunedBlock
from ppcl.replacements.assembly import block_map
from ppcl.replacements.io import empty_replacement, stored_sizes
from ppcl.replacements.parameter_counts import count_parameters
from ppcl.replacements.replacement import TeacherStructure
from ppcl.replacements.tuned_block import own_tensors, without_parts


def tuned_blocks(teacher: Teacher, files: Mapping[Replacement, Path]) -> dict[TunedBlock, list[str]]:
    """The blocks that stay with the plan `files` on, and the paths of those parts of each that the plan does not run.

    From structure alone; no weight is read.
    """
    # As if in training: then modulations stay whole, as they do there.
    structure = TeacherStructure(teacher.adapter, teacher.empty_transformer().requires_grad_(True))
    modules = {one: empty_replacement(path, teacher) for one, path in files.items()}
    standing = block_map(teacher.adapter, structure.transformer, structure.blocks, modules, modules)
    gone = {number for one in files if one.removed for number in one.blocks}
    found = {}
    for number, block in enumerate(structure.blocks):
        if number not in gone:
            runs = {id(tensor) for tensor in standing.get(number, block).state_dict(keep_vars=True).values()}
            own = block.state_dict(keep_vars=True)
            found[TunedBlock(number)] = [
                path for path, names in own_tensors(block).items() if not any(id(own[name]) in runs for name in names)
            ]
    return found


def bytes_in_full(teacher: Teacher, files: Mapping[Replacement, Path], dtype: torch.dtype) -> int:
    """What a plan trained in full takes in memory beside the teacher: its replacements and its own blocks."""
    count = sum(sum(stored_sizes(path).values()) for path in files.values())
    blocks = teacher.adapter.blocks(teacher.empty_transformer())
    for one, left_out in tuned_blocks(teacher, files).items():
        count += count_parameters(without_parts(blocks[one.block], left_out))
    return count * dtype.itemsize


def read_block(teacher: Teacher, block: TunedBlock, left_out: Sequence[str], device: str) -> nn.Module:
    """A block to train, in float32, with the teacher's weights; reads that block alone."""
    loaded = teacher.transformer({block.block}, device=device, dtype=torch.float32, blocks_only=True)
    return without_parts(teacher.adapter.blocks(loaded)[block.block], left_out).requires_grad_(True)
