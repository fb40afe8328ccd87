"""Parameter counts: of a teacher, and of what is left of it with a plan on. No weight is loaded for them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from torch import nn

from ppcl.models import FusedParts, ModelAdapter, Parts
from ppcl.models.block_view import linear_at
from ppcl.models.fused_output import unfused
from ppcl.models.teacher import Teacher
from ppcl.replacements.io import stored_sizes
from ppcl.replacements.low_rank_modulation import LowRankModulation
from ppcl.replacements.plan import enclosing
from ppcl.replacements.pruned_heads import HeadPaths
from ppcl.replacements.replacement import Replacement


@dataclass(frozen=True)
class ParameterCounts:
    """Parameter counts: of the whole transformer, of each block, of what each replacement takes away and brings.

    `replacements`: by replacement, the numbers each tensor of its file holds. By block and stream: `ffns`, parameters
    of the FFN; `chunks`, those of its three chunks of the modulation, which a linear map takes away too; `rows`, what
    the modulation gives, of which low rank makes each `width` parameters cheaper. `texts`: by block, the parameters
    that a text run takes away. `attentions`: by block, those of the maps before and after its attention's heads.
    """

    total: int
    blocks: tuple[int, ...]
    replacements: Mapping[Replacement, Mapping[str, int]]
    ffns: Mapping[int, Mapping[str, int]] = field(default_factory=dict)
    chunks: Mapping[int, Mapping[str, int]] = field(default_factory=dict)
    texts: Mapping[int, int] = field(default_factory=dict)
    rows: Mapping[int, Mapping[str, int]] = field(default_factory=dict)
    width: int = 0
    attentions: Mapping[int, int] = field(default_factory=dict)

    def saved(self, replacement: Replacement, within: Replacement | None = None, low_rank: bool = False) -> int:
        """Parameters fewer with a replacement on.

        `within`: the replacement that is on around it, such as the text run around an FFN, where its text part is gone.
        `low_rank`: with the modulations in low rank, of which what is replaced needs none.
        """
        brought = replacement.parameters_brought(self.replacements[replacement], self, within)
        saved = replacement.parameters_removed(self, within) - brought
        if low_rank and (rows := replacement.modulation_rows_removed(self, within)):
            saved -= rows * self.parameters_per_row_saved()
        return saved

    def parameters_per_row_saved(self) -> int:
        """Parameters fewer for each row of a modulation in low rank, which must be among the replacements."""
        directions = self.replacements[LowRankModulation()]["directions"]
        return self.width - directions // self.width

    def parameters(self, plan: Iterable[Replacement]) -> int:
        """What is left with a plan on, whose replacements do not conflict."""
        plan = list(plan)
        low_rank = LowRankModulation() in plan
        return self.total - sum(self.saved(one, enclosing(one, plan), low_rank) for one in plan)

    def running(self, plan: Iterable[Replacement]) -> int:
        """Blocks that run with a plan on."""
        return len(self.blocks) - sum(replacement.removed for replacement in plan)


def count_parameters(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def ffn_parameters(adapter: ModelAdapter, block: nn.Module, where: Parts) -> int:
    """Parameters of one stream's FFN in a stock block; those of a fused one with the bias of the output projection."""
    if not isinstance(where, FusedParts):
        return count_parameters(block.get_submodule(where.ffn))
    block = unfused(block, [where])
    return sum(_numbers(linear_at(block, path)) for path in adapter.ffn_maps(where))


def attention_parameters(block: nn.Module, paths: HeadPaths) -> int:
    """Parameters of a stock block's maps before and after its attention's heads."""
    block = unfused(block, paths.fused)
    # A fused bias is changed and stays, whatever else is.
    biases = sum(linear_at(block, where.ffn_down).out_features for where in paths.fused)
    return sum(_numbers(linear_at(block, path)) for path in paths.all) + biases


def _numbers(linear: nn.Linear) -> int:
    # Not its parameters: a part of a fused map may hold all of that.
    return linear.weight.numel() + (0 if linear.bias is None else linear.bias.numel())


def parameter_counts(teacher: Teacher, files: Mapping[Replacement, Path]) -> ParameterCounts:
    """Counted without loading a weight: the teacher's from its structure, a replacement's from its file's header."""
    model, adapter = teacher.empty_transformer(), teacher.adapter
    blocks = adapter.blocks(model)
    ffns: dict[int, dict[str, int]] = {}
    chunks: dict[int, dict[str, int]] = {}
    texts: dict[int, int] = {}
    rows: dict[int, dict[str, int]] = {}
    attentions: dict[int, int] = {}
    width = 0
    for number, block in enumerate(blocks):
        parts = adapter.parts_of(model, number, block)
        if parts:
            attentions[number] = attention_parameters(block, HeadPaths.of(adapter, model, number, block))
        for stream, where in parts.items():
            modulation, ffn = linear_at(block, where.modulation), ffn_parameters(adapter, block, where)
            width = modulation.in_features
            rows.setdefault(number, {})[stream] = modulation.out_features
            ffns.setdefault(number, {})[stream] = ffn
            if isinstance(where, FusedParts):
                continue
            # Shift, scale and gate of the FFN: three chunks of the modulation.
            chunks.setdefault(number, {})[stream] = 3 * width * (modulation.in_features + (modulation.bias is not None))
            if stream == "txt":
                texts[number] = ffn + count_parameters(modulation) + count_parameters(block.get_submodule(where.out))
    return ParameterCounts(
        count_parameters(model),
        tuple(map(count_parameters, blocks)),
        {replacement: stored_sizes(path) for replacement, path in files.items()},
        ffns,
        chunks,
        texts,
        rows,
        width,
        attentions,
    )
