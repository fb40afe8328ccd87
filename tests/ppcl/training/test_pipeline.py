import itertools
import random

import pytest

from ppcl.errors import UserError
from ppcl.training.pipeline import balanced_segments


def most_expensive(costs, parts):
    return max(sum(costs[i] for i in part) for part in parts)


def test_segments_are_optimal_against_trying_every_cut():
    rng = random.Random(0)
    for _ in range(30):
        count, pp = rng.randint(4, 9), rng.randint(1, 3)
        costs = [rng.choice([1.0, 1.0, 3.0]) for _ in range(count)]
        indivisible = range(1, 3)
        best = min(
            most_expensive(costs, [range(a, b) for a, b in itertools.pairwise([0, *cuts, count])])
            for cuts in itertools.combinations([c for c in range(1, count) if c != 2], pp - 1)
        )
        parts = balanced_segments(costs, pp, [indivisible])
        assert [i for part in parts for i in part] == list(range(count))
        assert most_expensive(costs, parts) == best
        assert any(1 in part and 2 in part for part in parts)


def test_more_ranks_than_segments_is_refused_with_the_most_there_can_be():
    with pytest.raises(UserError, match="pipeline is 3.*2 segments at most"):
        balanced_segments([1.0] * 4, 3, [range(2), range(2, 4)])
