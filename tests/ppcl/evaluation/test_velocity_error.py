"""The velocity error of variants and the sensitivity of replacements."""

import copy

import numpy as np
import pytest
import torch

from ppcl.evaluation.velocity_error import (
    SKETCH,
    ErrorSums,
    error_model,
    error_sketch,
    resampled_models,
    sensitivities,
    variant_errors,
)
from ppcl.models.teacher import Teacher
from ppcl.replacements import Interval
from ppcl.replacements.switcher import VariantSwitcher
from tests import made_result
from tests.samples import MemorySamples


def test_squares_are_relative_errors_that_join():
    rng = np.random.default_rng(0)
    v, t, at = rng.normal(size=(20, 3, 4)), rng.normal(size=(20, 3, 4)), rng.random(20)
    whole = ErrorSums.of(torch.tensor(v), torch.tensor(t), torch.tensor(at))
    assert whole.overall() == pytest.approx(((v - t) ** 2).sum() / (t**2).sum())
    joined = ErrorSums.joined(
        ErrorSums.of(*(torch.tensor(x[s]) for x in (v, t, at))) for s in (slice(0, 7), slice(7, 20))
    )
    assert joined.overall() == pytest.approx(whole.overall(), rel=1e-12)
    rows = whole.by_timestep()
    here = (at >= 0.4) & (at < 0.5)
    row = next(r for r in rows if 0.4 <= r["timestep"] < 0.5)
    assert row["error"] == pytest.approx(((v - t)[here] ** 2).sum() / (t[here] ** 2).sum())
    assert row["timestep"] == pytest.approx(at[here].mean())


def test_damage_of_one_interval_is_the_error_of_the_variant_with_it_alone(teacher_folder, tmp_path):
    """Two ways: branches off one pass over the teacher, and the stock forward with the student plugged in."""
    teacher = Teacher(teacher_folder)
    students = {i: made_result.student(teacher, i, affine=False) for i in (Interval(0, 1), Interval(3, 5))}
    model, inputs = teacher.transformer(), MemorySamples(8).batch(range(8))
    switch = VariantSwitcher(teacher, dict.fromkeys(students))
    switch._loaded.update({(i, False, "cpu", torch.float32): s for i, s in students.items()})
    found = sensitivities(model, switch, inputs)
    errors = variant_errors(model, switch, {"a": [Interval(0, 1)], "b": [Interval(3, 5)], "teacher": []}, inputs)
    assert errors["teacher"].overall() == 0
    for name, interval in {"a": Interval(0, 1), "b": Interval(3, 5)}.items():
        assert found[interval].overall() == pytest.approx(errors[name].overall(), rel=1e-5)
        assert found[interval].overall() > 1e-4
    changed = copy.deepcopy(model)
    with torch.no_grad():
        teachers = changed(**inputs, return_dict=False)[0]
        changed.transformer_blocks[0] = students[Interval(0, 1)].block
        del changed.transformer_blocks[1]
        velocity = changed(**inputs, return_dict=False)[0]
    assert errors["a"].overall() == pytest.approx(
        float((velocity - teachers).square().sum() / teachers.square().sum()), rel=1e-5
    )


def sums_of(errors, samples=40):
    """`ErrorSums` with sketches of made-up errors, each `(samples, N)`, on a target of ones."""
    target = torch.ones(samples, errors[0].shape[1], dtype=torch.float64)
    return {
        Interval(i, i + 1): ErrorSums.of(target + e, target, torch.linspace(0, 1, samples), sketch=True)
        for i, e in enumerate(errors)
    }


def test_products_of_sketches_are_those_of_the_errors():
    """Whatever the length: a multiple of the sketch's, more or less than it."""
    generator = torch.Generator().manual_seed(0)
    for length in (SKETCH * 3, SKETCH * 3 + 17, SKETCH // 2):
        a, b = (torch.randn(400, length, generator=generator, dtype=torch.float64) for _ in range(2))
        b += 0.5 * a
        sketches = error_sketch(a), error_sketch(b)
        assert sketches[0].shape == (400, SKETCH)
        exact, found = (a * b).sum(), (sketches[0] * sketches[1]).sum()
        noise = float(a.norm() * b.norm()) / (400 * SKETCH) ** 0.5
        assert abs(float(found - exact)) < 4 * noise


def test_a_plans_error_is_predicted_from_the_errors_alone():
    generator = torch.Generator().manual_seed(1)
    common = torch.randn(40, 300, generator=generator, dtype=torch.float64)
    errors = [0.1 * (common + torch.randn(40, 300, generator=generator, dtype=torch.float64)) for _ in range(3)]
    model = error_model(sums_of(errors))
    whole = sum(errors)
    assert model(model.replacements) == pytest.approx(float(whole.square().sum()) / (40 * 300), rel=0.03)
    for interval, error in zip(model.replacements, errors, strict=True):
        assert model([interval]) == pytest.approx(float(error.square().sum()) / (40 * 300), rel=1e-6)


def test_resamples_spread_as_the_samples_do():
    """Samples of very different errors: the spread of the resamples is the standard error of the mean."""
    scale = torch.linspace(0.1, 2, 40, dtype=torch.float64)[:, None]
    error = scale * torch.randn(40, 300, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    sums = sums_of([error])
    values = [model.products[0, 0] for model in resampled_models(sums, 400, 0)]
    each = error.square().sum(1) / 300
    assert np.mean(values) == pytest.approx(float(each.mean()), rel=0.05)
    assert np.std(values) == pytest.approx(float(each.std()) / 40**0.5, rel=0.15)
    again = [model.products[0, 0] for model in resampled_models(sums, 400, 0)]
    assert again == values
