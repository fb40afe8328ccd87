"""Evaluators that cannot load what they are given."""

from dataclasses import replace
from types import SimpleNamespace

import pytest

from jobs.runtime.evaluator_pool import EvaluatorPool
from ppcl.config.schema import Config
from ppcl.errors import UserError
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
