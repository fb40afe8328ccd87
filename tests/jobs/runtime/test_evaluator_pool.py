"""Evaluators: what they cannot load, and devices that do not hold all their weights."""

from dataclasses import replace
from types import SimpleNamespace

import pytest

from jobs.runtime.evaluator_pool import EvaluatorPool, offload_of
from ppcl.config.schema import Config
from ppcl.errors import UserError
from ppcl.evaluation.images import image_path, load_images
from tests import made_result
from tests.stage_context import context


def test_what_is_wrong_with_their_input_arrives_as_one_sentence(ray_cluster, teacher_folder, tmp_path):
    config = Config(teacher=teacher_folder, prompts=tmp_path / "prompts.txt", device="cpu")
    gone = SimpleNamespace(place=str(tmp_path / "gone"))
    (tmp_path / "students").mkdir()
    given = replace(context(config, tmp_path / "variants", students=tmp_path / "students"), teacher=gone)
    with (
        pytest.raises(UserError, match=str(gone.place)),
        EvaluatorPool(given) as evaluators,
    ):
        evaluators.one(lambda a: a.finetuned.remote({}))


def test_evaluators_draw_the_same_where_weights_come_and_go(ray_cluster, teacher_folder, tmp_path):
    root = made_result.result(tmp_path / "job", teacher_folder)
    images = {}
    for offload in ("none", "group"):
        config = Config(
            teacher=teacher_folder,
            prompts=tmp_path / "prompts.txt",
            memory={"offload": offload, "replacements_gb": 6e-4},
            sampling={"steps": 2, "height": 32, "width": 32},
        )
        given = context(config, tmp_path / offload, students=root / "students")
        with EvaluatorPool(given, draws_images=True) as evaluators:
            mode, notes = offload_of(evaluators)
            assert mode == offload and [note.partition(" (")[0] for note in notes] == ["offload: group"] * (
                mode != "none"
            )
            for name, plan in (("teacher", ()), ("all", made_result.INTERVALS)):
                evaluators.one(lambda a, n=name, p=plan: a.pictures.remote(n, p, ["a red circle"], [0]))
        images[offload] = [load_images([image_path(tmp_path / offload, name, 0)]) for name in ("teacher", "all")]
    for plain, moved in zip(images["none"], images["group"], strict=True):
        # Sums on a CPU round by where weights lie in memory.
        assert (plain != moved).mean() < 0.001
    assert (images["none"][0] != images["none"][1]).mean() > 0.05


def test_a_device_that_is_too_small_for_any_mode_is_told(ray_cluster, teacher_folder, tmp_path):
    root = made_result.result(tmp_path / "job", teacher_folder)
    config = Config(teacher=teacher_folder, prompts=tmp_path / "prompts.txt", memory={"device_gb": 1e-6})
    with (
        pytest.raises(UserError, match="the device has 1e-06 GB .* the smallest that would do has .* GB free"),
        EvaluatorPool(context(config, tmp_path / "evaluation", students=root / "students")) as evaluators,
    ):
        offload_of(evaluators)
