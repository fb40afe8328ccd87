"""A whole job on a tiny pipeline of every family, with the default stages and all kinds of replacements.

What the families differ in is not what crosses between processes, so it all runs in this one.
"""

import io
import json

import pytest
from diffusers import StableDiffusion3Pipeline
from rich.console import Console

from jobs.pipeline import Job
from ppcl.calibration.dataset import CalibrationSet
from ppcl.calibration.schedules import Schedule
from ppcl.config.schema import Config
from ppcl.errors import UserError
from ppcl.export import export_folder
from ppcl.models.teacher import Teacher
from ppcl.replacements import KINDS, Interval, LinearFfn, PrunedFfn, PrunedHeads, TunedBlock
from ppcl.result import Result
from tests import tiny
from tests.one_process import stages_in_this_process
from tests.schedulers import with_scheduler
from tests.teacher_folders import as_hub_cache

ARGUMENTS = {
    "flux": {"guidance_scale": 2.5, "max_sequence_length": 12},
    "sd3": {"guidance_scale": 1.0, "max_sequence_length": 12},
    "sd3 of the hub": {"guidance_scale": 4.0, "max_sequence_length": 12, "clip_skip": 1},
}


def sd3_of_the_hub(folder):
    """As the hub's cache has it: fp16 names alone, files that are links, no T5."""
    own = tiny.sd3_pipeline(folder.parent / "own")
    pipeline = StableDiffusion3Pipeline.from_pretrained(own, text_encoder_3=None, tokenizer_3=None)
    pipeline.save_pretrained(folder.parent / "plain", variant="fp16", max_shard_size="100KB")
    return as_hub_cache(folder.parent / "plain", folder)


TEACHERS = {"flux": tiny.flux_pipeline, "sd3": tiny.sd3_pipeline, "sd3 of the hub": sd3_of_the_hub}


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
        variants={
            "budgets": [0.7],
            "custom": {"folded": ["modulations"], "narrow": ["ffn:4/50", "heads:4/50", "ffn:5/50"]},
        },
        evaluation={"max_prompts": 2},
    )
    with stages_in_this_process():
        Job(config, Console(file=io.StringIO())).run("cpu")
    result = Result(tmp_path / "result")
    kinds = {type(entry) for entry in result.replacements}
    assert kinds == set(KINDS)
    assert result.variants.keys() == {"teacher", "p70", "all", "folded", "narrow"}
    if family == "flux":
        assert any(entry.first >= 4 for entry in result.replacements if isinstance(entry, Interval)), (
            "none of single-stream blocks"
        )
        # All blocks have parts to make narrow, the linear maps stand for those of two streams.
        for kind, blocks in {PrunedFfn: range(10), PrunedHeads: range(10), LinearFfn: range(4)}.items():
            assert [entry.first for entry in result.replacements if isinstance(entry, kind)] == list(blocks), kind
    for name in ("p70", "narrow"):
        image = result.pipeline(name)(
            "a red circle", num_inference_steps=2, height=16, width=16, **ARGUMENTS[family]
        ).images[0]
        assert image.size == (16, 16)
    for name, variant in result.variants.items():
        assert variant.parameters == sum(p.numel() for p in _running(result, name)), name


def schnell(folder):
    """As FLUX.1-schnell: no embedded guidance scale, a schedule without shift."""
    tiny.flux_pipeline(folder, double=2, single=2)
    path = folder / "transformer" / "config.json"
    transformer = tiny.FluxTransformer2DModel.from_config(json.loads(path.read_text()) | {"guidance_embeds": False})
    tiny.randomised(transformer, 0).save_pretrained(folder / "transformer")
    return folder


# A teacher, its family's arguments, and the evaluations of a trajectory of four steps, as shares of noise.
FEW_STEPS = {
    "flux": (schnell, [1.0, 0.75, 0.5, 0.25]),
    "flux, unipc": (
        lambda f: with_scheduler(tiny.flux_pipeline(f, double=2, single=2), "unipc"),
        [0.999, 0.9, 0.75, 0.5],
    ),
    "sd3, heun": (
        lambda f: with_scheduler(tiny.sd3_pipeline(f, blocks=4), "heun"),
        [1.0, 0.8577, 0.8577, 0.6022, 0.6022, 0.0089, 0.0089],
    ),
}


@pytest.mark.parametrize("case", FEW_STEPS)
def test_a_job_goes_by_the_teachers_own_schedule(ray_cluster, tmp_path, case):
    make, visited = FEW_STEPS[case]
    teacher, family = make(tmp_path / "teacher"), case.split(",")[0]
    (tmp_path / "prompts.txt").write_text("\n".join(f"a {c}" for c in ("red", "green", "blue", "black", "white")))
    config = Config(
        teacher=teacher,
        prompts=tmp_path / "prompts.txt",
        output=tmp_path / "result",
        device="cpu",
        sampling={"steps": 4, "height": 16, "width": 16, "arguments": ARGUMENTS[family]},
        calibration={"states_per_prompt": 8, "validation": 0.3},
        detection={"method": "first_difference", "samples": 2},
        width={"text_similarity": 0.2, "linear_ffns": 0, "ffn_keep_percents": []},
        distillation={"steps": 2, "batch_size": 4, "warmup": 1},
        finetuning={"steps": 6, "batch_size": 4, "warmup": 1, "rollout_share": 0.5, "measured_plans": 1},
        variants={"budgets": [0.8]},
        evaluation={"max_prompts": 2},
    )
    with stages_in_this_process():
        Job(config, Console(file=io.StringIO())).run("cpu")
    samples = CalibrationSet(tmp_path / "result" / "calibration")
    shares = samples.batch(samples.ids("train"))["timestep"] / samples.adapter.timestep_scale
    assert sorted(set(shares.tolist())) == pytest.approx(sorted(set(visited)), abs=1e-3)
    schedule = Schedule.of_call(samples.call, samples.adapter)
    assert schedule.timesteps == pytest.approx(visited, abs=1e-3) and len(schedule.sigmas) == len(visited) + 1
    evaluation = json.loads((tmp_path / "result" / "evaluation" / "evaluation.json").read_text())
    assert all(row["velocity_error"] is not None for row in evaluation["variants"].values())
    # The result draws with the same scheduler.
    pipeline = Result(tmp_path / "result").pipeline("all")
    assert type(pipeline.scheduler) is type(Teacher(teacher).scheduler())
    image = pipeline("a red", num_inference_steps=4, height=16, width=16, **ARGUMENTS[family]).images[0]
    assert image.size == (16, 16)


def test_one_plan_of_qwen_image_is_trained_in_full(ray_cluster, teacher_folder, tmp_path):
    (tmp_path / "prompts.txt").write_text(
        "\n".join(f"a {c} {s}" for c in ("red", "green", "blue") for s in ("circle", "square"))
    )
    values = {
        "teacher": teacher_folder,
        "prompts": tmp_path / "prompts.txt",
        "output": tmp_path / "result",
        "device": "cpu",
        "sampling": {"steps": 2, "height": 32, "width": 32},
        "calibration": {"states_per_prompt": 2, "validation": 0.3},
        "detection": {"max_length": 3, "samples": 2, "resamples": 2, "screening_steps": 0},
        "distillation": {"steps": 3, "batch_size": 4, "warmup": 1},
        "finetuning": {"steps": 20, "batch_size": 8, "warmup": 1, "learning_rate": 2e-5, "plan": "p70", "train": "all"},
        "variants": {"budgets": [0.7], "custom": {"folded": ["modulations"]}},
        "evaluation": {"max_prompts": 2},
    }
    with stages_in_this_process():
        Job(Config.model_validate(values), Console(file=io.StringIO())).run("cpu")
        # Nothing is computed again but the sizes.
        small = Config.model_validate(values | {"memory": {"replacements_gb": 1e-6}})
        with pytest.raises(UserError, match="the blocks and replacements of p70 take .* GB, more than memory.repl"):
            Job(small, Console(file=io.StringIO())).run("cpu")
    result = Result(tmp_path / "result")
    assert [name for name in result.variants if result.finetuned(name)] == ["p70"]
    evaluation = json.loads((tmp_path / "result" / "evaluation" / "evaluation.json").read_text())["variants"]
    assert [name for name, row in evaluation.items() if row["fine_tuned"]] == ["p70"]
    tuned = [one for one in result.plan_files(result.variant("p70").plan) if isinstance(one, TunedBlock)]
    assert len(tuned) == result.variant("p70").blocks - sum(isinstance(o, Interval) for o in result.variant("p70").plan)
    assert not any(isinstance(one, TunedBlock) for one in result.replacements)
    export_folder(result, "p70", tmp_path / "exported")
    card = json.loads((tmp_path / "exported" / "ppcl.json").read_text())
    assert card["tuned_blocks"] == len(tuned) and card["parameters"] > 0
    assert "all parameters of the blocks that stayed" in (tmp_path / "exported" / "README.md").read_text()
    assert "All parameters of the blocks that stay" in (tmp_path / "result" / "report.html").read_text()


def _running(result, variant):
    """The parameters that a pipeline of the variant has, each once; low-rank modulations are multiplied out."""
    transformer = result.pipeline(variant).transformer
    return {id(p): p for p in transformer.parameters()}.values()
