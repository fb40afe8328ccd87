"""Attention with fewer heads. Which ones stay, and what the output projections then are, is a least-squares problem.

See `ppcl.linalg.elimination.eliminate_groups`: one elimination gives every number of heads. A head gives inputs to the
output projections of both streams and leaves both. Not in the PPCL paper.

The attention itself is the stock one: a view of it with smaller maps that says how many heads there are.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import nn

from ppcl.config import plan_syntax
from ppcl.linalg import PrunedGroups
from ppcl.models import FusedParts, ModelAdapter, Streams
from ppcl.models.block_view import linear_at, linear_rows, new_linear, view
from ppcl.models.fused_output import FusedOutput, unfused
from ppcl.models.lora_linear import LoraLinear
from ppcl.replacements.ffn import Ffn
from ppcl.replacements.replacement import Assembly, OneBlock, Replacement, TeacherStructure

if TYPE_CHECKING:
    from ppcl.models.teacher import Teacher
    from ppcl.replacements.parameter_counts import ParameterCounts


@dataclass(frozen=True)
class HeadPaths:
    """Where a block has what its heads are made of.

    `attention`: the path of the attention. By stream: `qkv`, those of the maps that give queries, keys and values, and
    `out`, that of the output projection, for the streams that the block does not drop. `fused`: those parts whose
    output projection reads hidden units too; `out` is then a part of it, in a block as `unfused` gives it.
    """

    attention: str
    qkv: Mapping[str, tuple[str, ...]]
    out: Mapping[str, str]
    fused: tuple[FusedParts, ...] = ()

    @classmethod
    def of(cls, adapter: ModelAdapter, transformer: nn.Module, number: int, block: nn.Module) -> HeadPaths:
        """Of the teacher's block `number`, or of one that is built alike."""
        parts = adapter.parts_of(transformer, number, block)
        return cls(
            adapter.attention,
            {stream: where.qkv for stream, where in adapter.parts_read(transformer, number).items()},
            {stream: where.out for stream, where in parts.items()},
            tuple(where for where in parts.values() if isinstance(where, FusedParts)),
        )

    @property
    def all(self) -> list[str]:
        return [path for paths in self.qkv.values() for path in paths] + list(self.out.values())

    def heads(self, block: nn.Module) -> int:
        """How many heads a stock block has."""
        return cast(int, block.get_submodule(self.attention).heads)

    def head_width(self, block: nn.Module) -> int:
        """What one head gives to an output projection."""
        return linear_at(block, self.qkv["img"][0]).out_features // self.heads(block)

    def inputs(self, block: nn.Module, heads: Sequence[int]) -> torch.Tensor:
        """The numbers of what some heads give: rows of `qkv`, columns of `out`."""
        width = self.head_width(block)
        return (torch.tensor(heads)[:, None] * width + torch.arange(width)).flatten()


class PrunedHeadMaps(nn.Module):
    """The maps before and after the heads that stay, by stream. `heads`: their numbers in the block's own attention."""

    def __init__(
        self, heads: Sequence[int], qkv: Mapping[str, Sequence[nn.Linear]], out: Mapping[str, nn.Linear]
    ) -> None:
        super().__init__()
        self.heads = tuple(heads)
        self.qkv = nn.ModuleDict({stream: nn.ModuleList(maps) for stream, maps in qkv.items()})
        self.out = nn.ModuleDict(dict(out))

    @classmethod
    def new(cls, block: nn.Module, paths: HeadPaths, keep_percent: int) -> PrunedHeadMaps:
        """With the first heads of the block's own; see `kept_heads`."""
        block = unfused(block, paths.fused)
        heads = range(kept_heads(paths.heads(block), keep_percent))
        rows = paths.inputs(block, heads)
        qkv = {stream: [linear_rows(linear_at(block, p), rows) for p in each] for stream, each in paths.qkv.items()}
        return cls(heads, qkv, {stream: _columns_of(linear_at(block, p), rows) for stream, p in paths.out.items()})

    @torch.no_grad()
    def set(self, block: nn.Module, paths: HeadPaths, pruned: PrunedGroups) -> None:
        """Take the heads of the block's own, and the output projections that belong to them, in the order of `out`."""
        self.heads = tuple(pruned.groups.tolist())
        rows = paths.inputs(block, self.heads)
        for stream, each in paths.qkv.items():
            for number, path in enumerate(each):
                _set(linear_at(self.qkv[stream], str(number)), linear_rows(linear_at(block, path), rows))
        for stream, solved in zip(paths.out, pruned.maps, strict=True):
            out = linear_at(self.out, stream)
            out.weight.copy_(solved.weight)
            out.bias.copy_(solved.bias)

    def replaced_parts(self, block: nn.Module, paths: HeadPaths) -> dict[str, nn.Module]:
        """By path in the block, what to put there; a LoRA of the block's own is cut to the heads that stay.

        `block`: as `unfused` gives it.
        """
        rows = paths.inputs(block, self.heads)
        replaced: dict[str, nn.Module] = {}
        for stream, each in paths.qkv.items():
            for number, path in enumerate(each):
                own, made = block.get_submodule(path), linear_at(self.qkv[stream], str(number))
                replaced[path] = own.rows(made, rows) if isinstance(own, LoraLinear) else made
        for stream, path in paths.out.items():
            own, made = block.get_submodule(path), linear_at(self.out, stream)
            replaced[path] = own.columns(made, rows) if isinstance(own, LoraLinear) else made
        return replaced


def with_heads(block: nn.Module, paths: HeadPaths, maps: PrunedHeadMaps) -> nn.Module:
    """A view of a block whose attention has the heads of `maps` alone."""
    # Here, since it imports diffusers.
    from ppcl.models.pruned_transformer import set_heads

    block = unfused(block, paths.fused)
    made = view(block, maps.replaced_parts(block, paths))
    for where in paths.fused:
        output = made.get_submodule(where.fused)
        assert isinstance(output, FusedOutput)
        output.join_biases()
    # The view has its own attention, since maps in it were exchanged.
    set_heads(made.get_submodule(paths.attention), len(maps.heads))
    return made


@dataclass(frozen=True)
class PrunedHeads(OneBlock[PrunedHeadMaps]):
    """Block `block`, whose attention keeps `keep_percent` percent of its heads, 1 to 99."""

    label = "heads"
    text_form = re.compile(plan_syntax.PRUNED_HEADS)
    file_form = re.compile(r"heads-(?P<block>\d+)-(?P<keep_percent>0*[1-9]\d?)")
    # On what stands for the block's FFNs by then.
    assembly_order = 1

    keep_percent: int

    def contains(self, other: Replacement) -> bool:
        """An FFN of the same block can be replaced too: they share no parameter."""
        return isinstance(other, Ffn) and other.block == self.block

    @property
    def detail(self) -> int:
        return self.keep_percent

    @property
    def phrase(self) -> str:
        return f"the heads {str(self).removeprefix('heads:')}"

    def __str__(self) -> str:
        return f"heads:{self.block}/{self.keep_percent}"

    @property
    def name(self) -> str:
        return f"heads-{self.block:02d}-{self.keep_percent:02d}"

    @property
    def where(self) -> str:
        return f"{self.block}, {self.keep_percent} % kept"

    def empty_module(
        self, tensors: Mapping[str, torch.Tensor], metadata: Mapping[str, str], teacher: Teacher
    ) -> PrunedHeadMaps:
        def empty(name: str) -> nn.Linear:
            outputs, inputs = tensors[f"{name}.weight"].shape
            return nn.Linear(inputs, outputs, bias=f"{name}.bias" in tensors, device="meta")

        qkv = {s: [empty(f"qkv.{s}.{i}") for i in range(3)] for s in Streams._fields if f"qkv.{s}.0.weight" in tensors}
        out = {s: empty(f"out.{s}") for s in Streams._fields if f"out.{s}.weight" in tensors}
        return PrunedHeadMaps([int(head) for head in metadata["heads"].split(",")], qkv, out)

    def metadata(self, module: PrunedHeadMaps) -> dict[str, str]:
        return {"heads": ",".join(map(str, module.heads))}

    def assemble(self, module: PrunedHeadMaps, variant: Assembly) -> None:
        structure, own = variant.structure, variant.structure.blocks[self.block]
        here = variant.standing.get(self.block, own)
        paths = HeadPaths.of(structure.adapter, structure.transformer, self.block, own)
        variant.standing[self.block] = with_heads(here, paths, module)

    def exported(self, module: PrunedHeadMaps, block: int, structure: TeacherStructure) -> dict[str, Any]:
        return {"heads": len(module.heads)}

    def parameters_removed(self, teacher: ParameterCounts, within: Replacement | None) -> int:
        return teacher.attentions[self.block]

    def least_brought(self, teacher: ParameterCounts, structure: TeacherStructure, student_keep: int) -> dict[str, int]:
        block = structure.blocks[self.block]
        paths = HeadPaths.of(structure.adapter, structure.transformer, self.block, block)
        kept = kept_heads(paths.heads(block), self.keep_percent)
        return {"maps": parameters_of_heads(block, paths, kept)}


def kept_heads(heads: int, keep_percent: int) -> int:
    """`keep_percent` of the heads, rounded: at least one, and one fewer than there are."""
    return max(1, min(heads - 1, round(heads * keep_percent / 100)))


def parameters_of_heads(block: nn.Module, paths: HeadPaths, heads: int) -> int:
    """Parameters of a stock block's maps before and after its attention, with some of its heads."""
    width = heads * paths.head_width(block)
    before = [linear_at(block, path) for each in paths.qkv.values() for path in each]
    behind = [linear_at(unfused(block, paths.fused), path) for path in paths.out.values()]
    # What the heads that go say on average goes into a bias.
    return sum(width * (one.in_features + (one.bias is not None)) for one in before) + sum(
        one.out_features * (width + 1) for one in behind
    )


def _columns_of(linear: nn.Linear, columns: torch.Tensor) -> nn.Linear:
    # What the heads that go say on average goes into the bias.
    bias = linear.weight.new_zeros(linear.out_features) if linear.bias is None else linear.bias
    return new_linear(linear.weight[:, columns], bias)


def _set(linear: nn.Linear, values: nn.Linear) -> None:
    for parameter, value in zip(linear.parameters(), values.parameters(), strict=True):
        parameter.copy_(value)
