"""A bounded number of samples that are spread over prompts and timesteps."""

import numpy as np
import pytest

from ppcl.evaluation.samples import spread_samples


def test_few_samples_are_all_taken():
    ids = np.arange(100, 292)
    assert (spread_samples(ids, 192) == ids).all()


@pytest.mark.parametrize("prompts", [49, 83, 96, 192, 500])
def test_many_samples_are_bounded_and_spread_over_prompts_and_their_timesteps(prompts):
    ids = 1000 + np.arange(4 * prompts)
    taken = spread_samples(ids, 192)
    assert len(set(taken)) == 192 and set(taken) <= set(ids) and (np.diff(taken) > 0).all()
    # Four samples a prompt, in order of their timesteps: a constant stride would meet only some of them.
    assert np.bincount((taken - 1000) % 4, minlength=4).min() >= 40
    assert np.diff(taken).max() <= 2 * len(ids) / 192 + 1
