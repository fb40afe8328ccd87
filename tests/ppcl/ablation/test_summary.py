"""The summary of an ablation over its seeds."""

import pytest

from ppcl.ablation.summary import interval


def test_the_interval_of_three_seeds_is_students():
    mean, low, high = interval([1.0, 2.0, 3.0], 0.95)
    assert mean == 2.0 and high - mean == pytest.approx(4.302653 / 3**0.5) and mean - low == pytest.approx(high - mean)
    assert interval([0.5], 0.95) == (0.5, 0.5, 0.5)
