"""What ranks agree on, over real processes."""

from ppcl.training.parallel_dims import ParallelDims
from tests import ranks


def agree(folder):
    dims = ParallelDims.join(2, 1)
    facts = [True, dims.rank == 0, dims.rank == 1, False]
    answer = dims.agreed(facts), dims.maximum(dims.rank + 3), dims.minimum(dims.rank + 3)
    (folder / str(dims.rank)).write_text(repr(answer))


def test_what_holds_on_one_rank_only_does_not_hold(tmp_path):
    ranks.run(2, agree, tmp_path)
    expected = repr(([True, False, False, False], 4, 3))
    assert [(tmp_path / name).read_text() for name in ("0", "1")] == [expected, expected]


def test_one_rank_agrees_with_itself():

    assert ParallelDims().agreed([True, False]) == [True, False]
    assert ParallelDims().maximum(7) == ParallelDims().minimum(7) == 7
