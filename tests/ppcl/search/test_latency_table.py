"""What replacements save of a step's latency, added up by hand."""

import pytest

from ppcl.replacements import Interval, LinearFfn, LowRankModulation, TextRun
from ppcl.search.latency_table import LatencyTable

TABLE = LatencyTable(
    total=1000,
    blocks=range(8),
    alone={
        Interval(0, 1): 100,
        TextRun(3, 5): 60,
        LinearFfn(3): 40,
        LinearFfn(4): 40,
        LinearFfn(6): 30,
        LowRankModulation(): 0,
    },
    inside={LinearFfn(3): 25, LinearFfn(4): 25},
)


@pytest.mark.parametrize(
    ("plan", "saved"),
    [
        ([], 0),
        ([LowRankModulation()], 0),
        ([Interval(0, 1), LinearFfn(4), LinearFfn(6)], 100 + 40 + 30),
        # A text run's first block still has its text part, the others do not.
        ([TextRun(3, 5), LinearFfn(4)], 60 + 25),
        ([TextRun(3, 5), LinearFfn(3)], 60 + 40),
        ([LinearFfn(6), LinearFfn(4), Interval(0, 1), LinearFfn(3), TextRun(3, 5)], 30 + 25 + 100 + 40 + 60),
    ],
)
def test_savings_add_up_and_an_ffn_saves_less_where_the_text_is_gone(plan, saved):
    assert TABLE.speedup(plan) == pytest.approx(1000 / (1000 - saved))


def test_a_plan_that_would_save_everything_has_a_finite_speed():
    assert LatencyTable(10, range(2), {Interval(0, 1): 12}, {}).speedup([Interval(0, 1)]) == 10
