"""The error that is predicted of a plan, against error vectors that really add up."""

import itertools

import numpy as np
import pytest

from ppcl.replacements import PrunedFfn, conflicts
from ppcl.search.candidates import CandidateSearch
from ppcl.search.error_model import ErrorModel
from ppcl.search.pareto import choose, pareto_front
from tests.ppcl.search.wide import WIDE, WIDE_SENSITIVITY, wide_plans


@pytest.fixture
def vectors():
    """Error vectors of the made-up replacements: as long as their sensitivities, and all alike in part."""
    rng = np.random.default_rng(0)
    common = rng.normal(size=50)
    rows = {r: common + 1.5 * rng.normal(size=50) for r in WIDE_SENSITIVITY}
    return {r: x * (WIDE_SENSITIVITY[r] ** 0.5 / np.linalg.norm(x)) for r, x in rows.items()}


@pytest.fixture
def model(vectors):
    stacked = np.stack(list(vectors.values()))
    return ErrorModel(list(vectors), stacked @ stacked.T)


def test_vectors_that_add_up_are_predicted_exactly(vectors, model):
    for plan in itertools.islice(wide_plans(), 0, None, 7):
        whole = np.sum([vectors[r] for r in plan], 0) if plan else np.zeros(50)
        assert model(plan) == pytest.approx(float(whole @ whole), abs=1e-12)
    assert model.sensitivity == pytest.approx(WIDE_SENSITIVITY)


def test_costs_around_a_plan_sum_up_to_its_error(model):
    plan = [r for r in WIDE_SENSITIVITY if isinstance(r, PrunedFfn)]
    assert sum(model.costs_around(plan)[r] for r in plan) == pytest.approx(model(plan))
    # Around nothing a replacement costs what it costs alone.
    assert model.costs_around([]) == pytest.approx(model.sensitivity)


def test_no_cost_is_negative_where_errors_cancel():
    a, b = PrunedFfn(0, 50), PrunedFfn(1, 50)
    model = ErrorModel([a, b], np.array([[1.0, -1.0], [-1.0, 1.0]]))
    assert model([a, b]) == 0.0 and model.costs_around([a])[b] == pytest.approx(0.1)


def test_the_search_comes_near_the_least_error_of_all_plans():
    """Over many made-up models: 2 % from the best of all plans in the mean, and never behind the least sum."""
    ratios = []
    for seed in range(4):
        rng = np.random.default_rng(seed)
        common = rng.normal(size=50)
        rows = [common + rng.choice([0.7, 1.5, 4.0]) * rng.normal(size=50) for _ in WIDE_SENSITIVITY]
        lengths = np.sqrt(list(WIDE_SENSITIVITY.values()))
        stacked = np.stack([x * length / np.linalg.norm(x) for x, length in zip(rows, lengths, strict=True)])
        model = ErrorModel(list(WIDE_SENSITIVITY), stacked @ stacked.T)
        for budget in (0.85, 0.75, 0.68):
            best = min((p for p in wide_plans() if WIDE.parameters(p) <= 1000 * budget), key=model)
            found = CandidateSearch(WIDE, model).for_budget(budget)
            assert all(WIDE.parameters(plan) <= 1000 * budget for plan in found)
            assert not any(conflicts(a, b) for plan in found for a, b in itertools.combinations(plan, 2))
            assert model(found[0]) <= model(choose(budget, WIDE, pareto_front(WIDE, model.sensitivity)))
            ratios.append(model(found[0]) / model(best))
    assert min(ratios) > 1 - 1e-9 and np.mean(ratios) < 1.03


def test_products_of_errors_change_what_is_chosen():
    """Two cheap replacements whose errors point the same way cost four times one of them."""
    together = [PrunedFfn(3, 50), PrunedFfn(5, 50)]
    cost = {r: 1.0 for r in WIDE_SENSITIVITY} | dict.fromkeys(together, 0.01)
    products = np.diag(list(cost.values()))
    rows = [list(cost).index(r) for r in together]
    products[rows[0], rows[1]] = products[rows[1], rows[0]] = 0.01
    assert ErrorModel(list(cost), products)(together) == pytest.approx(0.04)
    assert ErrorModel.additive(cost)(together) == pytest.approx(0.02)
