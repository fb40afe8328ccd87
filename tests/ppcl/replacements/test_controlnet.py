"""A ControlNet's residuals on variants: each is added where the teacher's block stood, whatever stands there now."""

import math

import pytest
import torch

from ppcl.models import adapter_of, embed, head, run_blocks
from ppcl.replacements import Plan
from ppcl.replacements.switcher import VariantSwitcher
from tests import tiny

# The arguments of the stock forward that take residuals, by block list.
ARGUMENTS = {
    "QwenImageTransformer2DModel": {"transformer_blocks": "controlnet_block_samples"},
    "FluxTransformer2DModel": {
        "transformer_blocks": "controlnet_block_samples",
        "single_transformer_blocks": "controlnet_single_block_samples",
    },
    "SD3Transformer2DModel": {"transformer_blocks": "block_controlnet_hidden_states"},
}
PLANS = ["", "2-3", "0-1,4-5", "text:1-3,ffn:2/50,4-5,modulations"]


def residual_numbers(count, given, sd3):
    """By block of a list, which of its residuals it gets: the families' own rule."""
    return [int(i / (count / given)) if sd3 else i // math.ceil(count / given) for i in range(count)]


@pytest.mark.parametrize("plan", PLANS)
@torch.no_grad()
def test_residuals_reach_the_places_of_the_teachers_blocks(every_kind, plan):
    teacher, files = every_kind
    model, adapter = tiny.aligned(teacher.transformer()), teacher.adapter
    switch = VariantSwitcher(teacher, files)
    inputs = tiny.inputs(model)
    tokens = embed(model, inputs)[0].img.shape[1]
    generator = torch.Generator().manual_seed(3)
    given, added = {}, {}
    for argument, numbers in zip(ARGUMENTS[adapter.transformer].values(), adapter.block_ranges(model), strict=True):
        residuals = [torch.randn(3, tokens, 32, generator=generator) for _ in range(2)]
        given[argument] = residuals
        chosen = residual_numbers(len(numbers), 2, sd3=adapter.transformer.startswith("SD3"))
        for number, index in zip(numbers, chosen, strict=True):
            # The block that drops the text stream, the last of SD3, gets none.
            drops_text = getattr(switch.blocks(model)[number], "context_pre_only", False)
            added[number] = 0.0 if drops_text else residuals[index]
    switch(model, Plan.parse(plan))
    made = model(**inputs, **given, return_dict=False)[0]
    without = model(**inputs, return_dict=False)[0]

    # By hand: what stands at each block number, and behind it the residual of that number.
    streams, context = embed(model, inputs)
    for number, block in enumerate(adapter.blocks(model)):
        streams = run_blocks(adapter, [block], streams, context)
        streams = streams._replace(img=streams.img + added[number])
    torch.testing.assert_close(made, head(model, streams, inputs), rtol=1e-5, atol=1e-5)
    assert (made - without).abs().max() > 0.01


def test_a_stock_controlnet_pipeline_runs_on_a_variant(teacher_folder, tmp_path):
    """diffusers' own, from a pipeline of a result, with a tiny ControlNet of random weights."""
    from diffusers import QwenImageControlNetModel, QwenImageControlNetPipeline

    from ppcl.result import Result
    from tests.ppcl.export.replacements import result

    opened = Result(result(tmp_path / "job", teacher_folder, {"small": "2-3,modulations"}))
    pipeline = opened.pipeline("small")
    config = {k: v for k, v in pipeline.transformer.config.items() if not k.startswith("_")} | {"num_layers": 2}
    controlnet = QwenImageControlNetModel.from_config(config)
    tiny.randomised(controlnet, 1)
    controlled = QwenImageControlNetPipeline.from_pipe(pipeline, controlnet=controlnet)
    controlled.set_progress_bar_config(disable=True)
    control = torch.rand(1, 3, 32, 32, generator=torch.Generator().manual_seed(0))

    def image(scale, variant):
        opened.switch(controlled, variant)
        return controlled(
            "a red circle",
            control_image=control,
            controlnet_conditioning_scale=scale,
            num_inference_steps=2,
            height=32,
            width=32,
            true_cfg_scale=1.0,
            output_type="np",
            generator=torch.Generator().manual_seed(1),
        ).images

    assert abs(image(1.0, "small") - image(0.0, "small")).max() > 0.001
    assert abs(image(1.0, "small") - image(1.0, "teacher")).max() > 0.001
    assert adapter_of(controlled.transformer).name == "Qwen-Image"
