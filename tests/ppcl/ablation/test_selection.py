"""Ways to choose the blocks that go, on small tables worked out by hand, and on a stack with known useless blocks."""

import pytest
import torch

from ppcl.ablation import selection
from ppcl.detection.intervals import differences
from ppcl.detection.selection import cheapest, contracted, evenly, threshold
from ppcl.errors import UserError
from ppcl.replacements import Interval

ONE, TWO = [range(8)], [range(4), range(4, 8)]


@pytest.mark.parametrize(
    ("removed", "block_ranges", "expected"),
    [
        ({3}, ONE, [(2, 3)]),
        ({3, 4}, ONE, [(2, 4)]),
        ({2, 4}, ONE, [(1, 2), (3, 4)]),
        ({0}, ONE, [(0, 1)]),
        ({0, 1}, ONE, [(0, 2)]),
        ({0, 2}, ONE, [(0, 2)]),
        ({4}, TWO, [(4, 5)]),
        ({3, 4}, TWO, [(2, 3), (4, 5)]),
        (set(), ONE, []),
    ],
)
def test_removed_blocks_join_the_block_before_them(removed, block_ranges, expected):
    found = contracted(removed, block_ranges)
    assert found == [Interval(*pair) for pair in expected]
    assert sum(i.removed for i in found) == len(removed)


def test_a_whole_list_cannot_go():
    with pytest.raises(UserError, match="all blocks from 4 to 7 would go"):
        contracted({4, 5, 6, 7}, TWO)


def test_every_way_takes_as_many_blocks_as_asked():
    scores = [0.3, 0.1, 0.9, 0.2, 0.05, 0.06, 0.07, 0.08]
    table = [[None if k < u else 1 - 0.02 * (k - u) - 0.001 * u * (k - u) ** 2 for k in range(8)] for u in range(8)]
    for block_ranges in (ONE, TWO):
        for count in range(1, 5):
            for found in (
                cheapest(scores, count, block_ranges),
                evenly(count, block_ranges),
                selection.equal_lengths(count, block_ranges),
                threshold(table, count, block_ranges),
            ):
                assert sum(i.removed for i in found) == count, found
                assert all(any(i.first in s and i.last in s for s in block_ranges) for i in found)
                assert all(a.last < b.first for a, b in zip(found, found[1:]))
    # Of the second list one block stays, though all of its scores are the smallest.
    assert cheapest(scores, 4, TWO) == [Interval(0, 1), Interval(4, 7)]


def test_algorithm_1_gives_its_worst_steps_back():
    cka = [[None] * 6 for _ in range(6)]
    for u, row in {0: [1, 0.9, 0.85, 0.6], 3: [1, 0.97, 0.95]}.items():
        cka[u][u : u + len(row)] = row
    delta = differences(cka)
    block_ranges = [range(6)]
    assert selection.algorithm1(delta, 4, block_ranges) == [Interval(0, 2), Interval(3, 5)]
    assert selection.algorithm1(delta, 3, block_ranges) == [Interval(0, 1), Interval(3, 5)]
    assert selection.algorithm1(delta, 2, block_ranges) == [Interval(3, 5)]
    with pytest.raises(UserError, match="which finds 4; ask for 4 or fewer"):
        selection.algorithm1(delta, 5, block_ranges)


def test_a_threshold_stops_where_the_similarity_falls_below_it():
    table = [[None] * 4 for _ in range(4)]
    table[0] = [1, 0.99, 0.8, 0.7]
    table[1][1:] = [1, 0.9, 0.5]
    table[2][2:] = [1, 0.95]
    table[3][3] = 1
    assert threshold(table, 1, [range(4)]) == [Interval(0, 1)]
    assert threshold(table, 2, [range(4)]) == [Interval(0, 1), Interval(2, 3)]


def test_influence_and_similarity_of_a_block_that_does_nothing():
    x = torch.randn(200, 8)
    turned = torch.randn(200, 8)
    boundaries = [[x, x], [x, x], [turned, turned]]
    assert selection.influence(boundaries) == pytest.approx([0, 1], abs=0.1)
    assert selection.adjacent_similarity(boundaries) == pytest.approx([1, 0], abs=0.1)
