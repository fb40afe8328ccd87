"""Which parameters there are, what they may be, and what a mistake is told."""

from dataclasses import replace

import pytest

from serve.api.schema import ImageRequest, parse
from serve.api.validation import to_generation_request
from serve.config import Limits
from serve.protocol import PipelineInfo, Refused

INFO = PipelineInfo(steps=20, height=64, width=96, multiple=16, arguments=("negative_prompt", "true_cfg_scale"))


def refusal(**values) -> Refused:
    with pytest.raises(Refused) as caught:
        parse({"prompt": "a red circle"} | values)
    return caught.value


def wanted(limits=None, info=INFO, **values):
    return to_generation_request(parse({"prompt": "a red circle"} | values), "req_1", info, limits or Limits())


def excess(limits=None, info=INFO, **values) -> Refused:
    with pytest.raises(Refused) as caught:
        wanted(limits, info, **values)
    assert caught.value.status == 422
    return caught.value


def test_a_prompt_is_enough_and_the_rest_is_as_the_pipeline_is_called():
    request = wanted()
    assert (request.model, request.count, request.width, request.height, request.steps) == ("auto", 1, 96, 64, 20)
    assert (request.arguments, request.previews, request.deadline, request.min_variant) == ({}, 0, None, None)


def test_every_parameter_reaches_the_request_to_the_engine():
    request = wanted(
        model="p75",
        n=3,
        size="32x48",
        num_inference_steps=7,
        seed=5,
        negative_prompt="blurry",
        true_cfg_scale=2,
        stream=True,
        partial_images=2,
        deadline_ms=1500,
    )
    assert (request.model, request.count, request.width, request.height, request.steps, request.seed) == (
        "p75",
        3,
        32,
        48,
        7,
        5,
    )
    assert request.arguments == {"negative_prompt": "blurry", "true_cfg_scale": 2.0}
    assert (request.previews, request.deadline) == (2, 1.5)


def test_null_counts_as_left_out_and_openais_other_parameters_are_ignored():
    asked = parse(
        {
            "prompt": "a",
            "n": None,
            "size": None,
            "user": "u",
            "style": "vivid",
            "moderation": "low",
            "safety_identifier": "s",
        }
    )
    assert asked.n == 1 and asked.size == "auto"


def test_without_a_seed_every_request_draws_another():
    assert len({wanted().seed for _ in range(20)}) == 20


@pytest.mark.parametrize(
    ("values", "param", "said"),
    [
        ({"prompt": None}, "prompt", "prompt is missing"),
        ({"prompt": "  \n"}, "prompt", "prompt is empty"),
        ({"prompt": 3}, "prompt", "prompt is 3: input should be a valid string"),
        ({"prompt": "lone \ud800"}, "prompt", "prompt is 'lone \\ud800'"),
        ({"n": 0}, "n", "n is 0: input should be greater than or equal to 1"),
        ({"n": 11}, "n", "n is 11: input should be less than or equal to 10"),
        ({"n": True}, "n", "n is True"),
        ({"n": "2"}, "n", "n is '2'"),
        ({"n": 1.5}, "n", "n is 1.5"),
        ({"n": 10**400}, "n", "n is 1000"),
        ({"size": "big"}, "size", "size is 'big'"),
        ({"size": "64x64\n"}, "size", "size is '64x64\\n'"),
        ({"size": "٦٤x64"}, "size", "size is"),
        ({"size": "-64x64"}, "size", "size is '-64x64'"),
        ({"size": "064x64"}, "size", "size is '064x64'"),
        ({"response_format": "url"}, "response_format", "response_format is 'url'"),
        ({"output_format": "gif"}, "output_format", "output_format is 'gif': input should be 'png', 'jpeg' or 'webp'"),
        ({"output_compression": 50}, "output_compression", "png keeps every pixel"),
        ({"output_format": "jpeg", "output_compression": 101}, "output_compression", "output_compression is 101"),
        ({"quality": "best"}, "quality", "quality is 'best'"),
        ({"background": "transparent"}, "background", "background is 'transparent'"),
        ({"stream": "true"}, "stream", "stream is 'true'"),
        ({"partial_images": 2}, "partial_images", "without a stream"),
        ({"stream": True, "partial_images": 4}, "partial_images", "partial_images is 4"),
        ({"num_inference_steps": 0}, "num_inference_steps", "num_inference_steps is 0"),
        ({"true_cfg_scale": float("inf")}, "true_cfg_scale", "finite"),
        ({"guidance_scale": -1}, "guidance_scale", "guidance_scale is -1"),
        ({"guidance_scale": True}, "guidance_scale", "guidance_scale is True"),
        ({"seed": -1}, "seed", "seed is -1"),
        ({"seed": 2**32}, "seed", "seed is 4294967296"),
        ({"model": ""}, "model", "model is ''"),
        ({"model": "m" * 4097}, "model", "model is 'mmm"),
        ({"model": "p75", "min_variant": "all"}, "min_variant", "min_variant applies only to the model auto"),
        ({"deadline_ms": 0}, "deadline_ms", "deadline_ms is 0"),
        ({"sizes": "64x64"}, "sizes", "unknown parameter 'sizes'; the nearest is size"),
        ({"zzzz": 1}, "zzzz", "unknown parameter 'zzzz'; known are prompt, model, n"),
    ],
)
def test_a_wrong_value_is_refused_with_the_parameter_the_value_and_what_would_be_right(values, param, said):
    refused = refusal(**values)
    assert (refused.status, refused.type, refused.param) == (400, "invalid_request_error", param)
    assert said in refused.message and len(refused.message) < 700


def test_refusals_tell_missing_unknown_and_wrongly_typed_apart():
    assert refusal(prompt=None).code == "missing_required_parameter"
    assert refusal(pormpt="a").code == "unknown_parameter"
    assert refusal(n="2").code == "invalid_type"
    assert refusal(n=11).code == "invalid_value"


@pytest.mark.parametrize(
    ("limits", "values", "param", "said"),
    [
        ({"prompt_characters": 5}, {}, "prompt", "prompt has 12 characters; at most 5 are taken"),
        (
            {"prompt_characters": 12},
            {"negative_prompt": "n" * 13},
            "negative_prompt",
            "negative_prompt has 13 characters",
        ),
        (
            {},
            {"guidance_scale": 2.0},
            "guidance_scale",
            "takes no guidance_scale; it takes negative_prompt, true_cfg_scale",
        ),
        ({}, {"size": "64x40"}, "size", "multiples of 16 here, such as 64x32"),
        ({}, {"size": "7x7"}, "size", "such as 16x16"),
        ({"pixels": 64 * 64}, {"size": "64x80"}, "size", "5120 pixels; at most 4096 are made"),
        ({"aspect": 2}, {"size": "160x64"}, "size", "at most 2 times the shorter one"),
        ({"steps": 30}, {"num_inference_steps": 31}, "num_inference_steps", "at most 30 are taken"),
        ({"pictures": 2}, {"n": 3}, "n", "at most 2 images"),
        (
            {"work": 64 * 64 * 20},
            {"size": "64x64", "n": 2},
            "n",
            "2 × 64x64 pixels × 20 steps is 163840; at most 81920",
        ),
        ({"work": 64 * 64 * 20}, {"size": "64x80"}, "size", "at most 81920"),
    ],
)
def test_what_this_server_does_not_serve_is_refused_with_the_limit(limits, values, param, said):
    refused = excess(Limits(**limits), **values)
    assert refused.param == param and said in refused.message


@pytest.mark.parametrize(
    "values", [{"model": "p75\r\nx-injected: 1"}, {"model": "p\u00e475"}, {"model": "p75\0"}, {"min_variant": "\x7f"}]
)
def test_a_name_that_no_variant_can_have_is_an_unknown_model(values):
    with pytest.raises(Refused) as caught:
        wanted(**values)
    assert (caught.value.status, caught.value.code, caught.value.param) == (404, "model_not_found", next(iter(values)))


def test_a_request_at_every_limit_is_served():
    limits = Limits(prompt_characters=12, pixels=64 * 32, aspect=2, steps=9, pictures=2, work=2 * 64 * 32 * 9)
    assert wanted(limits, size="64x32", num_inference_steps=9, n=2).count == 2


def test_the_schema_that_clients_can_read_describes_every_parameter_of_ours():
    properties = ImageRequest.model_json_schema()["properties"]
    assert all(
        "description" in properties[name]
        for name in ("negative_prompt", "num_inference_steps", "seed", "min_variant", "deadline_ms")
    )


def test_a_side_beyond_the_models_positions_is_refused():
    small = replace(INFO, largest=64)
    assert (wanted(info=small, size="64x64").width, wanted(size="64x96").height) == (64, 96)
    refused = excess(info=small, size="64x80")
    assert (refused.code, refused.param) == ("limit_exceeded", "size")
    assert str(refused.message).startswith("size is 64x80; the positions of this model reach to 64 pixels a side")
