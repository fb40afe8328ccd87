"""The velocity error of variants and the sensitivity of replacements."""

import copy

import numpy as np
import pytest
import torch

from ppcl.evaluation.velocity_error import ErrorSums, sensitivities, variant_errors
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
