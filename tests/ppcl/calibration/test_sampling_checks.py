"""Calls that the pipeline would refuse in mid-stage, or change, are refused at the start in one sentence."""

import json

import pytest
import torch

from ppcl.calibration.encoding import encode
from ppcl.calibration.sampling_checks import check_sampling, check_size
from ppcl.config.schema import Sampling
from ppcl.errors import UserError
from ppcl.models.teacher import Teacher
from tests import tiny
from tests.teacher_folders import set_index

MAKERS = {"qwen": tiny.qwen_pipeline, "flux": tiny.flux_pipeline, "sd3": tiny.sd3_pipeline}
SIZES = {"qwen": (32, 32), "flux": (16, 16), "sd3": (16, 16)}


@pytest.fixture(scope="module")
def teachers(tmp_path_factory):
    return {name: Teacher(make(tmp_path_factory.mktemp(name) / name)) for name, make in MAKERS.items()}


def check(teachers, family, height=None, width=None, **arguments):
    size = SIZES[family]
    sampling = Sampling(steps=2, height=height or size[0], width=width or size[1], arguments=arguments)
    check_sampling(teachers[family], sampling)


@pytest.mark.parametrize(
    ("family", "arguments"),
    [
        ("qwen", {}),
        ("qwen", {"true_cfg_scale": 4, "negative_prompt": " ", "max_sequence_length": 1024, "guidance_scale": None}),
        ("qwen", {"sigmas": [1.0, 0.5], "attention_kwargs": {"scale": 1}, "negative_prompt": None}),
        ("flux", {"guidance_scale": 3.5, "true_cfg_scale": 2.0, "negative_prompt": "bad", "max_sequence_length": 1}),
        ("sd3", {"clip_skip": 1, "skip_guidance_layers": [2], "skip_layer_guidance_scale": 3, "mu": None}),
        ("sd3", {"clip_skip": 0, "guidance_scale": 1}),
    ],
)
def test_what_the_pipelines_take_is_not_refused(teachers, family, arguments):
    check(teachers, family, **arguments)


@pytest.mark.parametrize(
    ("family", "arguments", "sentence"),
    [
        (
            "qwen",
            {"true_cfg_scale": "4"},
            "true_cfg_scale '4', and QwenImagePipeline takes float there; write the number",
        ),
        ("qwen", {"true_cfg_scale": None}, "true_cfg_scale None, and QwenImagePipeline takes float there"),
        ("flux", {"true_cfg_scale": True}, "true_cfg_scale True, and FluxPipeline takes float there"),
        ("sd3", {"guidance_scale": [4.0]}, r"guidance_scale \[4.0\], and StableDiffusion3Pipeline takes float there"),
        ("sd3", {"guidance_scale": float("nan")}, "guidance_scale nan, and"),
        ("qwen", {"sigmas": [1.0, "a"]}, r"sigmas \[1.0, 'a'\], and QwenImagePipeline takes list\[float\]"),
        ("flux", {"ip_adapter_image": "cat.png"}, "ip_adapter_image 'cat.png', and FluxPipeline takes PIL"),
        ("qwen", {"max_sequence_length": 0}, "max_sequence_length 0; give the tokens of a prompt, at least 1"),
        ("qwen", {"max_sequence_length": 2000}, "max_sequence_length cannot be greater than 1024 but is 2000; change"),
        ("flux", {"max_sequence_length": 2000}, "max_sequence_length cannot be greater than 512 but is 2000; change"),
        (
            "sd3",
            {"max_sequence_length": 513},
            "does not take sampling.arguments as they are: max_sequence_length",
        ),
        ("sd3", {"max_sequence_length": "77"}, "takes int there; write the number without quotes"),
        ("sd3", {"max_sequence_length": 2.5}, "max_sequence_length 2.5, and StableDiffusion3Pipeline takes int there"),
        ("qwen", {"negative_prompt": ["a", "b"]}, r"negative_prompt \['a', 'b'\]; give one prompt, as text"),
        ("sd3", {"negative_prompt": ["a"]}, r"negative_prompt \['a'\]; give one prompt, as text"),
        ("sd3", {"clip_skip": 2}, "clip_skip 2; the text encoders can skip 0 to 1 layers"),
        ("sd3", {"clip_skip": -1}, "clip_skip -1; the text encoders can skip 0 to 1 layers"),
        ("flux", {"clip_skip": 1}, "'clip_skip', which cannot be set for FluxPipeline; it takes"),
    ],
)
def test_an_argument_that_the_pipeline_does_not_take_is_refused(teachers, family, arguments, sentence):
    with pytest.raises(UserError, match=sentence) as refused:
        check(teachers, family, **arguments)
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize(
    ("family", "height", "width", "sentence"),
    [
        (
            "qwen",
            44,
            36,
            "sampling.height is 44 and sampling.width is 36, and a QwenImagePipeline draws multiples of 8 pixels; the "
            "nearest to 44 are 40 and 48; the nearest to 36 are 32 and 40",
        ),
        (
            "flux",
            18,
            16,
            "sampling.height is 18, and a FluxPipeline draws multiples of 4 pixels; the nearest to 18",
        ),
        ("sd3", 16, 3, "sampling.width is 3, and a .* draws multiples of 4 pixels; the nearest to 3 are 4$"),
        ("sd3", 16, 36, "sampling.width is 36, and the positions of .* reach to 32 pixels .pos_embed_max_size.; give"),
    ],
)
def test_a_size_that_would_be_drawn_as_another_is_refused(teachers, family, height, width, sentence):
    with pytest.raises(UserError, match=sentence):
        check_size(teachers[family], height, width)


def test_sizes_of_a_configuration_are_multiples_of_the_models_own_tokens(tmp_path):
    """A configuration takes multiples of 8; published models draw multiples of 16."""
    folder = tiny.qwen_pipeline(tmp_path)
    path = folder / "vae" / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"temperal_downsample": [False] * 3}))
    check_sampling(Teacher(folder), Sampling(height=48, width=32))
    with pytest.raises(UserError, match="sampling.height is 40, and .* multiples of 16 pixels; .* 40 are 32 and 48"):
        check_sampling(Teacher(folder), Sampling(height=40, width=32))


@torch.no_grad()
def stock_text(teacher, prompts, **arguments):
    """The text that the stock call gives its transformer."""
    pipeline = teacher.pipeline()
    seen = []
    hook = pipeline.transformer.register_forward_pre_hook(
        lambda module, args, given: seen.append((given["encoder_hidden_states"], given["pooled_projections"])),
        with_kwargs=True,
    )
    pipeline(prompts, num_inference_steps=1, height=16, width=16, output_type="latent", **arguments)
    hook.remove()
    return seen[0]


@pytest.mark.parametrize("clip_skip", [None, 0, 1])
def test_layers_that_are_skipped_are_those_of_the_stock_call(teachers, clip_skip):
    """It skips them for the prompts, and not for the negative prompt."""
    teacher, prompts = teachers["sd3"], ["a red cat", "two dogs"]
    arguments = {} if clip_skip is None else {"clip_skip": clip_skip}
    text, pooled = stock_text(teacher, prompts, guidance_scale=4.0, negative_prompt=["no"] * 2, **arguments)
    sampling = Sampling(steps=1, height=16, width=16, arguments=arguments)
    pipeline = teacher.pipeline_without_transformer()
    ours = encode(pipeline, teacher.adapter, prompts, sampling)
    (negative,) = encode(pipeline, teacher.adapter, ["no"], sampling, negative=True)
    for row, embedding in enumerate([negative, negative, *ours]):
        torch.testing.assert_close(embedding["encoder_hidden_states"], text[row])
        torch.testing.assert_close(embedding["pooled_projections"], pooled[row])


def test_skipping_a_layer_is_another_embedding(teachers):
    one, two = (
        encode(
            teachers["sd3"].pipeline_without_transformer(),
            teachers["sd3"].adapter,
            ["a red cat"],
            Sampling(steps=1, height=16, width=16, arguments=arguments),
        )[0]["encoder_hidden_states"]
        for arguments in ({}, {"clip_skip": 1})
    )
    assert (one - two).norm() > 0.05 * one.norm()


def test_prompts_are_encoded_without_a_t5(tmp_path):
    folder = tiny.sd3_pipeline(tmp_path)
    set_index(folder, text_encoder_3=[None, None], tokenizer_3=[None, None])
    teacher, prompts = Teacher(folder), ["a red cat", "two dogs"]
    text, pooled = stock_text(teacher, prompts, guidance_scale=1.0)
    sampling, pipeline = Sampling(steps=1, height=16, width=16), teacher.pipeline_without_transformer()
    ours = encode(pipeline, teacher.adapter, prompts, sampling, transformer_config=teacher.config())
    assert pipeline.transformer is None
    for row, embedding in enumerate(ours):
        torch.testing.assert_close(embedding["encoder_hidden_states"], text[row])
        torch.testing.assert_close(embedding["pooled_projections"], pooled[row])
