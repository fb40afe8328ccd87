"""Algorithm 1 against tables worked by hand, and against its own definition on tables drawn at random."""

import numpy as np
import pytest

from ppcl.detection.intervals import differences, first_difference


def table(rows):
    """A whole table from the rows `cka(u, u), cka(u, u+1), …`."""
    blocks = len(rows)
    return [[None] * u + list(row) for u, row in enumerate(rows)] if blocks else []


def test_difference_is_the_similarity_a_block_costs():
    delta = differences(table([[1, 0.9, 0.7], [1, 0.95], [1]]))
    assert delta[0] == [None, pytest.approx(0.1), pytest.approx(0.2)]
    assert delta[1] == [None, None, pytest.approx(0.05)]
    assert delta[2] == [None, None, None]


def delta_of(rows):
    return [[None] * (u + 1) + list(row) for u, row in enumerate(rows)]


@pytest.mark.parametrize(
    ("rows", "block_ranges", "intervals"),
    [
        # Δ falls to block 2 and rises at 3: [0,2]; from 3 it never rises: [3,5].
        ([[0.5, 0.3, 0.4, 0, 0], [9, 9, 9, 9], [9, 9, 9], [0.3, 0.2], [9], []], [range(6)], [(0, 2), (3, 5)]),
        # A rise at once, at k = u + 2, ends every interval after two blocks; the last block is left alone.
        ([[0.1, 0.2, 0, 0], [9, 9, 9], [0.1, 0.2], [9], []], [range(5)], [(0, 1), (2, 3), (4, 4)]),
        # Δ that stays the same does not rise: "the first k with Δ(u, k) > Δ(u, k-1)".
        ([[0.2, 0.2, 0.2], [9, 9], [9], []], [range(4)], [(0, 3)]),
        # Two block lists: no interval crosses from one to the other.
        ([[0.5, 0.4, 0.3], [9, 9], [0.5], []], [range(2), range(2, 4)], [(0, 1), (2, 3)]),
        # No value behind block 2 (a stream the last block drops): the interval ends on what was measured.
        ([[0.5, 0.4, None], [9, None], [None], []], [range(4)], [(0, 2), (3, 3)]),
        ([[]], [range(1)], [(0, 0)]),
    ],
)
def test_algorithm_1(rows, block_ranges, intervals):
    assert [(i.first, i.last) for i in first_difference(delta_of(rows), block_ranges)] == intervals


@pytest.mark.parametrize(
    ("rows", "intervals"),
    [
        # Worked by hand. Row 0: Δ = .10, .05, .20 (rise at 3), so [0,2]. Row 3: Δ = .10, .10 (no rise), so [3,5].
        (
            [
                [1, 0.90, 0.85, 0.65, 0.60, 0.50],
                [1, 0.5, 0.5, 0.5, 0.5],
                [1, 0.5, 0.5, 0.5],
                [1, 0.75, 0.5],
                [1, 0.5],
                [1],
            ],
            [(0, 2), (3, 5)],
        ),
        # All redundant: nothing costs anything, Δ never rises, one interval to the end.
        ([[1] * (5 - u) for u in range(5)], [(0, 4)]),
        # Nothing redundant: every further block costs more than the one before, so the least interval each time.
        ([[1, 0.9375, 0.75, 0.5], [1, 0.9375, 0.75], [1, 0.9375], [1]], [(0, 1), (2, 3)]),
        # A block that makes the surrogate better again (Δ < 0) belongs to the interval; the next rises from there.
        ([[1, 0.75, 0.875, 0.875], [1, 0.5, 0.5], [1, 0.5], [1]], [(0, 2), (3, 3)]),
        # A drop at the last block ends the interval before it, and leaves that block alone.
        ([[1, 0.75, 0.625, 0.125], [1, 0.5, 0.5], [1, 0.5], [1]], [(0, 2), (3, 3)]),
        ([[1, 0.5], [1]], [(0, 1)]),
    ],
)
def test_from_similarities_to_intervals(rows, intervals):
    assert [(i.first, i.last) for i in first_difference(differences(table(rows)), [range(len(rows))])] == intervals


@pytest.mark.parametrize("seed", range(20))
def test_every_interval_is_what_the_definition_says(seed):
    """Eq. 5 read the other way round, for random tables of two block lists."""
    rng = np.random.default_rng(seed)
    block_ranges = [range(0, 9), range(9, 24)]
    cka = table([[1.0, *np.sort(rng.random(23 - u))[::-1]] for u in range(24)])
    delta = differences(cka)
    found = first_difference(delta, block_ranges)
    # They do not overlap, and leave no block out.
    assert [block for i in found for block in i.blocks] == list(range(24))
    for first, last in ((interval.first, interval.last) for interval in found):
        (span,) = (s for s in block_ranges if first in s)
        assert last in span
        inside = [cka[first][k - 1] - cka[first][k] for k in range(first + 1, last + 1)]
        assert all(b <= a for a, b in zip(inside, inside[1:])), "a rise within an interval"
        if last + 1 < span.stop:
            assert last > first, "only the last of a list may be alone"
            assert cka[first][last] - cka[first][last + 1] > inside[-1], "it ended without a rise"
