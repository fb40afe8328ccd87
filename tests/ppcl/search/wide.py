"""A made-up teacher of eight blocks with replacements of all kinds, small enough to try every plan."""

import itertools
from collections.abc import Iterator

from ppcl.replacements import (
    Interval,
    LinearFfn,
    LowRankModulation,
    PrunedFfn,
    PrunedHeads,
    Replacement,
    TextRun,
    conflicts,
)
from ppcl.replacements.ffn import Ffn
from ppcl.replacements.parameter_counts import ParameterCounts
from ppcl.search.latency_table import LatencyTable

WIDE = ParameterCounts(
    1000,
    (100,) * 8,
    {
        Interval(0, 2): {"w": 100},
        Interval(4, 5): {"w": 110},
        TextRun(1, 3): {"z.2.w": 5, "z.3.w": 5, "h.w": 5},
        TextRun(6, 7): {"z.7.w": 5},
        **{LinearFfn(b): {"img.w": 5, "txt.w": 4} for b in (0, 2, 3, 5, 7)},
        **{PrunedFfn(b, 50): {"up.img.w": 6, "up.txt.w": 5, "down.img.w": 6, "down.txt.w": 5} for b in (3, 5)},
        **{PrunedHeads(b, 50): {"maps": 12} for b in (3, 6)},
    },
    {b: {"img": 24, "txt": 19} for b in range(8)},
    {b: {"img": 6, "txt": 6} for b in range(8)},
    dict.fromkeys(range(8), 40),
    attentions=dict.fromkeys(range(8), 25),
)
WIDE_SENSITIVITY = dict(
    zip(
        WIDE.replacements,
        (0.31, 0.12, 0.09, 0.05, 0.04, 0.021, 0.08, 0.015, 0.033, 0.012, 0.007, 0.011, 0.002),
        strict=True,
    )
)


def wide_plans() -> Iterator[tuple[Replacement, ...]]:
    """Every choice without a clash."""
    entries = list(WIDE.replacements)
    for n in range(len(entries) + 1):
        for plan in itertools.combinations(entries, n):
            if not any(conflicts(a, b) for a, b in itertools.combinations(plan, 2)):
                yield plan


# A student saves the time of the blocks it stands for, half of the units hardly any.
WIDE_LATENCIES = LatencyTable(
    8000,
    range(8),
    {
        Interval(0, 2): 1800,
        Interval(4, 5): 900,
        TextRun(1, 3): 700,
        TextRun(6, 7): 350,
        LowRankModulation(): 40,
        **{e: 300 if isinstance(e, LinearFfn) else 60 for e in WIDE_SENSITIVITY if isinstance(e, Ffn)},
        PrunedHeads(3, 50): 90,
        PrunedHeads(6, 50): 95,
    },
    {e: 120 for e in WIDE_SENSITIVITY if isinstance(e, Ffn)},
)
