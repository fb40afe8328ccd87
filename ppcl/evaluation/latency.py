"""How long the blocks of a step take, and how much of it each replacement saves, measured where the job runs."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import nn

from ppcl.models import adapter_of, embed, run_blocks
from ppcl.replacements.plan import Ffn, LowRankModulation, Replacement, TextRun
from ppcl.replacements.switcher import VariantSwitcher
from ppcl.search.latency_table import LatencyTable

# Entries of a kind that are timed, the others taken for the same; and how often each is.
_OF_A_KIND = 3
_ROUNDS = 7


def _synchronized() -> float:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter()


def min_time(calls: Sequence[Callable[[], Any]]) -> list[float]:
    """The least seconds each call took, which is what it takes when nothing else disturbs it. The calls take turns, so that a
    drift of the machine's speed falls on all alike."""
    taken: list[list[float]] = [[] for _ in calls]
    for _ in range(_ROUNDS + 1):
        for index, call in enumerate(calls):
            begun = _synchronized()
            call()
            taken[index].append(_synchronized() - begun)
    return [min(seconds[1:]) for seconds in taken]


@torch.no_grad()
def measure_latencies(transformer: nn.Module, switch: VariantSwitcher, inputs: Mapping[str, Any]) -> LatencyTable:
    """Time the teacher and the replacements that the switch has, on one batch of the stock forward's arguments.

    Entries of one kind and length in one block list are taken for alike: some of them are timed, all get their median.
    """
    adapter = adapter_of(transformer)
    blocks, block_ranges = switch.blocks(transformer), adapter.block_ranges(transformer)
    switch(transformer, ())
    streams, context = embed(transformer, inputs)
    (total,) = min_time([lambda: transformer(**{**inputs, "return_dict": False})])

    def saving(numbers: range, before: Sequence[Replacement], after: Sequence[Replacement]) -> float:
        ways = [switch.replacements(transformer, plan) for plan in (before, after)]
        standing = [[way.get(number, blocks[number]) for number in numbers] for way in ways]
        one, other = min_time([lambda mods=mods: run_blocks(adapter, mods, streams, context) for mods in standing])
        return one - other

    groups: dict[Any, list[Replacement]] = {}
    for replacement in switch.files:
        span = next(index for index, span in enumerate(block_ranges) if replacement.first in span)
        kind = (
            0 if isinstance(replacement, LowRankModulation) else len(replacement.blocks),
            getattr(replacement, "keep_percent", None),
        )
        groups.setdefault((span, type(replacement), *kind), []).append(replacement)
    alone: dict[Replacement, int] = {}
    inside: dict[Replacement, int] = {}
    runs = [replacement for replacement in switch.files if isinstance(replacement, TextRun)]
    for group in groups.values():
        some = group[:: max(1, len(group) // _OF_A_KIND)][:_OF_A_KIND]
        whole = range(len(blocks))
        alone |= _each(group, [saving(whole if isinstance(e, LowRankModulation) else e.blocks, (), (e,)) for e in some])
        if isinstance(group[0], Ffn):
            pairs = [(run, e) for e in group for run in runs if e.block in run.blocks[1:]][:_OF_A_KIND]
            if pairs:
                inside |= _each(group, [saving(run.blocks, (run,), (run, e)) for run, e in pairs])
    return LatencyTable(round(1e6 * total), range(len(blocks)), alone, inside)


def _each(group: Sequence[Replacement], seconds: Sequence[float]) -> dict[Replacement, int]:
    return dict.fromkeys(group, round(1e6 * statistics.median(seconds)))


@torch.no_grad()
def forward_seconds(
    transformer: nn.Module, switch: VariantSwitcher, plans: Sequence[Sequence[Replacement]], inputs: Mapping[str, Any]
) -> list[float]:
    """The least seconds of one forward with each plan on. The teacher is left plugged in."""

    def forward(plan: Sequence[Replacement]) -> None:
        switch(transformer, plan)
        transformer(**{**inputs, "return_dict": False})

    try:
        return min_time([lambda plan=plan: forward(plan) for plan in plans])
    finally:
        switch(transformer, ())
