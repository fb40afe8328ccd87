"""How people write a plan: the grammar of `3-5,text:6-8,ffn:9/50,modulations`, which the configuration checks too."""

from __future__ import annotations

import re

REPLACEMENT = re.compile(
    r"ffn:(?P<block>\d+)(?:/(?P<kept>0*[1-9]\d?))?|(?P<text>text:)?(?P<first>\d+)-(?P<last>\d+)|modulations"
)
"""One replacement. `kept`: percent of the hidden units that FFNs keep, 1 to 99."""

PLAN_SYNTAX = (
    "intervals as 3-5, text runs as text:3-5, FFNs as ffn:3, or ffn:3/50 for half of their hidden units, all "
    "modulations as "
    "modulations, with commas between"
)


def is_plan(text: str) -> bool:
    """Whether a text is written as a plan; it may still name what a teacher does not have."""
    return all(REPLACEMENT.fullmatch(part) for part in text.split(","))
