"""What can be refused of the configured variants before anything is trained for them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace

from torch import nn

from ppcl.config.schema import Variants
from ppcl.errors import UserError
from ppcl.models import ModelAdapter
from ppcl.models.teacher import Teacher
from ppcl.replacements.parameter_counts import ParameterCounts, parameter_counts
from ppcl.replacements.plan import Ffn, Interval, LowRankModulation, Replacement
from ppcl.search.pareto import choose_blocks, pareto_front
from ppcl.search.variants import custom_plans, names_of


def check_variants(settings: Variants, block_ranges: list[range]) -> None:
    """Check the names of all variants, and the custom plans against the teacher's blocks.

    Raises `UserError` that names the key.
    """
    names_of(settings)
    custom_plans(settings, block_ranges)


def check_reachable(
    settings: Variants, plan: Iterable[Replacement], block_ranges: list[range], optimistic: ParameterCounts
) -> None:
    """Check the variants against the detected `plan`: custom plans are part of it, and it saves what is asked for.

    `optimistic`: see `optimistic_counts`. Speed is not known before training. Raises `UserError` that names the key.
    """
    # The front ends with the plan that saves most, whatever replacements cost.
    costs = dict.fromkeys(plan, 1.0)
    custom_plans(settings, block_ranges, costs)
    for most in settings.blocks:
        choose_blocks(most, optimistic.blocks, costs)
    smallest = 1 - int(pareto_front(optimistic, costs).saved[-1, 0]) / optimistic.total
    asked = {"variants.budgets": settings.budgets} | {
        f"variants.targets.{name}.parameters": [target.parameters]
        for name, target in settings.targets.items()
        if target.parameters is not None
    }
    for key, shares in asked.items():
        for share in shares:
            if share < smallest:
                raise UserError(
                    f"{key}: {share:g} of the parameters cannot be met; even with every detected replacement on, "
                    f"at least {smallest:.4f} of them remain; give a larger share or detect more (section width)"
                )


def optimistic_counts(teacher: Teacher, plan: Iterable[Replacement], student_hidden: int) -> ParameterCounts:
    """Parameter counts before training, in which each replacement brings at most what it will really bring.

    `student_hidden`: percent of their hidden units that the students' FFNs keep.
    """
    counts, model, adapter = parameter_counts(teacher, {}), teacher.empty_transformer(), teacher.adapter
    brought = {entry: _least_brought(entry, counts, model, adapter, student_hidden) for entry in plan}
    return replace(counts, replacements=brought)


def _least_brought(
    replacement: Replacement, counts: ParameterCounts, model: nn.Module, adapter: ModelAdapter, student_hidden: int
) -> Mapping[str, int]:
    """Parameters by tensor name, at most those of the trained replacement."""

    def pruned(block: int, percent: int) -> dict[str, int]:
        """By stream, of an FFN that keeps so many percent of its hidden units; its second bias is not counted whole."""
        parts = adapter.parts_of(model, block, blocks[block])
        sizes = {}
        for stream, where in parts.items():
            up = blocks[block].get_submodule(f"{where.ffn}.{adapter.ffn_up}")
            hidden = up.get_parameter("weight").shape[0]
            sizes[stream] = counts.ffns[block][stream] * max(1, round(hidden * percent / 100)) // hidden
        return sizes

    blocks = adapter.blocks(model)
    match replacement:
        case Interval():
            # A student is one of the interval's blocks, with fewer hidden units and possibly affine maps behind it.
            without_ffn = {b: counts.blocks[b] - sum(counts.ffns.get(b, {}).values()) for b in replacement.blocks}
            return {"block": min(size + sum(pruned(b, student_hidden).values()) for b, size in without_ffn.items())}
        case Ffn(block, percent) if percent:
            return {f"{stream}.weight": size for stream, size in pruned(block, percent).items()}
        case Ffn(block):
            return {f"{stream}.weight": counts.width**2 for stream in counts.ffns[block]}
        case LowRankModulation():
            return {"directions": 0}
        case _:
            return {}
