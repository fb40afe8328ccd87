import numpy as np
import pytest

from ppcl.calibration.seeding import chosen_steps, strata


def test_every_stratum_has_one_position():
    for prompt in range(50):
        assert (np.floor(strata(3, prompt, 4) * 4) == [0, 1, 2, 3]).all()


@pytest.mark.parametrize("count, steps", [(1, 20), (3, 20), (4, 20), (7, 9)])
def test_steps_of_a_prompt_differ_and_all_steps_are_covered_evenly(count, steps):
    chosen = [chosen_steps(0, prompt, count, steps) for prompt in range(1000)]
    assert all(len(set(c)) == count and sorted(c) == c for c in chosen)
    times = np.bincount(np.concatenate(chosen), minlength=steps)
    assert len(times) == steps
    assert np.abs(times / (1000 * count / steps) - 1).max() < 0.1


def test_more_states_than_steps_are_all_steps():
    assert chosen_steps(0, 5, 9, 4) == [0, 1, 2, 3]
