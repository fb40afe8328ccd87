"""How people write a plan: the grammar of `3-5,text:6-8,ffn:9/50,modulations`, which the configuration checks too."""

from __future__ import annotations

import re

INTERVAL = r"(?P<first>\d+)-(?P<last>\d+)"
TEXT_RUN = r"text:(?P<first>\d+)-(?P<last>\d+)"
LINEAR_FFN = r"ffn:(?P<block>\d+)"
# Percent of the hidden units that stay, 1 to 99: what keeps none or all of them is written otherwise.
PRUNED_FFN = r"ffn:(?P<block>\d+)/(?P<keep_percent>0*[1-9]\d?)"
# Percent of the attention heads that stay.
PRUNED_HEADS = r"heads:(?P<block>\d+)/(?P<keep_percent>0*[1-9]\d?)"
MODULATIONS = r"modulations"

PLAN_SYNTAX = (
    "intervals as 3-5, text runs as text:3-5, FFNs as ffn:3, or ffn:3/50 for half of their hidden units, "
    "heads:3/50 for half of a block's attention heads, all modulations as modulations, with commas between"
)


_FORMS = tuple(re.compile(form) for form in (INTERVAL, TEXT_RUN, LINEAR_FFN, PRUNED_FFN, PRUNED_HEADS, MODULATIONS))


def is_replacement(text: str) -> bool:
    """Whether a text is written as one replacement; it may still name what a teacher does not have."""
    return any(form.fullmatch(text) for form in _FORMS)


def is_plan(text: str) -> bool:
    """Whether a text is written as a plan: replacements with commas between."""
    return all(map(is_replacement, text.split(",")))
