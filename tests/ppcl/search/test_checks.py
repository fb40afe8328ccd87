"""What is refused of the variants before anything is trained."""

import pytest

from ppcl.config.schema import Variants
from ppcl.errors import UserError
from ppcl.models.teacher import Teacher
from ppcl.replacements import Interval, LinearFfn, LowRankModulation, PrunedFfn, TextRun
from ppcl.replacements.io import files_in
from ppcl.replacements.parameter_counts import parameter_counts
from ppcl.search.checks import check_reachable, check_variants, optimistic_counts
from tests import made_result

PLAN = [Interval(1, 2), TextRun(3, 5), LinearFfn(0), PrunedFfn(0, 50), LinearFfn(4), LowRankModulation()]
BLOCKS = [range(6)]


@pytest.fixture(scope="module")
def counts(teacher_folder):
    return optimistic_counts(Teacher(teacher_folder), PLAN, student_hidden=50)


@pytest.mark.parametrize(
    ("custom", "sentence"),
    [
        ({"mine": ["2--4"]}, "variants.custom.mine: '2--4' is not a replacement"),
        ({"mine": [(4, 6)]}, "variants.custom.mine: .* does not lie within one block list"),
        ({"mine": ["1-3", "ffn:3"]}, "variants.custom.mine: .* overlap"),
        ({"p90": [(0, 1)]}, "variants.custom: the name 'p90' is taken"),
    ],
)
def test_a_custom_plan_that_no_teacher_of_these_blocks_can_have_is_refused(custom, sentence):
    with pytest.raises(UserError, match=sentence):
        check_variants(Variants(custom=custom), BLOCKS)


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        (
            {"custom": {"mine": [(0, 1)]}},
            "variants.custom.mine: there is no replacement 0-1; there are ffn:0, ffn:0/50",
        ),
        ({"budgets": [0.9, 0.01]}, "variants.budgets: 0.01 of the parameters cannot be met; even with every detected"),
        (
            {"targets": {"tiny": {"parameters": 0.01}}},
            "variants.targets.tiny.parameters: 0.01 of the parameters cannot",
        ),
        ({"blocks": [4]}, "variants.blocks: 4 blocks cannot be met; with every interval on 5 run"),
    ],
)
def test_what_the_detected_plan_cannot_give_is_refused(counts, settings, sentence):
    with pytest.raises(UserError, match=sentence):
        check_reachable(Variants(**settings), PLAN, BLOCKS, counts)


def test_what_the_detected_plan_may_give_passes(counts):
    settings = Variants(
        budgets=[0.9],
        blocks=[5],
        targets={"half": {"parameters": 0.8, "speedup": 3}},
        custom={"mine": ["1-2", "ffn:4"]},
    )
    check_variants(settings, BLOCKS)
    check_reachable(settings, PLAN, BLOCKS, counts)


def test_the_counts_before_training_are_no_larger_than_those_of_the_trained_replacements(teacher_folder, tmp_path):
    made_result.result(tmp_path, teacher_folder)
    teacher = Teacher(teacher_folder)
    trained = parameter_counts(teacher, files_in(tmp_path / "students"))
    before = optimistic_counts(teacher, trained.replacements, student_hidden=100)
    for replacement in trained.replacements:
        assert before.parameters([replacement]) <= trained.parameters([replacement]) < before.total
