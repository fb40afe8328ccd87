"""How long the blocks of a step take, and how much of it each replacement saves, measured where the job runs."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import nn

from ppcl.models import adapter_of, embed, run_blocks
from ppcl.replacements import Replacement
from ppcl.replacements.switcher import VariantSwitcher
from ppcl.search.latency_table import LatencyTable

# Replacements of a kind that are timed, the others being alike; and rounds of timing.
_PER_KIND = 3
_ROUNDS = 7


def _synchronized() -> float:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter()


def min_time(calls: Sequence[Callable[[], Any]]) -> list[float]:
    """The least seconds each call took, which is what it takes undisturbed."""
    return list(map(min, interleaved_times(calls)))


def interleaved_times(
    calls: Sequence[Callable[[], Any]], before: Callable[[int], None] = lambda index: None
) -> list[list[float]]:
    """By call, the seconds it took in each round.

    The calls take turns, so that a drift of the machine's speed falls on all alike. The first round warms up.
    `before(index)` prepares a call and is not timed.
    """
    taken: list[list[float]] = [[] for _ in calls]
    for _ in range(_ROUNDS + 1):
        for index, call in enumerate(calls):
            before(index)
            started_at = _synchronized()
            call()
            taken[index].append(_synchronized() - started_at)
    return [seconds[1:] for seconds in taken]


@torch.no_grad()
def measure_latencies(transformer: nn.Module, switch: VariantSwitcher, inputs: Mapping[str, Any]) -> LatencyTable:
    """Time the teacher and the replacements of the switcher on one batch of the stock forward's arguments.

    Replacements of one kind and length in one block list are alike: some of them are timed, all get their median.
    """
    adapter = adapter_of(transformer)
    blocks, block_ranges = switch.blocks(transformer), adapter.block_ranges(transformer)
    switch(transformer, ())
    streams, context = embed(transformer, inputs)
    (total,) = min_time([lambda: transformer(**{**inputs, "return_dict": False})])

    def saving(numbers: range, before: Sequence[Replacement], after: Sequence[Replacement]) -> float:
        """Seconds that the blocks take less with one plan on than with another."""
        block_maps = [switch.replacements(transformer, plan) for plan in (before, after)]
        modules = [[block_map.get(number, blocks[number]) for number in numbers] for block_map in block_maps]
        slower, faster = min_time(
            [partial(run_blocks, adapter, chain, streams, context, numbers.start) for chain in modules]
        )
        return slower - faster

    groups: dict[Any, list[Replacement]] = {}
    for replacement in switch.files:
        block_list = next(index for index, numbers in enumerate(block_ranges) if replacement.first in numbers)
        kind = (block_list, type(replacement), len(replacement.blocks), replacement.detail)
        groups.setdefault(kind, []).append(replacement)
    alone: dict[Replacement, int] = {}
    inside: dict[Replacement, int] = {}
    for group in groups.values():
        timed = group[:: max(1, len(group) // _PER_KIND)][:_PER_KIND]
        everywhere = range(len(blocks))
        alone |= _each(
            group,
            [saving(one.blocks or everywhere, (), (one,)) for one in timed],
        )
        # In the first block of a text run an FFN saves what it does alone.
        pairs = [
            (outer, one) for one in group for outer in switch.files if outer.contains(one) and one.first != outer.first
        ]
        if pairs:
            inside |= _each(group, [saving(outer.blocks, (outer,), (outer, one)) for outer, one in pairs[:_PER_KIND]])
    return LatencyTable(round(1e6 * total), range(len(blocks)), alone, inside)


def _each(group: Sequence[Replacement], seconds: Sequence[float]) -> dict[Replacement, int]:
    return dict.fromkeys(group, round(1e6 * statistics.median(seconds)))


@torch.no_grad()
def forward_seconds(
    transformer: nn.Module, switch: VariantSwitcher, plans: Sequence[Sequence[Replacement]], inputs: Mapping[str, Any]
) -> list[list[float]]:
    """By plan, the seconds of one forward in each of some rounds, in which all plans take turns.

    Switching is not timed: a variant that is served is switched to once. The teacher is left on.
    """

    def forward() -> None:
        transformer(**{**inputs, "return_dict": False})

    try:
        return interleaved_times([forward] * len(plans), before=lambda index: switch(transformer, plans[index]))
    finally:
        switch(transformer, ())
