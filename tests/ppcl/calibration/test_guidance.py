"""Guidance against the stock pipelines: the velocity that their schedulers are given."""

import diffusers
import pytest
import torch

from ppcl.calibration.guidance import Guidance
from ppcl.config.schema import Sampling
from ppcl.models import adapter_of
from tests import tiny

FAMILIES = {
    "qwen": (tiny.qwen_pipeline, {"true_cfg_scale": 3.0, "negative_prompt": "a blue square"}, 32),
    "flux": (tiny.flux_pipeline, {"true_cfg_scale": 2.5, "negative_prompt": "blue"}, 16),
    "sd3": (tiny.sd3_pipeline, {"guidance_scale": 5.0}, 16),
}


@pytest.fixture(scope="module", params=FAMILIES)
def guided(request, tmp_path_factory):
    """By family: its pipeline, and the arguments that switch guidance on."""
    make, arguments, size = FAMILIES[request.param]
    folder = make(tmp_path_factory.mktemp(request.param) / "pipeline")
    pipeline = diffusers.DiffusionPipeline.from_pretrained(folder)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline, arguments, size


def test_the_guided_velocity_is_what_the_pipelines_scheduler_is_given(guided, monkeypatch):
    pipeline, arguments, size = guided
    returned, given = [], []
    pipeline.transformer.register_forward_hook(lambda module, args, output: returned.append(output[0].clone()))
    step = pipeline.scheduler.step

    def watched(velocity, *rest, **named):
        given.append(velocity.clone())
        return step(velocity, *rest, **named)

    monkeypatch.setattr(pipeline.scheduler, "step", watched)
    pipeline("a red circle", height=size, width=size, num_inference_steps=2, output_type="latent", **arguments)
    adapter = adapter_of(pipeline.transformer)
    guidance = Guidance.of(adapter, type(pipeline).__name__, Sampling(arguments=arguments))
    assert guidance is not None and len(given) == 2
    for number, velocity in enumerate(given):
        if adapter.packed_latents:
            conditional, unconditional = returned[2 * number : 2 * number + 2]
        else:
            unconditional, conditional = returned[number].chunk(2)
        assert not torch.allclose(velocity, conditional, atol=1e-3)
        assert torch.allclose(guidance(conditional, unconditional), velocity, atol=1e-5)


@pytest.mark.parametrize(
    ("pipeline", "arguments"),
    [
        ("QwenImagePipeline", {}),
        ("QwenImagePipeline", {"true_cfg_scale": 4.0}),
        ("QwenImagePipeline", {"true_cfg_scale": 1.0, "negative_prompt": " "}),
        ("FluxPipeline", {"negative_prompt": "blue"}),
        ("StableDiffusion3Pipeline", {"guidance_scale": 1.0}),
    ],
)
def test_where_the_pipeline_makes_one_call_a_step_there_is_none(pipeline, arguments):
    adapter = adapter_of(pipeline.replace("Pipeline", "Transformer2DModel").replace("StableDiffusion3", "SD3"))
    assert Guidance.of(adapter, pipeline, Sampling(arguments=arguments)) is None
