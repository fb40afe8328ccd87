"""The names of variants, and which names cannot be."""

import pytest

from ppcl.config.schema import Variants
from ppcl.config.variant_names import names_of
from ppcl.errors import UserError


def test_names_come_from_sizes_then_targets_and_custom_plans():
    settings = Variants(
        budgets=[0.9, 0.725], blocks=[40], targets={"half": {"speedup": 2.0}}, custom={"mine": [(0, 1)]}
    )
    assert names_of(settings) == ["p90", "p72.5", "b40", "all", "half", "mine"]


@pytest.mark.parametrize(
    ("name", "sentence"),
    [
        ("teacher", "the name 'teacher' is taken by a variant made anyway; choose another"),
        ("p90", "the name 'p90' is taken"),
        ("all", "the name 'all' is taken"),
        ("../x", "'../x' is not a valid variant name; use letters, digits"),
        (".hidden", "is not a valid variant name"),
        ("2-4", "'2-4' reads as a plan and cannot name a variant; choose another name"),
        ("modulations", "reads as a plan"),
    ],
)
def test_a_name_that_is_taken_or_reads_as_something_else_is_refused(name, sentence):
    settings = Variants.model_construct(budgets=[0.9], blocks=[], targets={}, custom={name: []})
    with pytest.raises(UserError, match=sentence):
        names_of(settings)


def test_a_size_that_is_asked_for_twice_is_refused():
    settings = Variants.model_construct(budgets=[0.9, 0.9], blocks=[], targets={}, custom={})
    with pytest.raises(UserError, match="variants.budgets asks for the variant p90 twice; remove one"):
        names_of(settings)
