"""All kinds of replacement. A new kind is one file, and one line here."""

from __future__ import annotations

from collections.abc import Sequence

from ppcl.config.plan_syntax import PLAN_SYNTAX
from ppcl.errors import UserError
from ppcl.replacements.linear_ffn import LinearFfn
from ppcl.replacements.low_rank_modulation import LowRankModulation
from ppcl.replacements.pruned_ffn import PrunedFfn
from ppcl.replacements.pruned_heads import PrunedHeads
from ppcl.replacements.replacement import Replacement
from ppcl.replacements.student_block import Interval
from ppcl.replacements.text_projectors import TextRun
from ppcl.replacements.tuned_block import TunedBlock

# What plans are made of, in the order in which they list replacements that begin at the same block.
KINDS: tuple[type[Replacement], ...] = (Interval, TextRun, LinearFfn, PrunedFfn, PrunedHeads, LowRankModulation)
# What files hold.
_STORED_KINDS: tuple[type[Replacement], ...] = (*KINDS, TunedBlock)


def sort_key(replacement: Replacement) -> tuple[int, int, int]:
    """The sort key of plans: the first block, then the kind, then the replacement's `detail`."""
    return replacement.first, _STORED_KINDS.index(type(replacement)), replacement.detail


def parse_name(name: str) -> Replacement | None:
    """The replacement whose `name` this is; None where it is none."""
    matches = ((kind, kind.file_form.fullmatch(name)) for kind in _STORED_KINDS)
    return next((kind.from_match(match) for kind, match in matches if match), None)


def parse_stored(text: str) -> Replacement:
    """The replacement that a file says it holds. Raises `ValueError` where it is none."""
    matches = ((kind, kind.text_form.fullmatch(text)) for kind in _STORED_KINDS)
    found = next((kind.from_match(match) for kind, match in matches if match), None)
    if found is None:
        raise ValueError(f"{text!r} is not a replacement")
    return found


def parse_text(text: str) -> list[Replacement] | None:
    """The replacements of a text such as `3-5,text:6-8,ffn:9`, as people write them; None where it is none."""
    replacements = []
    for part in text.split(","):
        matches = ((kind, kind.text_form.fullmatch(part)) for kind in KINDS)
        replacement = next((kind.from_match(match) for kind, match in matches if match), None)
        if replacement is None:
            return None
        replacements.append(replacement)
    return replacements


def parse_replacement(value: Replacement | str | Sequence[int]) -> Replacement:
    """A replacement from what configurations and callers give: itself, `[u, v]` for an interval, or a text."""
    if isinstance(value, Replacement):
        return value
    if isinstance(value, str):
        replacements = parse_text(value)
        if replacements is None or len(replacements) != 1:
            raise UserError(f"{value!r} is not a replacement; write {PLAN_SYNTAX}")
        return replacements[0]
    first, last = map(int, value)
    return Interval(first, last)
