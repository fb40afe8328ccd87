"""How the blocks are dealt out to the ranks of a pipeline: by what a step of training really costs."""

import pytest

from ppcl.config.schema import Distillation
from ppcl.replacements import Interval, LinearFfn, PrunedFfn, TextRun
from ppcl.training.distillation import objectives
from ppcl.training.distillation.segments import segment_of, training_costs
from ppcl.training.distillation.trainer import is_trained

KINDS = {
    Interval(1, 2): objectives.StudentObjective,
    TextRun(0, 2): objectives.TextProjectorsObjective,
    LinearFfn(1): objectives.LinearFfnObjective,
    PrunedFfn(1, 50): objectives.PrunedFfnObjective,
}


def segments(plan, train):
    return [segment_of(stage, 2, 8, plan, train) for stage in range(2)]


@pytest.mark.parametrize("train", ["students", "all"])
@pytest.mark.parametrize("replacement", KINDS, ids=str)
def test_what_is_trained_costs_its_rank_and_nothing_else_does(replacement, train):
    trained = is_trained(KINDS[replacement], Distillation(train=train))
    assert bool(training_costs(replacement, train)) == trained


def test_text_runs_and_linear_ffns_do_not_count_where_they_stay_at_their_optimum():
    maps = [TextRun(0, 2), LinearFfn(1), LinearFfn(3)]
    assert segments(maps, "students") == segments([], "students") == [range(0, 4), range(4, 8)]
    assert segments(maps, "all") == [range(0, 3), range(3, 8)]


def test_a_student_counts_in_either_case():
    for train in ("students", "all"):
        assert segments([Interval(0, 1)], train) == [range(0, 2), range(2, 8)]
