"""The report's section on measured detection."""

import base64
import io
import re

import numpy as np
import pytest
from PIL import Image

from ppcl.replacements import Interval, LinearFfn, Plan
from ppcl.report import interval_figures
from ppcl.report.measured import best_front, cheapest_first, rank_correlations
from tests.ppcl.report import made
from tests.ppcl.report.test_report import read


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    return read(made.job(tmp_path_factory.mktemp("measured") / "job", made.MEASURED, detection=made.measured))


def labels(page):
    return [svg["aria-label"] for svg in page.all("svg") if svg.get("aria-hidden") != "true"]


def label(page, start):
    return next(text for text in labels(page) if text.startswith(start))


def test_every_measured_interval_is_drawn_with_both_choices_marked(page):
    told = label(page, "Heat map of sensitivity")
    assert "54 intervals, from 0.00212 to 0.324" in told
    assert "Squares: 1 to 2, 4 to 6, 7 to 8, 9 to 11, 13 to 14." in told
    assert "Rings: 0 to 2, 4 to 6, 7 to 8, 9 to 14." in told
    assert "After a short distillation of these, 5 were chosen to be distilled to the end: blocks 1 to 2," in page.said
    assert "all 54 intervals of 2 to 5 blocks were measured, on 64 held-out samples" in page.said


def test_the_map_has_first_blocks_in_rows_and_leaves_blank_what_was_not_measured():
    drawing = interval_figures.sensitivity_map({(1, 3): 0.2, (0, 1): 0.1, (2, 3): 0.0}, [(0, 4)], [], [])
    url = re.findall(r'href="data:image/png;base64,([^"]+)"', drawing.svg)[0]
    shown = np.asarray(Image.open(io.BytesIO(base64.b64decode(url))))
    assert shown.shape[:2] == (4, 4)
    assert np.argwhere(shown[..., 3] > 0).tolist() == [[0, 1], [1, 3]]
    assert shown[0, 1, :3].sum() > shown[1, 3, :3].sum(), "the smaller sensitivity is the brighter one"


def test_the_colours_have_several_numbers_also_over_less_than_a_decade():
    drawing = interval_figures.sensitivity_map({(0, 1): 0.0006, (1, 2): 0.0015}, [(0, 3)], [], [])
    assert all(f">{number}</text>" in drawing.svg for number in ("0.0007", "0.0008", "0.0009", "0.001"))


def test_fronts_sum_the_sensitivities_of_plans_and_of_algorithm_1(page):
    told = label(page, "Summed sensitivity by number of removed blocks. ")
    assert "Best plans of all measured intervals: 1: 0.00212; 3: 0.00889; 7: 0.0226." in told
    assert "Algorithm 1’s intervals, cheapest first: 1: 0.00258; 3: 0.0111; 5: 0.0291." in told
    assert "Without Algorithm 1’s interval 9 to 14, which was not measured." in page.said


def test_a_plans_front_counts_removed_blocks_and_leaves_out_what_has_no_sensitivity():
    sensitivity = {Interval(0, 2): 0.2, Interval(4, 5): 0.1}
    plans = [Plan(["0-2", "4-5"]), Plan(["4-5"]), Plan(["4-5"]), Plan(["6-7"])]
    assert best_front(plans, sensitivity) == [(1, 0.1), (3, pytest.approx(0.3))]


def test_algorithm_1s_intervals_are_taken_cheapest_first():
    sensitivity = {(0, 2): 0.4, (3, 6): 0.1, (7, 8): 0.2}
    points = cheapest_first([(0, 2), (3, 6), (7, 8), (9, 15)], sensitivity)
    assert points == [(3, 0.1), (4, pytest.approx(0.3)), (6, pytest.approx(0.7))]


def test_recurrence_is_told_by_boundary_with_its_mean(page):
    told = label(page, "Share of the resamples").replace("\u202f", " ")
    assert "1 removed, 75 % on average: 13: 100 %, 15: 50 %" in told
    assert "3 removed, 58 % on average: 7: 94 %, 9: 80 %, 12: 0 %" in told


def test_rank_correlations_compare_intervals_that_both_have():
    times = {
        "a": {Interval(0, 1): 1.0, Interval(1, 2): 2.0, Interval(2, 3): 3.0, Interval(3, 4): 9.0},
        "b": {Interval(0, 1): 0.3, Interval(1, 2): 0.2, Interval(2, 3): 0.1, LinearFfn(0): 0.7},
        "c": {Interval(0, 1): 5.0, Interval(1, 2): 4.0},
        "d": {LinearFfn(0): 0.7},
    }
    assert rank_correlations(times) == [
        {"first": "a", "second": "b", "intervals": 3, "value": pytest.approx(-1)},
        {"first": "a", "second": "c", "intervals": 2, "value": None},
        {"first": "b", "second": "c", "intervals": 2, "value": None},
    ]


def test_the_same_sensitivity_everywhere_has_no_rank_correlation():
    intervals = [Interval(0, 1), Interval(1, 2), Interval(2, 3)]
    times = {"a": dict.fromkeys(intervals, 1.0), "b": dict(zip(intervals, (1.0, 2.0, 3.0)))}
    assert rank_correlations(times)[0]["value"] is None


def test_the_table_of_rank_correlations_names_the_times(page):
    assert (
        "in closed form after screening 7 −0.18 in closed form final 5 0.87 after screening final 5 0.87" in page.said
    )


def test_students_have_their_sensitivity_at_all_three_times(page):
    assert "sensitivity in closed form sensitivity after screening final sensitivity" in page.said
    assert "1 to 2 interval 1 0.177 0.0363 5 min 41 s 0.00307 0.00110 0.0120" in page.said


def test_similarity_shows_algorithm_1s_intervals_and_says_that_others_were_chosen(page):
    assert "Algorithm 1 finds 4 contiguous redundant intervals: blocks 0 to 2, 4 to 6, 7 to 8, 9 to 14." in page.said
    assert "Intervals outlined: 0 to 2, 4 to 6, 7 to 8, 9 to 14." in label(page, "Heat map of CKA, image stream")
    assert "Intervals: 0 to 2, 4 to 6, 7 to 8, 9 to 14." in label(page, "Curves of the similarity")


@pytest.mark.parametrize("keys", [{}, {"first_difference": [list(pair) for pair in made.ALGORITHM]}])
def test_a_result_of_another_method_has_no_such_section(tmp_path, keys):
    page = read(made.job(tmp_path / "job", detection=lambda detection: {**detection, **keys}))
    assert "Sensitivity of the intervals" not in page.said
    assert "5 contiguous redundant intervals: blocks 1 to 2, 4 to 6" in page.said
    assert "Method: first difference, on the CKA of the mean of both streams." in page.said
    assert "time sensitivity 1 to 2 interval 1 0.177 0.0363 5 min 41 s 0.0120 4 to 6" in page.said
    assert "screening" not in re.sub("screening_steps", "", page.said) and "selection has not run" not in page.said


def test_before_the_selection_the_shortlist_is_marked(tmp_path):
    page = read(made.job(tmp_path / "job", ("detection",), detection=made.measured))
    assert "The stage selection has not run yet, so there is no choice after the short distillation" in page.said
    assert "Squares: the intervals of the shortlist." in page.said
    assert "Squares: 1 to 2, 2 to 3, 4 to 6, 5 to 6," in label(page, "Heat map of sensitivity")
    assert "rank correlation" not in page.said


def test_without_screening_the_shortlist_is_what_is_distilled(tmp_path):
    config = {"detection": {"method": "measured", "screening_steps": 0}}
    stages = ("detection", "students", "variants", "evaluation")
    page = read(made.job(tmp_path / "job", stages, detection=made.measured, config=config))
    assert "7 intervals that make the best plans were shortlisted and distilled to the end: blocks 1 to 2," in page.said
    assert "Squares: the intervals that are distilled to the end." in page.said
    assert "in closed form final 5 0.87" in page.said and "fter screening" not in page.said


def test_nothing_finite_measured_and_no_resample_is_no_crash(tmp_path):
    def empty(detection):
        measured = made.measured(detection)
        nothing = dict.fromkeys(measured["measured"]["sensitivity"], float("nan"))
        measured["measured"] |= {"sensitivity": nothing, "plans": {}, "recurrence": {}}
        return measured

    page = read(made.job(tmp_path / "job", made.MEASURED, detection=empty))
    assert "Sensitivity of the intervals" in page.said and "nan" not in page.said.lower()
    assert not any(text.startswith(("Heat map of sensitivity", "Summed", "Share")) for text in labels(page))


def test_sixty_blocks_in_two_lists_are_drawn():
    sensitivity = {(u, v): 0.001 * (v - u) for u in range(60) for v in range(u + 1, min(u + 5, 60))}
    drawing = interval_figures.sensitivity_map(sensitivity, [(0, 19), (19, 60)], [(3, 5)], [])
    assert "Squares: 3 to 5. Rings: none." in drawing.svg
    dots = interval_figures.recurrence_dots({20: {19: 0.5, 60: 1.0}}, [(0, 19), (19, 60)])
    assert "19: 50\u202f%, 60: 100\u202f%" in dots.svg
