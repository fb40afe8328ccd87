"""The choice of plans against trying every subset."""

import dataclasses
import itertools
import random

import pytest

from ppcl.errors import UserError
from ppcl.replacements import (
    Interval,
    LinearFfn,
    LowRankModulation,
    Plan,
    PrunedFfn,
    PrunedHeads,
    TextRun,
    checked_plan,
    sort_key,
)
from ppcl.replacements.ffn import Ffn
from ppcl.replacements.parameter_counts import ParameterCounts
from ppcl.search.pareto import choose, choose_blocks, pareto_front
from tests.ppcl.search.wide import WIDE, WIDE_LATENCIES, WIDE_SENSITIVITY, wide_plans

INTERVALS = [Interval(0, 2), Interval(3, 4), Interval(5, 8), Interval(9, 10), Interval(12, 13)]
# Blocks of two sizes, as FLUX.1 has; students that are larger and smaller than a block.
STUDENTS = {i: {"w": size} for i, size in zip(INTERVALS, (80, 85, 80, 45, 50), strict=True)}
SIZES = ParameterCounts(1000, (80,) * 9 + (50,) * 5, STUDENTS)
SENSITIVITY = dict(zip(INTERVALS, (0.05, 0.01, 0.09, 0.015, 0.02), strict=True))


def subsets():
    return [c for n in range(len(INTERVALS) + 1) for c in itertools.combinations(INTERVALS, n)]


def worth(on):
    return sum(SIZES.saved(i) for i in on), sum(SENSITIVITY[i] for i in on)


def test_the_front_holds_what_no_subset_beats():
    beaten = lambda a: any(  # noqa: E731
        b[0] >= a[0] and b[1] <= a[1] and b != a for b in map(worth, subsets())
    )
    best = sorted({worth(on) for on in subsets() if not beaten(worth(on))})
    rows = pareto_front(SIZES, SENSITIVITY)
    assert [row[0] for row in rows] == [saved for saved, _ in best]
    assert [row[1] for row in rows] == pytest.approx([sensitivity for _, sensitivity in best])
    assert all(worth(on) == pytest.approx((saved, sensitivity)) for saved, sensitivity, on in rows)


@pytest.mark.parametrize("budget", [0.99, 0.9, 0.8, 0.7, 0.55])
def test_a_budget_is_met_with_the_least_damage(budget):
    on = choose(budget, SIZES, pareto_front(SIZES, SENSITIVITY))
    assert 1000 - worth(on)[0] <= budget * 1000
    assert worth(on)[1] == pytest.approx(min(worth(s)[1] for s in subsets() if 1000 - worth(s)[0] <= budget * 1000))


def test_a_budget_that_cannot_be_met_names_the_smallest_that_can():
    front = pareto_front(SIZES, SENSITIVITY)
    smallest = min(1000 - worth(s)[0] for s in subsets()) / 1000
    with pytest.raises(UserError, match=f"0.3 of the parameters cannot be met.*{smallest:.4f}"):
        choose(0.3, SIZES, front)
    choose(smallest, SIZES, front)


@pytest.mark.parametrize("most", [14, 13, 12, 9, 6])
def test_a_number_of_blocks_is_met_with_the_least_damage(most):
    def left(plan):
        return 14 - sum(i.removed for i in plan)

    plan = choose_blocks(most, SIZES.blocks, SENSITIVITY | {LinearFfn(1): 0.0})
    assert left(plan) <= most
    assert worth(plan)[1] == pytest.approx(min(worth(s)[1] for s in subsets() if left(s) <= most))


def test_a_number_of_blocks_that_cannot_be_met_names_the_smallest_that_can():
    with pytest.raises(UserError, match="5 blocks cannot be met; with every interval on 6 run, so give 6 or more"):
        choose_blocks(5, SIZES.blocks, SENSITIVITY)


def test_the_front_over_depth_and_width_holds_what_no_plan_beats():
    all_of_them = [(1000 - WIDE.parameters(plan), sum(WIDE_SENSITIVITY[e] for e in plan)) for plan in wide_plans()]
    assert len(all_of_them) > 100
    rows = pareto_front(WIDE, WIDE_SENSITIVITY)
    for saved, sensitivity, plan in rows:
        assert 1000 - WIDE.parameters(plan) == saved and len(checked_plan(plan, [range(8)])) == len(plan)
        assert sensitivity == pytest.approx(min(d for s, d in all_of_them if s >= saved))
    assert rows[-1][0] == max(s for s, _ in all_of_them)


FOLDED = dataclasses.replace(
    WIDE,
    replacements={**WIDE.replacements, LowRankModulation(): {"directions": 4 * 2, "mean": 4}},
    rows={b: {"img": 6, "txt": 6} for b in range(8)},
    width=4,
)


@pytest.mark.parametrize("cost", [0.0001, 0.05, 5.0])
def test_the_front_with_folding_holds_what_no_plan_beats(cost):
    sensitivity = WIDE_SENSITIVITY | {LowRankModulation(): cost}
    plans = [plan + fold for plan in wide_plans() for fold in ((), (LowRankModulation(),))]
    every = [(1000 - FOLDED.parameters(plan), sum(sensitivity[e] for e in plan)) for plan in plans]
    rows = pareto_front(FOLDED, sensitivity)
    for saved, total, plan in rows:
        assert 1000 - FOLDED.parameters(plan) == saved
        assert total == pytest.approx(min(d for s, d in every if s >= saved))
    assert rows[-1][0] == max(s for s, _ in every)


def test_an_ffn_within_a_text_run_saves_its_image_part_alone():
    assert WIDE.saved(LinearFfn(3)) == 30 + 25 - 9
    assert WIDE.saved(LinearFfn(3), TextRun(1, 3)) == 30 - 5
    assert WIDE.parameters([TextRun(1, 3), LinearFfn(3)]) == 1000 - (80 - 15) - 25
    # The heads of its block do not change what it saves.
    assert WIDE.saved(LinearFfn(3), PrunedHeads(3, 50)) == 30 + 25 - 9
    assert WIDE.parameters([PrunedHeads(3, 50), LinearFfn(3)]) == 1000 - (25 - 12) - (30 + 25 - 9)
    # With half of its units the modulation stays.
    assert WIDE.saved(PrunedFfn(3, 50)) == 24 + 19 - 22
    assert WIDE.saved(PrunedFfn(3, 50), TextRun(1, 3)) == 24 - 12
    assert FOLDED.saved(PrunedFfn(3, 50), low_rank=True) == 24 + 19 - 22


def test_tracked_quantities_are_summed_along_each_plan():
    rows = pareto_front(SIZES, SENSITIVITY, tracked=(SIZES,))
    assert (rows.saved[:, 0] == rows.saved[:, 1]).all()
    front = pareto_front(FOLDED, WIDE_SENSITIVITY | {LowRankModulation(): 0.05}, tracked=(WIDE_LATENCIES,))
    for row, (_, _, plan) in enumerate(front):
        assert WIDE_LATENCIES.speedup(plan) == pytest.approx(8000 / (8000 - front.saved[row, 1]))


def plain_front(savings, sensitivity, low_rank):
    """The same by lists of tuples, one row a plan: the independent computation that the arrays are held against."""

    def kept(rows):
        front, least = [], float("inf")
        for row in sorted(rows, key=lambda row: (-row[0], row[1], len(row[2]))):
            if row[1] < least:
                front.append(row)
                least = row[1]
        return front[::-1]

    def added(rows, replacement, within=None):
        more = savings.saved(replacement, within, low_rank)
        return [(saved + more, cost + sensitivity[replacement], (replacement, *plan)) for saved, cost, plan in rows]

    best = {len(savings.blocks): [(0, 0.0, ())]}
    for block in range(len(savings.blocks) - 1, -1, -1):
        rows = list(best[block + 1])
        for replacement in (e for e in sensitivity if e.first == block):
            with_it = added(best[replacement.last + 1], replacement)
            if isinstance(replacement, TextRun | PrunedHeads):
                for number in replacement.blocks:
                    ffns = [e for e in sensitivity if isinstance(e, Ffn) and e.block == number]
                    with_it = kept([*with_it, *(row for ffn in ffns for row in added(with_it, ffn, replacement))])
            rows += with_it
        best[block] = kept(rows)
    return best[0]


@pytest.mark.parametrize("seed", range(8))
@pytest.mark.parametrize("low_rank", [False, True])
def test_the_front_holds_the_same_plans_as_a_plain_computation(seed, low_rank):
    rng = random.Random(seed)
    blocks, width = 12, 4
    block_parameters, ffn, modulation = 1000, 300, 120
    replacements = {
        interval: {"w": block_parameters - rng.randrange(200)} for interval in (Interval(1, 3), Interval(6, 9))
    }
    replacements |= {TextRun(2, 5): {"h.w": 60}, TextRun(8, 11): {"h.w": 60}, LowRankModulation(): {"directions": 8}}
    replacements |= {LinearFfn(block): {"img.w": 20, "txt.w": 20} for block in range(blocks)}
    replacements |= {PrunedFfn(block, 50): {"img.w": 150, "txt.w": 150} for block in range(blocks)}
    replacements |= {PrunedHeads(block, 50): {"maps": 60 + rng.randrange(3)} for block in range(1, blocks, 2)}
    streams = {block: {"img": ffn, "txt": ffn} for block in range(blocks)}
    chunks = {block: {"img": modulation // 2, "txt": modulation // 2} for block in range(blocks)}
    rows = {block: {"img": 24, "txt": 24} for block in range(blocks)}
    texts = dict.fromkeys(range(blocks), ffn + modulation)
    sizes = ParameterCounts(
        20000,
        (block_parameters,) * blocks,
        replacements,
        streams,
        chunks,
        texts,
        rows,
        width,
        dict.fromkeys(range(blocks), 130),
    )
    sensitivity = {entry: rng.random() for entry in sorted(replacements, key=sort_key)}
    folds = {LowRankModulation(): sensitivity.pop(LowRankModulation())}
    wanted = plain_front(sizes, sensitivity, False)
    if low_rank:
        saved = sizes.saved(LowRankModulation())
        folded = [
            (row[0] + saved, row[1] + folds[LowRankModulation()], (LowRankModulation(), *row[2]))
            for row in plain_front(sizes, sensitivity, True)
        ]
        wanted = [
            row
            for row in sorted(wanted + folded)
            if not any(other[:2] != row[:2] and other[0] >= row[0] and other[1] <= row[1] for other in wanted + folded)
        ]
    front = pareto_front(sizes, sensitivity | folds if low_rank else sensitivity)
    assert [(saved, plan) for saved, _, plan in front] == [(saved, Plan(plan)) for saved, _, plan in wanted]
    assert [cost for _, cost, _ in front] == pytest.approx([cost for _, cost, _ in wanted])
