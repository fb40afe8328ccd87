"""The choice of variants against trying every subset."""

import dataclasses
import itertools

import pytest

from ppcl.errors import UserError
from ppcl.plan import Ffn, Fold, Interval, TextRun, checked, clash, entry_of, named, written
from ppcl.variants import Family, Sizes, candidates, choose, choose_blocks, front, make_variants

INTERVALS = [Interval(0, 2), Interval(3, 4), Interval(5, 8), Interval(9, 10), Interval(12, 13)]
# Blocks of two sizes, as FLUX.1 has; students that are larger and smaller than a block.
STUDENTS = {i: {"w": size} for i, size in zip(INTERVALS, (80, 85, 80, 45, 50), strict=True)}
SIZES = Sizes(1000, (80,) * 9 + (50,) * 5, STUDENTS)
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


@pytest.mark.parametrize("most", [14, 13, 12, 9, 6])
def test_a_number_of_blocks_is_met_with_the_least_damage(most):
    def left(plan):
        return 14 - sum(i.removed for i in plan)

    plan = choose_blocks(most, SIZES, DAMAGE | {Ffn(1): 0.0})
    assert left(plan) <= most
    assert worth(plan)[1] == pytest.approx(min(worth(s)[1] for s in subsets() if left(s) <= most))


def test_a_number_of_blocks_that_cannot_be_met_names_the_smallest_that_can():
    with pytest.raises(UserError, match="5 blocks cannot be met; with every interval on 6 run, so give 6 or more"):
        choose_blocks(5, SIZES, DAMAGE)


def test_of_the_candidates_the_one_that_measures_best_is_taken():
    plans = candidates(0.75, WIDE, WIDE_DAMAGE)
    assert plans[0] == choose(0.75, WIDE, WIDE_DAMAGE) and len(set(plans)) == len(plans) > 1
    assert all(WIDE.parameters(plan) <= 750 for plan in plans)
    errors = dict(zip(plans, reversed(range(len(plans)))))
    made = make_variants([0.75], [], {}, WIDE, WIDE_DAMAGE, [range(8)], errors)
    assert made["p75"].plan == plans[-1]


def test_named_variants_and_their_way_through_json():
    spans = [range(9), range(9, 14)]
    made = make_variants([0.9, 0.755], [13], {"mine": [(3, 4)]}, SIZES, DAMAGE, spans)
    assert list(made) == ["teacher", "p90", "p75.5", "b13", "all", "mine"]
    assert (made["teacher"].share, made["teacher"].blocks, made["mine"].blocks) == (1.0, 14, 13)
    assert made["mine"].parameters == 1000 - 75
    family = Family(1000, 14, spans, DAMAGE, made)
    assert Family.from_json(family.to_json()) == family


@pytest.mark.parametrize(
    ("custom", "sentence"),
    [
        ({"all": [(3, 4)]}, "'all' is taken"),
        ({"../x": [(3, 4)]}, "is no name for a variant"),
        ({"3-4": [(3, 4)]}, "'3-4' reads as a plan and cannot name a variant"),
        ({"mine": [(3, 5)]}, "variants.custom.mine: there is no replacement 3-5; there are 0-2, 3-4, 5-8, 9-10, 12-13"),
        ({"mine": ["ffn:3", "x"]}, "'x' names no replacement; write intervals as 3-5"),
        ({"mine": [(4, 4)]}, "holds no two blocks"),
        ({"mine": [(8, 9)]}, "does not lie within one block list; the lists hold blocks 0 to 8, 9 to 13"),
        ({"mine": [(0, 2), (2, 3)]}, "overlap"),
    ],
)
def test_custom_variants_that_cannot_be(custom, sentence):
    with pytest.raises(UserError, match=sentence):
        make_variants([], [], custom, SIZES, DAMAGE, [range(9), range(9, 14)])


def test_a_plan_is_sorted():
    assert checked([(5, 8), (0, 2)], [range(9)]) == [Interval(0, 2), Interval(5, 8)]


def test_plans_as_people_write_them():
    assert written("3-5,08-9") == [Interval(3, 5), Interval(8, 9)]
    assert written("ffn:3,text:4-5") == [Ffn(3), TextRun(4, 5)]
    wrong = ("", "p75", "3", "3-", "3-5,", "3-5-7", "-3-5", "3-5 ,8-9", "ffn:3-5", "text:3", "txt:3-4", "ffn:")
    assert all(written(text) is None for text in wrong)


@pytest.mark.parametrize("entry", [Interval(3, 11), TextRun(0, 2), Ffn(7), Fold()])
def test_an_entry_is_found_again_by_its_name_and_its_text(entry):
    assert named(entry.name) == entry_of(str(entry)) == entry
    assert type(named(entry.name)) is type(entry_of(str(entry))) is type(entry)


def test_what_clashes_and_what_composes():
    spans = [range(9), range(9, 14)]
    assert not clash(Ffn(3), TextRun(2, 4))
    assert checked(["text:2-4", "ffn:3", (5, 6)], spans) == [TextRun(2, 4), Ffn(3), Interval(5, 6)]
    for plan, sentence in {
        ("text:2-4", "4-5"): r"the text run \[2, 4\] and the interval \[4, 5\] overlap",
        ("ffn:3", "3-4"): r"the interval \[3, 4\] and the FFN 3 overlap",
        ("text:2-4", "text:4-5"): "overlap",
        ("ffn:3", "ffn:3"): "overlap",
        ("text:8-9",): "does not lie within one block list",
        ("ffn:14",): "the FFN 14 does not lie within one block list",
    }.items():
        with pytest.raises(UserError, match=sentence):
            checked(plan, spans)


WIDE = Sizes(
    1000,
    (100,) * 8,
    {
        Interval(0, 2): {"w": 100}, Interval(4, 5): {"w": 110}, TextRun(1, 3): {"z.2.w": 5, "z.3.w": 5, "h.w": 5},
        TextRun(6, 7): {"z.7.w": 5}, **{Ffn(b): {"img.w": 5, "txt.w": 4} for b in (0, 2, 3, 5, 7)},
        **{Ffn(b, 50): {"up.img.w": 6, "up.txt.w": 5, "down.img.w": 6, "down.txt.w": 5} for b in (3, 5)},
    },
    {b: {"img": 24, "txt": 19} for b in range(8)},
    {b: {"img": 6, "txt": 6} for b in range(8)},
    dict.fromkeys(range(8), 40),
)  # fmt: skip
WIDE_DAMAGE = dict(zip(WIDE.replacements, (0.31, 0.12, 0.09, 0.05, 0.04, 0.021, 0.08, 0.015, 0.033, 0.012, 0.007), strict=True))


def wide_plans():
    """Every choice without a clash."""
    entries = list(WIDE.replacements)
    for n in range(len(entries) + 1):
        for plan in itertools.combinations(entries, n):
            if not any(clash(a, b) for a, b in itertools.combinations(plan, 2)):
                yield plan


def test_the_front_over_depth_and_width_holds_what_no_plan_beats():
    all_of_them = [(1000 - WIDE.parameters(plan), sum(WIDE_DAMAGE[e] for e in plan)) for plan in wide_plans()]
    assert len(all_of_them) > 100
    rows = front(WIDE, WIDE_DAMAGE)
    for saved, damage, plan in rows:
        assert 1000 - WIDE.parameters(plan) == saved and len(checked(plan, [range(8)])) == len(plan)
        assert damage == pytest.approx(min(d for s, d in all_of_them if s >= saved))
    assert rows[-1][0] == max(s for s, _ in all_of_them)


FOLDED = dataclasses.replace(
    WIDE, replacements={**WIDE.replacements, Fold(): {"directions": 4 * 2, "mean": 4}},
    rows={b: {"img": 6, "txt": 6} for b in range(8)}, width=4,
)  # fmt: skip


@pytest.mark.parametrize("cost", [0.0001, 0.05, 5.0])
def test_the_front_with_folding_holds_what_no_plan_beats(cost):
    damage = WIDE_DAMAGE | {Fold(): cost}
    plans = [plan + fold for plan in wide_plans() for fold in ((), (Fold(),))]
    every = [(1000 - FOLDED.parameters(plan), sum(damage[e] for e in plan)) for plan in plans]
    rows = front(FOLDED, damage)
    for saved, total, plan in rows:
        assert 1000 - FOLDED.parameters(plan) == saved
        assert total == pytest.approx(min(d for s, d in every if s >= saved))
    assert rows[-1][0] == max(s for s, _ in every)


def test_an_ffn_within_a_text_run_saves_its_image_part_alone():
    assert WIDE.saved(Ffn(3)) == 30 + 25 - 9
    assert WIDE.saved(Ffn(3), TextRun(1, 3)) == 30 - 5
    assert WIDE.parameters([TextRun(1, 3), Ffn(3)]) == 1000 - (80 - 15) - 25
    # With half of its units the modulation stays.
    assert WIDE.saved(Ffn(3, 50)) == 24 + 19 - 22
    assert WIDE.saved(Ffn(3, 50), TextRun(1, 3)) == 24 - 12
    assert FOLDED.saved(Ffn(3, 50), folded=True) == 24 + 19 - 22
