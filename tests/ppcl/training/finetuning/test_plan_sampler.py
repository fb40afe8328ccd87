"""Which plans fine-tuning draws: any, variants and their parts, or one."""

import numpy as np
import pytest

from ppcl.config.schema import Finetuning
from ppcl.errors import UserError
from ppcl.replacements import Interval, LinearFfn, LowRankModulation, PrunedFfn, TextRun, conflicts, sort_key
from ppcl.training.finetuning.plan_sampler import AnyPlan, FixedPlan, VariantParts, plan_sampler, random_plans

PLAN = [Interval(0, 1), Interval(3, 5), TextRun(1, 3), LinearFfn(0), LinearFfn(2), PrunedFfn(2, 50)]


VARIANTS = {
    "teacher": [],
    "small": [Interval(0, 1), LinearFfn(2)],
    "half": [Interval(3, 5), LinearFfn(0), PrunedFfn(2, 50)],
}


def test_any_plan_is_drawn_without_a_clash_and_reaches_everything():
    draws = AnyPlan(PLAN)
    plans = random_plans(draws, 200, seed=0)
    assert len({tuple(plan) for plan in plans}) == len(plans) > 12
    assert all(plan and not any(conflicts(a, b) for a in plan for b in plan if a is not b) for plan in plans)
    assert {entry for plan in plans for entry in plan} == set(PLAN)
    assert draws.draw(np.random.default_rng([3, 4])) == draws.draw(np.random.default_rng([3, 4]))


def test_variants_are_drawn_whole_and_in_part_and_nothing_else_is():
    draws = VariantParts(plan for plan in VARIANTS.values() if plan)
    rng = np.random.default_rng(0)
    drawn = [draws.draw(rng) for _ in range(400)]
    wholes = [sorted(VARIANTS[name], key=sort_key) for name in ("small", "half")]
    whole = [plan for plan in drawn if plan in wholes]
    assert 200 < len(whole) < 300 and all(plan in whole for plan in wholes)
    assert all(any(set(plan) <= set(variant) for variant in VARIANTS.values()) and plan for plan in drawn)
    assert TextRun(1, 3) not in draws.replacements and set(draws.replacements) == {e for plan in drawn for e in plan}


def test_some_of_the_variants_can_be_all_that_is_trained():
    draws = plan_sampler(Finetuning(variants=["half"]), PLAN, VARIANTS, [range(6)])
    assert set(draws.replacements) == set(VARIANTS["half"])
    with pytest.raises(
        UserError,
        match="finetuning.variants: there is no variant 'teacher' with anything to train; there are small, half",
    ):
        plan_sampler(Finetuning(variants=["half", "teacher"]), PLAN, VARIANTS, [range(6)])


def test_folded_modulations_are_never_all_that_is_trained():
    draws = VariantParts([[LowRankModulation(), LinearFfn(0)]])
    assert all(LinearFfn(0) in plan for plan in random_plans(draws, 2, 0))
    with pytest.raises(UserError, match="no variant has anything to train"):
        plan_sampler(Finetuning(), [LowRankModulation()], {"p70": [LowRankModulation()]}, [range(6)])
    with pytest.raises(UserError, match="has nothing to train"):
        plan_sampler(Finetuning(plan="modulations"), [LowRankModulation()], {}, [range(6)])


@pytest.mark.parametrize(
    ("plan", "sentence"),
    [
        ("most", r"'most' is neither variants nor any, no variant \(small, half\) and no plan; write"),
        ("0-1,1-2", "overlap"),
        ("0-2", "there is no replacement 0-2; there are 0-1, 3-5"),
    ],
)
def test_a_fixed_plan_that_cannot_be(plan, sentence):
    with pytest.raises(UserError, match=sentence):
        plan_sampler(Finetuning(plan=plan), PLAN, VARIANTS, [range(6)])


def test_a_variants_name_is_its_plan():
    draws = plan_sampler(Finetuning(plan="half"), PLAN, VARIANTS, [range(6)])
    assert isinstance(draws, FixedPlan) and draws.replacements == sorted(VARIANTS["half"], key=sort_key)
