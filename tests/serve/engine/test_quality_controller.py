"""Which variant `auto` takes, and which are worth taking: decisions on numbers alone."""

import pytest

from serve.config import Elastic
from serve.engine.quality_controller import QualityController, quality_levels

# Device-seconds of an image, the largest variant first, and scores.
COSTS = {"teacher": 1.0, "p70": 0.9, "p50": 0.5, "b10": 0.48, "tiny": 0.2}


def test_the_ladder_holds_what_gives_more_score_a_second_than_all_above_it():
    scores = {"teacher": 0.9, "p70": 0.8, "p50": 0.6, "b10": 0.4, "tiny": 0.1}
    assert quality_levels(COSTS, scores) == ["teacher", "p50"], "0.89, 1.2, 0.83 and 0.5 a second against 0.9"


def test_a_variant_that_a_cheaper_one_beats_is_no_rung():
    scores = {"teacher": 0.9, "p70": 0.85, "p50": 0.89, "b10": 0.2, "tiny": 0.3}
    assert quality_levels(COSTS, scores) == ["teacher", "p50"]
    assert quality_levels(COSTS, scores | {"tiny": 0.4}) == ["teacher", "p50", "tiny"]


def test_the_largest_stays_first_though_another_scores_as_high():
    assert quality_levels(COSTS, dict.fromkeys(COSTS, 0.9)) == ["teacher", "tiny"]


def test_a_difference_that_may_be_noise_is_no_rung():
    assert quality_levels({"teacher": 1.0, "p90": 0.97}, {"teacher": 0.9, "p90": 0.9}) == ["teacher"]


def test_what_nobody_has_scored_is_never_degraded_to():
    unknown = dict.fromkeys(COSTS)
    assert quality_levels(COSTS, unknown) == ["teacher"]
    assert quality_levels(COSTS, unknown | {"tiny": 1.0}) == ["teacher"]
    assert quality_levels(COSTS, unknown | {"teacher": 0.9, "p50": 0.9}) == ["teacher", "p50"]


STEPS = {"large": 4.0, "middle": 2.0, "small": 1.0}


@pytest.fixture
def quality():
    return QualityController(list(STEPS), Elastic(margin=0.0, recover_seconds=10, low_water=0.5))


def choose(quality, budget, waiting=0.0, allowed=lambda name: True):
    return quality.choose(budget, lambda name: waiting + STEPS[name], STEPS.get, allowed)


def test_it_takes_the_largest_that_were_in_time_with_twice_the_wait(quality):
    assert choose(quality, 5, waiting=0.5).variant == "large" and not choose(quality, 5).degraded
    choice = choose(quality, 5, waiting=1)
    assert (choice.variant, choice.degraded, choice.expected, choice.in_time) == ("middle", True, 3.0, True)
    assert choose(quality, 5, waiting=2).variant == "small"


def test_the_smallest_is_taken_up_to_the_deadline(quality):
    assert (choose(quality, 5, waiting=4).variant, choose(quality, 5, waiting=4).in_time) == ("small", True)


def test_a_larger_one_that_fits_beside_what_runs_is_not_taken_again_while_it_is_held_below(quality):
    """A lane of large images that is open makes one more of them cheap, and would stay open for ever."""
    choose(quality, 5, waiting=2)
    cheap = {"large": 4.5, "middle": 6.0, "small": 5.5}
    choice = quality.choose(5, cheap.get, STEPS.get)
    assert (choice.variant, choice.in_time) == ("small", False)


def test_where_none_is_in_time_it_is_the_floor_and_said_so(quality):
    choice = choose(quality, 5, waiting=4.5)
    assert (choice.variant, choice.in_time) == ("small", False)
    choice = choose(quality, 5, waiting=4.5, allowed=lambda name: name != "small")
    assert (choice.variant, choice.in_time) == ("middle", False)


def test_a_margin_is_added_to_what_is_expected():
    careful = QualityController(list(STEPS), Elastic(margin=0.5))
    assert choose(careful, 5.9).variant == "middle"
    assert choose(careful, 6.0).variant == "large"


def test_it_degrades_at_once_and_recovers_by_one_after_a_while_of_little_load(quality):
    assert choose(quality, 5, waiting=4).variant == "small"
    assert choose(quality, 5, waiting=0).variant == "small", "it recovered at once"
    for now, variant in (
        (100, "small"),
        (109, "small"),
        (111, "middle"),
        (120, "middle"),
        (122, "large"),
        (140, "large"),
    ):
        quality.watch(now, lambda name: 0.3)
        assert choose(quality, 5).variant == variant, now


def test_load_in_between_starts_the_while_again(quality):
    choose(quality, 5, waiting=4)
    for now, load in ((100, 0.3), (109, 0.6), (110, 0.3), (119, 0.3)):
        quality.watch(now, lambda name: load)  # noqa: B023
    assert choose(quality, 5).variant == "small"


def test_it_recovers_only_as_far_as_the_larger_variant_bears_the_load(quality):
    """However little waits, which is because of the small variant."""
    choose(quality, 5, waiting=4)
    for now in range(100, 200):
        quality.watch(now, {"middle": 0.4, "large": 0.8}.__getitem__)
    assert choose(quality, 5).variant == "middle"


def test_a_deadline_that_is_short_in_itself_degrades_its_own_request_alone(quality):
    assert choose(quality, 1.5).variant == "small"
    assert choose(quality, 5).variant == "large"


def test_a_floor_above_the_level_is_kept(quality):
    choose(quality, 5, waiting=4)
    assert choose(quality, 5, allowed=lambda name: name == "large").variant == "large"
