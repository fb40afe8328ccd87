"""The order in which training reads its samples, and which of them are measured on."""

import numpy as np
import pytest

from ppcl.training.data import batch_of, spread_samples


def test_batches_cover_every_sample_once_an_epoch():
    ids = np.arange(100, 124)
    captured = np.concatenate([batch_of(step, ids, 8, seed=3) for step in range(3)])
    assert sorted(captured) == list(ids)
    assert not np.array_equal(batch_of(0, ids, 8, seed=3), batch_of(3, ids, 8, seed=3))


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
