"""From modules to the block map of a variant: the block at each block number with a plan on."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

from torch import nn

from ppcl.models import ModelAdapter
from ppcl.replacements.replacement import Assembly, Replacement, TeacherStructure


def block_map(
    adapter: ModelAdapter,
    transformer: nn.Module,
    blocks: Sequence[nn.Module],
    modules: Mapping[Replacement, nn.Module],
    plan: Iterable[Replacement],
) -> dict[int, nn.Module]:
    """The block at each block number with a plan on; the blocks not named stay the teacher's.

    `blocks`: the teacher's own, by number; `transformer`: locates their parts. A variant keeps the block lists
    at their length: a student stands at `u`, pass-throughs at `u+1..v`, views of the teacher's blocks elsewhere.
    """
    plan = sorted(plan, key=lambda replacement: replacement.assembly_order)
    assembly = Assembly(TeacherStructure(adapter, transformer, blocks), {r: modules[r] for r in plan})
    for replacement in plan:
        replacement.assemble(modules[replacement], assembly)
    return assembly.standing
