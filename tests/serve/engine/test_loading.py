"""What is loaded for the variants that are served, and what can be switched to with it."""

import json

import pytest
import torch

from ppcl.errors import UserError
from ppcl.models import IdentityBlock
from ppcl.replacements import Interval
from ppcl.storage.manifest import Artifacts
from serve.config import EngineSettings
from serve.engine.loading import load, qualities


def loaded(folder, names=None):
    return load(folder, None, EngineSettings(variants=names), "cpu", torch.float32)


def test_all_variants_are_served_by_default(result_folder):
    weights = loaded(result_folder)
    assert list(weights.variants) == ["teacher", "p90", "p75", "all", "ends"] and weights.blocks == set(range(6))
    assert weights.variant("0-1,4-5").plan == (Interval(0, 1), Interval(4, 5))
    for nothing in ("no-such", "0-2", "0-1,0-1", "", "../ends", "0-1," * 3000):
        assert weights.variant(nothing) is None


def test_what_no_served_variant_needs_is_not_in_memory(result_folder):
    """`ends` replaces blocks 0, 1, 4 and 5 and keeps 2 and 3."""
    weights = loaded(result_folder, ["ends"])
    assert set(weights.switch.files) == {Interval(0, 1), Interval(4, 5)} and weights.blocks == {2, 3}
    standing = weights.switch.blocks(weights.pipeline.transformer)
    assert [isinstance(block, IdentityBlock) for block in standing] == [True, True, False, False, True, True]
    assert weights.variant("teacher") is None and weights.variant("0-1") is None and weights.variant("2-3") is None
    assert weights.variant("0-1,4-5") is not None


def test_a_part_draws_what_the_whole_does(result_folder):
    pictures = []
    for names in (None, ["ends"]):
        weights = loaded(result_folder, names)
        weights.switch(weights.pipeline.transformer, weights.variants["ends"].plan)
        seeded = {"generator": torch.Generator().manual_seed(0), "height": 32, "width": 32, "num_inference_steps": 2}
        pictures.append(weights.pipeline("a photo of a red circle", output_type="latent", **seeded).images)
    assert torch.equal(*pictures)


def test_a_variant_that_is_none_is_told_with_those_there_are(result_folder):
    with pytest.raises(
        UserError, match="engine.variants: there is no variant 'p10' in .*; there are teacher, p90, p75, all, ends"
    ):
        loaded(result_folder, ["p10"])


def test_scores_are_the_checkers_and_a_velocity_error_is_none(tmp_path, teacher_folder):
    from tests import made_result

    root = made_result.result(tmp_path / "job", teacher_folder)
    assert qualities(root, ["teacher", "all"]) == {"teacher": None, "all": None}
    rows = {
        "teacher": {"world": {"overall": {"score": 0.9}}, "velocity_error": 0.0},
        "all": {"world": None, "velocity_error": 0.2},
        "p75": {"world": None, "velocity_error": 3.0},
    }
    artifacts = Artifacts(root)
    artifacts.path("evaluation").mkdir()
    artifacts.path("evaluation", "evaluation.json").write_text(json.dumps({"variants": rows}))
    artifacts.commit("evaluation", "2")
    assert qualities(root, ["teacher", "all", "p75", "ends"]) == {
        "teacher": 0.9,
        "all": None,
        "p75": None,
        "ends": None,
    }
    artifacts.path("evaluation", "evaluation.json").write_text("{}")
    with pytest.raises(UserError, match="the evaluation in .* is damaged"):
        qualities(root, ["teacher"])


def test_a_named_score_is_the_share_that_is_left_of_the_teachers(tmp_path, teacher_folder):
    import numpy as np

    from ppcl.evaluation.benchmarks import Benchmark
    from tests import made_result

    root = made_result.result(tmp_path / "job", teacher_folder)

    def of(scorer, suite, half, sign=1):
        variants = {"teacher": {"": np.full(4, sign * 2.0)}, "all": {"": np.full(4, sign * 2.0 * half)}}
        return Benchmark(scorer, suite, variants).record(0.95, 0)

    benchmarks = [of("clip", "dpg", 0.5), of("clip", "geneval", 0.9), of("reward", "dpg", 0.5, sign=-1)]
    artifacts = Artifacts(root)
    artifacts.path("scores").mkdir()
    artifacts.path("scores", "scores.json").write_text(json.dumps({"benchmarks": benchmarks, "mean_drop": {}}))
    artifacts.commit("scores", "3")
    found = qualities(root, ["teacher", "all", "p75"], "clip")
    assert found == {"teacher": 1.0, "all": pytest.approx(0.7), "p75": None}
    with pytest.raises(UserError, match="elastic.score: the result has no score 'pick' .*; it has clip, reward; add a"):
        qualities(root, ["teacher"], "pick")
    with pytest.raises(UserError, match="elastic.score: 'reward' cannot be a share of the teacher's"):
        qualities(root, ["teacher"], "reward")
