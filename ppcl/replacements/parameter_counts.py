"""Parameter counts: of a teacher, and of what is left of it with a plan on. No weight is loaded for them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from torch import nn

from ppcl.models.teacher import Teacher
from ppcl.replacements.io import stored_sizes
from ppcl.replacements.plan import Ffn, Interval, LowRankModulation, Replacement, TextRun


@dataclass(frozen=True)
class ParameterCounts:
    """Parameter counts: of the whole transformer, of each block, of what each replacement takes away and brings.

    `replacements`: by replacement, the numbers each tensor of its file holds. `ffns`: by block and stream, parameters of the FFN,
    and `chunks` of its part of the modulation, which a linear map takes away too; `texts`: by block, those that a text run takes away. `rows`: by block and stream, what
    its modulation gives, of which folding makes each `width` parameters cheaper.
    """

    total: int
    blocks: tuple[int, ...]
    replacements: Mapping[Replacement, Mapping[str, int]]
    ffns: Mapping[int, Mapping[str, int]] = field(default_factory=dict)
    chunks: Mapping[int, Mapping[str, int]] = field(default_factory=dict)
    texts: Mapping[int, int] = field(default_factory=dict)
    rows: Mapping[int, Mapping[str, int]] = field(default_factory=dict)
    width: int = 0

    def saved(self, replacement: Replacement, within: TextRun | None = None, folded: bool = False) -> int:
        """Parameters fewer with an replacement on; of an FFN `within` a text run that is on, where its text part is gone.

        `folded`: with the modulations folded, of which what is replaced needs none.
        """
        if isinstance(replacement, LowRankModulation):
            every_row = sum(sum(rows.values()) for rows in self.rows.values())
            return every_row * self._folding() - sum(self.replacements[replacement].values())
        saved = self._unfolded(replacement, within)
        return saved - self._rows(replacement, within) * self._folding() if folded else saved

    def _folding(self) -> int:
        """Parameters fewer for each row of a modulation that is folded."""
        directions = self.replacements[LowRankModulation()]["directions"]
        return self.width - directions // self.width

    def _rows(self, replacement: Replacement, within: TextRun | None) -> int:
        """Rows of modulations that an replacement takes away."""
        if isinstance(replacement, Interval):
            # A single-stream block has none.
            rows = [sum(self.rows.get(block, {}).values()) for block in replacement.blocks]
            return sum(rows) - rows[0]
        if isinstance(replacement, TextRun):
            return sum(self.rows[block]["txt"] for block in replacement.blocks[1:])
        return 0 if replacement.keep_percent else 3 * self.width * len(self._streams(replacement, within))

    def _streams(self, replacement: Ffn, within: TextRun | None) -> set[str]:
        return (
            {"img"} if within is not None and replacement.block != within.first else set(self.ffns[replacement.block])
        )

    def _unfolded(self, replacement: Replacement, within: TextRun | None) -> int:
        brought = self.replacements[replacement]
        if isinstance(replacement, Interval):
            return sum(self.blocks[block] for block in replacement.blocks) - sum(brought.values())
        if isinstance(replacement, TextRun):
            return sum(self.texts[block] for block in replacement.blocks[1:]) - sum(brought.values())
        streams = self._streams(replacement, within)
        gone = sum(
            self.ffns[replacement.block][s] + (0 if replacement.keep_percent else self.chunks[replacement.block][s])
            for s in streams
        )
        # Tensors are called `img.weight`, or `up.img.weight`.
        return gone - sum(size for name, size in brought.items() if streams & set(name.split(".")))

    def parameters(self, plan: Iterable[Replacement]) -> int:
        """What is left with a plan on, whose replacements do not clash."""
        plan = list(plan)
        folded = LowRankModulation() in plan
        return self.total - sum(self.saved(replacement, _run_around(replacement, plan), folded) for replacement in plan)

    def running(self, plan: Iterable[Replacement]) -> int:
        """Blocks that run with a plan on."""
        return len(self.blocks) - sum(replacement.removed for replacement in plan)


def _run_around(replacement: Replacement, plan: Iterable[Replacement]) -> TextRun | None:
    """The text run of a plan that an FFN lies in."""
    if not isinstance(replacement, Ffn):
        return None
    return next((run for run in plan if isinstance(run, TextRun) and replacement.block in run.blocks), None)


def count_parameters(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def parameter_counts(teacher: Teacher, files: Mapping[Replacement, Path]) -> ParameterCounts:
    """Counted without loading a weight: the teacher's from its structure, a replacement's from its file's header."""
    model, adapter = teacher.empty_transformer(), teacher.adapter
    blocks = adapter.blocks(model)
    ffns: dict[int, dict[str, int]] = {}
    chunks: dict[int, dict[str, int]] = {}
    texts: dict[int, int] = {}
    rows: dict[int, dict[str, int]] = {}
    width = 0
    for number, block in enumerate(blocks):
        for stream, where in adapter.parts_of(model, number, block).items():
            modulation, ffn = block.get_submodule(where.modulation), count_parameters(block.get_submodule(where.ffn))
            width = modulation.in_features
            rows.setdefault(number, {})[stream] = modulation.out_features
            # Shift, scale and gate of the FFN: three chunks of the modulation.
            ffns.setdefault(number, {})[stream] = ffn
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
    )
