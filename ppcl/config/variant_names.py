"""What the named variants of a configuration are called."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

from ppcl.config.plan_syntax import is_plan
from ppcl.errors import UserError

if TYPE_CHECKING:
    from ppcl.config.schema import Variants

TEACHER = "teacher"
ALL = "all"

# A name is also a folder of images and a part of an address.
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")


def budget_name(budget: float) -> str:
    """`p75` for 0.75."""
    return f"p{budget * 100:g}"


def blocks_name(blocks: int) -> str:
    """`b40` for 40 blocks that run."""
    return f"b{blocks}"


def names_of(settings: Variants) -> list[str]:
    """The names of the variants of a configuration without the teacher.

    Raises `UserError` where two variants would have one name, and for what cannot be a name.
    """
    names = [TEACHER]
    by_number = {
        "variants.budgets": [budget_name(budget) for budget in settings.budgets],
        "variants.blocks": [blocks_name(blocks) for blocks in settings.blocks],
    }
    for key, made in by_number.items():
        for name in made:
            if name in names:
                raise UserError(f"{key} asks for the variant {name} twice; remove one")
            names.append(name)
    names.append(ALL)
    by_name = {"variants.targets": list(settings.targets), "variants.custom": list(settings.custom)}
    for key, given in by_name.items():
        for name in given:
            if name in names:
                raise UserError(f"{key}: the name {name!r} is taken by a variant made anyway; choose another")
            if not _NAME.fullmatch(name):
                raise UserError(f"{key}: {name!r} is not a valid variant name; use letters, digits, '.', '_' and '-'")
            if is_plan(name):
                raise UserError(f"{key}: {name!r} reads as a plan and cannot name a variant; choose another name")
            names.append(name)
    return names[1:]
