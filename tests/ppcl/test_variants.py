"""The choice of variants against trying every subset."""

import itertools

import pytest

from ppcl.errors import UserError
from ppcl.plan import Interval, checked, written
from ppcl.variants import Family, Sizes, choose, front, make_variants

INTERVALS = [Interval(0, 2), Interval(3, 4), Interval(5, 8), Interval(9, 10), Interval(12, 13)]
# Blocks of two sizes, as FLUX.1 has; students that are larger and smaller than a block.
SIZES = Sizes(1000, (80,) * 9 + (50,) * 5, dict(zip(INTERVALS, (80, 85, 80, 45, 50), strict=True)))
DAMAGE = dict(zip(INTERVALS, (0.05, 0.01, 0.09, 0.015, 0.02), strict=True))


def subsets():
    return [c for n in range(len(INTERVALS) + 1) for c in itertools.combinations(INTERVALS, n)]


def worth(on):
    return sum(SIZES.saved(i) for i in on), sum(DAMAGE[i] for i in on)


def test_the_front_holds_what_no_subset_beats():
    beaten = lambda a: any(  # noqa: E731
        b[0] >= a[0] and b[1] <= a[1] and b != a for b in map(worth, subsets())
    )
    best = sorted({worth(on) for on in subsets() if not beaten(worth(on))})
    rows = front(SIZES, DAMAGE)
    assert [row[0] for row in rows] == [saved for saved, _ in best]
    assert [row[1] for row in rows] == pytest.approx([damage for _, damage in best])
    assert all(worth(on) == pytest.approx((saved, damage)) for saved, damage, on in rows)


@pytest.mark.parametrize("budget", [0.99, 0.9, 0.8, 0.7, 0.55])
def test_a_budget_is_met_with_the_least_damage(budget):
    on = choose(budget, SIZES, DAMAGE)
    assert 1000 - worth(on)[0] <= budget * 1000
    assert worth(on)[1] == pytest.approx(min(worth(s)[1] for s in subsets() if 1000 - worth(s)[0] <= budget * 1000))


def test_a_budget_that_cannot_be_met_names_the_smallest_that_can():
    smallest = min(1000 - worth(s)[0] for s in subsets()) / 1000
    with pytest.raises(UserError, match=f"0.3 of the parameters cannot be met.*{smallest:.4f}"):
        choose(0.3, SIZES, DAMAGE)
    choose(smallest, SIZES, DAMAGE)


def test_named_variants_and_their_way_through_json():
    spans = [range(9), range(9, 14)]
    made = make_variants([0.9, 0.755], {"mine": [(3, 4)]}, SIZES, DAMAGE, spans)
    assert list(made) == ["teacher", "p90", "p75.5", "all", "mine"]
    assert (made["teacher"].share, made["teacher"].blocks, made["mine"].blocks) == (1.0, 14, 13)
    assert made["mine"].parameters == 1000 - 75
    family = Family(1000, 14, spans, DAMAGE, made)
    assert Family.from_json(family.to_json()) == family


@pytest.mark.parametrize(
    ("custom", "sentence"),
    [
        ({"all": [(3, 4)]}, "'all' is taken"),
        ({"../x": [(3, 4)]}, "is no name for a variant"),
        ({"3-4": [(3, 4)]}, "'3-4' reads as intervals and cannot name a variant"),
        ({"mine": [(3, 5)]}, r"variants.custom.mine: the interval \[3, 5\] has no student"),
        ({"mine": [(4, 4)]}, "holds no two blocks"),
        ({"mine": [(8, 9)]}, "does not lie within one block list; the lists hold blocks 0 to 8, 9 to 13"),
        ({"mine": [(0, 2), (2, 3)]}, "overlap"),
    ],
)
def test_custom_variants_that_cannot_be(custom, sentence):
    with pytest.raises(UserError, match=sentence):
        make_variants([], custom, SIZES, DAMAGE, [range(9), range(9, 14)])


def test_a_plan_is_sorted():
    assert checked([(5, 8), (0, 2)], [range(9)]) == [Interval(0, 2), Interval(5, 8)]


def test_intervals_as_people_write_them():
    assert written("3-5,08-9") == [Interval(3, 5), Interval(8, 9)]
    assert all(written(text) is None for text in ("", "p75", "3", "3-", "3-5,", "3-5-7", "-3-5", "3-5 ,8-9"))
