"""A whole job on a tiny pipeline of every family, with the default stages and all kinds of replacements.

What the families differ in is not what crosses between processes, so it all runs in this one.
"""

import io

import pytest
from rich.console import Console

from jobs.pipeline import Job
from ppcl.config.schema import Config
from ppcl.replacements import KINDS, Interval
from ppcl.result import Result
from tests import tiny
from tests.one_process import stages_in_this_process

ARGUMENTS = {
    "flux": {"guidance_scale": 2.5, "max_sequence_length": 12},
    "sd3": {"guidance_scale": 1.0, "max_sequence_length": 12},
}
TEACHERS = {"flux": tiny.flux_pipeline, "sd3": tiny.sd3_pipeline}


@pytest.mark.parametrize("family", TEACHERS)
def test_a_family_goes_through_every_stage(ray_cluster, tmp_path, family):
    teacher = TEACHERS[family](tmp_path / "teacher")
    (tmp_path / "prompts.txt").write_text(
        "\n".join(f"a {c} {s}" for c in ("red", "green", "blue") for s in ("circle", "square"))
    )
    config = Config(
        teacher=teacher,
        prompts=tmp_path / "prompts.txt",
        output=tmp_path / "result",
        device="cpu",
        sampling={"steps": 2, "height": 16, "width": 16, "arguments": ARGUMENTS[family]},
        calibration={"states_per_prompt": 2, "validation": 0.3},
        detection={"max_length": 3, "samples": 2, "resamples": 2, "screening_steps": 1},
        width={"text_similarity": 0.2, "ffn_keep_percents": [50], "head_keep_percents": [50]},
        distillation={"steps": 3, "batch_size": 4, "warmup": 1},
        finetuning={"steps": 2, "batch_size": 4, "warmup": 1, "measured_plans": 2},
        variants={"budgets": [0.7], "custom": {"folded": ["modulations"]}},
        evaluation={"max_prompts": 2},
    )
    with stages_in_this_process():
        Job(config, Console(file=io.StringIO())).run("cpu")
    result = Result(tmp_path / "result")
    kinds = {type(entry) for entry in result.replacements}
    assert kinds == set(KINDS)
    assert result.variants.keys() == {"teacher", "p70", "all", "folded"}
    if family == "flux":
        assert any(entry.first >= 4 for entry in result.replacements if isinstance(entry, Interval)), (
            "none of single-stream blocks"
        )
    image = result.pipeline("p70")(
        "a red circle", num_inference_steps=2, height=16, width=16, **ARGUMENTS[family]
    ).images[0]
    assert image.size == (16, 16)
    for name, variant in result.variants.items():
        assert variant.parameters == sum(p.numel() for p in _running(result, name)), name


def _running(result, variant):
    """The parameters that a pipeline of the variant has, each once; low-rank modulations are multiplied out."""
    transformer = result.pipeline(variant).transformer
    return {id(p): p for p in transformer.parameters()}.values()
