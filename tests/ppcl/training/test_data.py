"""The order in which training reads its samples."""

import numpy as np

from ppcl.training.data import batch_of


def test_batches_cover_every_sample_once_an_epoch():
    ids = np.arange(100, 124)
    captured = np.concatenate([batch_of(step, ids, 8, seed=3) for step in range(3)])
    assert sorted(captured) == list(ids)
    assert not np.array_equal(batch_of(0, ids, 8, seed=3), batch_of(3, ids, 8, seed=3))
