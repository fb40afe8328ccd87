"""Plans as text, as files' names, and which entries go together."""

import pytest

import ppcl
from ppcl.config.plan_syntax import is_replacement
from ppcl.errors import UserError
from ppcl.replacements import (
    KINDS,
    Interval,
    LinearFfn,
    LowRankModulation,
    Plan,
    PrunedFfn,
    PrunedHeads,
    TextRun,
    checked_plan,
    conflicts,
    parse_name,
    parse_replacement,
    parse_text,
)


def test_a_plan_is_sorted():
    assert checked_plan([(5, 8), (0, 2)], [range(9)]) == (Interval(0, 2), Interval(5, 8))


def test_plans_as_people_write_them():
    assert parse_text("3-5,08-9") == [Interval(3, 5), Interval(8, 9)]
    assert parse_text("ffn:3,text:4-5") == [LinearFfn(3), TextRun(4, 5)]
    wrong = (
        "",
        "p75",
        "3",
        "3-",
        "3-5,",
        "3-5-7",
        "-3-5",
        "3-5 ,8-9",
        "ffn:3-5",
        "text:3",
        "txt:3-4",
        "ffn:",
        "heads:3",
        "heads:3/0",
    )
    assert all(parse_text(text) is None for text in wrong)


EXAMPLES = [
    Interval(3, 11),
    TextRun(0, 2),
    LinearFfn(7),
    PrunedFfn(7, 25),
    PrunedHeads(7, 50),
    LowRankModulation(),
]


@pytest.mark.parametrize("entry", EXAMPLES)
def test_an_entry_is_found_again_by_its_name_and_its_text(entry):
    assert parse_name(entry.name) == parse_replacement(str(entry)) == entry
    assert type(parse_name(entry.name)) is type(parse_replacement(str(entry))) is type(entry)


def test_what_clashes_and_what_composes():
    block_ranges = [range(9), range(9, 14)]
    assert not conflicts(LinearFfn(3), TextRun(2, 4))
    assert checked_plan(["text:2-4", "ffn:3", (5, 6)], block_ranges) == (TextRun(2, 4), LinearFfn(3), Interval(5, 6))
    for plan, sentence in {
        ("text:2-4", "4-5"): r"the text run \[2, 4\] and the interval \[4, 5\] overlap",
        ("ffn:3", "3-4"): r"the interval \[3, 4\] and the FFN 3 overlap",
        ("text:2-4", "text:4-5"): "overlap",
        ("ffn:3", "ffn:3"): "overlap",
        ("text:8-9",): "does not lie within one block list",
        ("ffn:14",): "the FFN 14 does not lie within one block list",
    }.items():
        with pytest.raises(UserError, match=sentence):
            checked_plan(plan, block_ranges)


def test_a_plan_is_read_and_written_in_one_order():
    plan = Plan.parse("ffn:9/50,3-5,text:6-8,ffn:9,modulations")
    assert str(plan) == "modulations,3-5,text:6-8,ffn:9,ffn:9/50"
    assert plan == Plan([PrunedFfn(9, 50), [3, 5], "text:6-8", LinearFfn(9), LowRankModulation()])
    assert Plan.parse("") == Plan() == ()
    assert ppcl.Plan is Plan
    with pytest.raises(UserError, match="'3-5,tail' is not a plan; write intervals as 3-5"):
        Plan.parse("3-5,tail")


def test_an_interval_is_no_pair_of_numbers():
    with pytest.raises(TypeError):
        sum(Interval(3, 5))
    assert Interval(3, 5) != (3, 5) and Interval(3, 5) != TextRun(3, 5)


def test_every_kind_is_written_as_the_configuration_checks_it():
    """The grammar stands in the configuration, which must not import the kinds; both know the same ones."""
    assert [type(example) for example in EXAMPLES] == list(KINDS)
    assert all(is_replacement(str(example)) for example in EXAMPLES)
