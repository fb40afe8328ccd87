"""What can be refused of the configured variants before anything is trained for them."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace

from ppcl.config.schema import Variants
from ppcl.errors import UserError
from ppcl.models.teacher import Teacher
from ppcl.replacements import Replacement
from ppcl.replacements.parameter_counts import ParameterCounts, parameter_counts
from ppcl.replacements.replacement import TeacherStructure
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
    counts = parameter_counts(teacher, {})
    structure = TeacherStructure(teacher.adapter, teacher.empty_transformer())
    brought = {replacement: replacement.least_brought(counts, structure, student_hidden) for replacement in plan}
    return replace(counts, replacements=brought)
