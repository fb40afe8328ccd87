"""Pipelines of every family whose weights come and go draw the same pictures, bit by bit, in less memory."""

import inspect
import itertools

import pytest
import torch
from torch import nn

from ppcl.config.schema import Memory
from ppcl.errors import UserError
from ppcl.models import adapter_of
from ppcl.models.placement import Images, Needs, cache_of, choose_mode, place
from ppcl.models.teacher import Teacher
from ppcl.models.weight_cache import tensor_bytes
from tests import tiny

FAMILIES = {"qwen": tiny.qwen_pipeline, "flux": tiny.flux_pipeline, "sd3": tiny.sd3_pipeline}


@pytest.fixture(scope="module", params=FAMILIES)
def teacher(request, tmp_path_factory):
    return Teacher(FAMILIES[request.param](tmp_path_factory.mktemp("placed") / request.param))


def picture(pipeline):
    size = {"height": 32, "width": 32} if "Qwen" in type(pipeline).__name__ else {"height": 16, "width": 16}
    generator = torch.Generator().manual_seed(0)
    return pipeline("a red circle", num_inference_steps=2, generator=generator, output_type="pt", **size).images


def on_the_device_while_they_run(pipeline, cache):
    """Have every module check that the weights which it uses itself are copies on the device."""

    def check(module, _):
        assert all(cache.holds(tensor) for tensor in module._parameters.values() if tensor is not None)

    names = [name for name in pipeline.components if name.startswith("text_encoder")]
    apart = [getattr(pipeline, name) for name in names] + adapter_of(pipeline.transformer).blocks(pipeline.transformer)
    for module in itertools.chain(*(outer.modules() for outer in apart)):
        module.register_forward_pre_hook(check)


@pytest.mark.parametrize("mode", ["model", "group"])
def test_pictures_are_the_same_bit_by_bit(teacher, mode):
    plain, pipeline = (tiny.aligned(teacher.pipeline()) for _ in range(2))
    placement = place(pipeline, "cpu", Memory(offload=mode))
    cache, blocks = cache_of(pipeline.transformer), adapter_of(pipeline.transformer).blocks(pipeline.transformer)
    assert placement.mode == mode and placement.cache is cache
    on_the_device_while_they_run(pipeline, cache)
    for _ in range(2):
        assert torch.equal(picture(pipeline), picture(plain))
        assert not cache.held, "the VAE decodes with weights beside it"
    encoders = placement.needs.encoders
    limit = max(sum(map(tensor_bytes, blocks)), *encoders) if mode == "model" else placement.needs.cached("group")
    assert cache.most_held <= limit < sum(map(tensor_bytes, blocks)) + sum(encoders)


def test_blocks_stay_from_step_to_step_where_all_of_them_fit(teacher):
    pipeline = teacher.pipeline()
    cache = place(pipeline, "cpu", Memory(offload="model")).cache
    inputs = tiny.inputs(pipeline.transformer)
    pipeline.transformer(**inputs)
    once = cache.copied
    pipeline.transformer(**inputs)
    assert cache.copied == once == sum(map(tensor_bytes, adapter_of(pipeline.transformer).blocks(pipeline.transformer)))


def test_all_is_on_the_device_where_it_fits_or_where_there_is_no_limit(teacher):
    for memory in (Memory(), Memory(device_gb=100), Memory(offload="none")):
        pipeline = teacher.pipeline()
        assert place(pipeline, "cpu", memory).mode == "none" and cache_of(pipeline.transformer) is None


def test_a_pipeline_without_a_transformer_encodes_the_same(teacher):
    plain, pipeline = (tiny.aligned(teacher.pipeline_without_transformer()) for _ in range(2))
    cache = place(pipeline, "cpu", Memory(offload="group")).cache
    known = inspect.signature(pipeline.encode_prompt).parameters
    arguments = {name: None for name in ("prompt_2", "prompt_3") if name in known}
    made, expected = (p.encode_prompt(prompt=["a red circle"], **arguments) for p in (pipeline, plain))
    assert all(torch.equal(a, b) for a, b in zip(made, expected) if isinstance(a, torch.Tensor)) and cache.copied


GB = 10**9
# 20B of transformer and 8B of text encoder, in bfloat16.
LARGE = Needs(
    resident=1 * GB,
    encoders=(16 * GB,),
    layers=(3 * GB,),
    blocks=40 * GB,
    block=GB,
    beside=5 * GB,
    denoising=4 * GB,
    decoding=6 * GB,
)


@pytest.mark.parametrize(
    ("free", "mode"),
    [(None, "none"), (68, "none"), (67, "model"), (45, "model"), (44, "group"), (8, "group"), (4, "group")],
)
def test_auto_takes_the_first_mode_that_fits(free, mode):
    assert choose_mode("auto", LARGE, free and free * GB) == mode


@pytest.mark.parametrize(
    ("offload", "free", "sentence"),
    [
        (
            "auto",
            3,
            "the device has 3 GB .* group needs 4 GB for weights alone; the smallest that would do has 8 GB free",
        ),
        ("group", 3, "the smallest that would do has 8 GB free, with memory.offload: group"),
        ("none", 50, "memory.offload: none needs 62 GB for weights alone; set memory.offload to model or auto"),
        ("model", 20, "memory.offload: model needs 41 GB for weights alone; set memory.offload to group or auto"),
    ],
)
def test_a_device_that_is_too_small_is_refused_with_what_would_do(offload, free, sentence):
    with pytest.raises(UserError, match=sentence):
        choose_mode(offload, LARGE, free * GB)


def test_what_a_pipeline_needs_is_counted_from_its_weights(teacher):
    pipeline = teacher.pipeline()
    needs = place(pipeline, "cpu", Memory(), Images(2, 32, 32), beside=7).needs
    weights = sum(tensor_bytes(part) for part in pipeline.components.values() if isinstance(part, nn.Module))
    assert needs.weights("none") == weights + 7
    assert needs.weights("group") < needs.weights("model") < needs.weights("none")
    twice = place(pipeline, "cpu", Memory(), Images(4, 32, 32)).needs
    assert (twice.denoising, twice.decoding) == (2 * needs.denoising, 2 * needs.decoding)
    # One image after the other.
    pipeline.vae.enable_slicing()
    assert 2 * place(pipeline, "cpu", Memory(), Images(2, 32, 32)).needs.decoding == needs.decoding


def test_the_bound_of_the_configuration_decides_on_any_device(teacher):
    pipeline = teacher.pipeline()
    needs = place(pipeline, "cpu", Memory(), Images(1, 32, 32)).needs
    most = (needs.total("model") - 1) / 1e9
    assert place(pipeline, "cpu", Memory(device_gb=most), Images(1, 32, 32)).mode == "group"
    with pytest.raises(UserError, match="the device has .* GB for the pipeline"):
        place(teacher.pipeline(), "cpu", Memory(device_gb=needs.resident / 1e9), Images(1, 32, 32))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("mode", ["model", "group"])
def test_pictures_of_a_gpu_are_the_same_bit_by_bit(teacher, mode):
    plain, pipeline = teacher.pipeline("cuda", torch.bfloat16), teacher.pipeline("cpu", torch.bfloat16)
    place(pipeline, "cuda", Memory(offload=mode))
    for _ in range(2):
        assert torch.equal(picture(pipeline), picture(plain))
