"""The base class of all kinds of replacement: a hashable specification with a text form and a module.

A specification names a part of the teacher. The module with its weights is read from a file when it is needed. All
differences between kinds are methods of this class, so no other package asks for the kind of a replacement.
"""

from __future__ import annotations

import re
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Generic, Self, TypeVar

import torch
from torch import nn

from ppcl.errors import UserError
from ppcl.models import ModelAdapter, Parts

if TYPE_CHECKING:
    from ppcl.models.teacher import Teacher
    from ppcl.replacements.parameter_counts import ParameterCounts

ModuleT = TypeVar("ModuleT", bound=nn.Module)


class Replacement(ABC, Generic[ModuleT]):
    """One part of the teacher and the kind of module that replaces it. Subclasses are frozen dataclasses.

    Class attributes of a kind: `label`, its name in reports; `text_form` and `file_form`, how it is written in plans
    and in file names, with the dataclass' fields as groups; `assembly_order`, kinds with a higher number are assembled
    later, on what stands there by then; `in_plans`, whether plans name it, or some only take it along.
    """

    label: ClassVar[str]
    text_form: ClassVar[re.Pattern[str]]
    file_form: ClassVar[re.Pattern[str]]
    assembly_order: ClassVar[int] = 0
    in_plans: ClassVar[bool] = True

    # --- What is replaced ---

    @property
    @abstractmethod
    def blocks(self) -> range:
        """The numbers of the blocks that are touched; empty where it is no contiguous part of the teacher."""

    if TYPE_CHECKING:
        # Fields of some kinds: a dataclass would take properties that are there at run time for their defaults.
        @property
        def first(self) -> int:
            """The first block touched; 0 where there is none of its own."""

        @property
        def last(self) -> int:
            """The last block touched, inclusive; 0 where there is none of its own."""

    @property
    def removed(self) -> int:
        """Blocks fewer that run with this replacement on."""
        return 0

    def contains(self, other: Replacement) -> bool:
        """Whether `other` may be on inside of this one; it then shares some of its blocks."""
        return False

    @property
    def detail(self) -> int:
        """A number that distinguishes replacements of one kind and the same blocks; they are sorted by it."""
        return 0

    @property
    def phrase(self) -> str:
        """`the interval [3, 5]`: what error messages call it."""
        return f"the {self.label} [{self.first}, {self.last}]"

    def check(self, block_lists: Sequence[range]) -> None:
        """Raise `UserError` where a teacher with these block lists has no such part."""
        if not any(self.first in numbers and self.last in numbers for numbers in block_lists):
            known = ", ".join(f"{numbers.start} to {numbers.stop - 1}" for numbers in block_lists)
            raise UserError(f"{self.phrase} does not lie within one block list; the lists hold blocks {known}")

    # --- Text ---

    @abstractmethod
    def __str__(self) -> str:
        """As plans have it, such as `3-5`. `text_form` reads it."""

    @property
    @abstractmethod
    def name(self) -> str:
        """What files and checkpoints are called, such as `03-05`. `file_form` reads it."""

    @property
    @abstractmethod
    def where(self) -> str:
        """The blocks for a table's cell, such as `3 to 5`."""

    @classmethod
    def from_match(cls, match: re.Match[str]) -> Self:
        """The specification that a match of `text_form` or `file_form` names."""
        return cls(**{field: int(value) for field, value in match.groupdict().items()})

    # --- The module ---

    @abstractmethod
    def empty_module(
        self, tensors: Mapping[str, torch.Tensor], metadata: Mapping[str, str], teacher: Teacher
    ) -> ModuleT:
        """The structure of the module that a file holds, without weights."""

    def metadata(self, module: ModuleT) -> dict[str, str]:
        """What a file notes beside the tensors."""
        return {}

    @abstractmethod
    def assemble(self, module: ModuleT, variant: Assembly) -> None:
        """Put the module into the variant's block map."""

    def exported(self, module: ModuleT, block: int, structure: TeacherStructure) -> dict[str, Any]:
        """What the configuration of an exported model says of a running block that this replacement shapes.

        The keys are those of `ppcl.models.pruned_transformer`; nothing where the block stays a stock block.
        """
        return {}

    # --- Parameter counts ---

    @abstractmethod
    def parameters_removed(self, teacher: ParameterCounts, within: Replacement | None) -> int:
        """The teacher's parameters that go with this on, `within` another replacement that contains it."""

    def parameters_brought(self, sizes: Mapping[str, int], teacher: ParameterCounts, within: Replacement | None) -> int:
        """Parameters of the module that count, of the numbers `sizes` of each of its tensors."""
        return sum(sizes.values())

    def modulation_rows_removed(self, teacher: ParameterCounts, within: Replacement | None) -> int:
        """Rows of modulations that go; with low-rank modulations on, they save nothing any more."""
        return 0

    @abstractmethod
    def least_brought(self, teacher: ParameterCounts, structure: TeacherStructure, student_keep: int) -> dict[str, int]:
        """By tensor, at most the parameters that the trained module will have; known before training.

        `student_keep`: percent of their hidden units that the FFNs of students keep.
        """


@dataclass(frozen=True)
class BlockRun(Replacement[ModuleT]):
    """A replacement of consecutive blocks `first..last`, from 0, inclusive at both ends."""

    first: int
    last: int

    @property
    def blocks(self) -> range:
        return range(self.first, self.last + 1)

    @property
    def where(self) -> str:
        return f"{self.first} to {self.last}"

    def check(self, block_lists: Sequence[range]) -> None:
        if self.first >= self.last:
            raise UserError(f"{self.phrase} has fewer than two blocks; the first must be less than the last")
        super().check(block_lists)


@dataclass(frozen=True)
class OneBlock(Replacement[ModuleT]):
    """A replacement of a part of block `block`, or of its weights."""

    block: int

    @property
    def blocks(self) -> range:
        return range(self.block, self.block + 1)

    @property
    def first(self) -> int:
        return self.block

    @property
    def last(self) -> int:
        return self.block


class TeacherStructure:
    """The teacher's blocks and where their parts are; weights are not read."""

    def __init__(self, adapter: ModelAdapter, transformer: nn.Module, blocks: Sequence[nn.Module] | None = None):
        self.adapter, self.transformer = adapter, transformer
        self.blocks = tuple(adapter.blocks(transformer)) if blocks is None else tuple(blocks)

    def parts(self, block: int) -> dict[str, Parts]:
        """By stream, the replaceable parts of a block; empty for a kind of block that has none."""
        return self.adapter.parts_of(self.transformer, block, self.blocks[block])


class Assembly:
    """The block map of a variant while its replacements are assembled.

    `standing`: by block number, the block in that position; blocks that are not named stay the teacher's.
    """

    def __init__(self, structure: TeacherStructure, modules: Mapping[Replacement, nn.Module]):
        self.structure, self.modules = structure, modules
        self.standing: dict[int, nn.Module] = {}

    def inside(self, outer: Replacement) -> Iterator[tuple[Replacement, nn.Module]]:
        """The replacements that are on inside of another, with their modules."""
        return ((other, module) for other, module in self.modules.items() if outer.contains(other))
