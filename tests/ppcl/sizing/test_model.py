"""What is known of a model from its configuration alone."""

import diffusers
import pytest
import torch

from ppcl.errors import UserError
from ppcl.sizing.model import TeacherSize, model_of, published


def test_parameters_and_streams_are_those_of_the_published_models(models):
    assert [round(m.parameters / 1e9, 2) for m in models] == [20.43, 11.90, 8.06]
    assert [len(m.blocks) for m in models] == [60, 57, 38]
    assert [m.stream_bytes for m in models] == [(4096 + 512) * 3072 * 2] * 2 + [(4096 + 333) * 2432 * 2]


def test_single_stream_blocks_of_flux_can_be_narrower(models):
    """From the published shapes: d = 3072, 12288 hidden units, 24 heads of 128."""
    flux = models[1]
    assert [len(ffns) for ffns in flux.ffns] == [2] * 19 + [1] * 38
    ffn, attention = flux.ffns[19]["img"], flux.attentions[19]
    assert ffn.fused and ffn.units == 12288 and ffn.parameters == 2 * 3072 * 12288 + 12288 + 3072
    # Per head three maps with biases and columns of the output; what the others say on average is a bias.
    assert attention.kept(50) == 12 * (3 * 128 * (3072 + 1) + 128 * 3072) + 3072
    assert (attention.streams, attention.width) == (1, 3072)
    assert not flux.ffns[0]["img"].fused


def test_what_cannot_be_sized_is_told(tmp_path):
    with pytest.raises(
        UserError,
        match="not a diffusers pipeline folder.*or name one of auraflow, .*flux.1-dev, .*qwen-image, .*sd3.5-large",
    ):
        model_of(str(tmp_path / "gpt"), 1024, 1024)
    with pytest.raises(UserError, match="1000 × 1024 pixels: both must be multiples of 16"):
        model_of("qwen-image", 1024, 1000)


# Billions of parameters, as the authors publish them.
PUBLISHED = {
    "auraflow": 6.8,
    "chroma": 8.9,
    "cogview4": 6,
    "flux.1-dev": 12,
    "flux.2-dev": 32,
    "flux.2-klein-4b": 4,
    "flux.2-klein-9b": 9,
    "hunyuanimage-2.1": 17,
    "hunyuanvideo": 13,
    "longcat-image": 6,
    "ovis-image": 7,
    "qwen-image": 20,
    "sd3.5-large": 8.1,
    "sd3.5-medium": 2.5,
    "wan2.1-1.3b": 1.3,
    "wan2.1-14b": 14,
    "z-image": 6,
}
# What is published as a whole number is rounded by its authors, Wan's smaller model by more than that.
TOLERANCES = {"wan2.1-1.3b": 0.1}


@pytest.mark.parametrize("name", published())
def test_published_configurations_have_the_sizes_that_their_authors_say(name):
    record = published()[name]
    with torch.device("meta"):
        model = getattr(diffusers, record["transformer"])(**record["config"])
    # Position tables count too: a tenth of the smallest Stable Diffusion 3.5.
    numbers = sum(tensor.numel() for tensor in model.state_dict().values())
    assert numbers / 1e9 == pytest.approx(PUBLISHED[name], rel=TOLERANCES.get(name, 0.065))


def test_a_model_of_one_stream_and_one_of_two_lists_are_sized():
    one, two = model_of("z-image", 1024, 1024), model_of("flux.2-klein-4b", 1024, 1024)
    # 1024² pixels are 64² tokens; text comes behind them in the one stream.
    assert one.tokens == 64**2 + 512 and one.block_ranges == (range(30),) and one.width == 3840
    assert two.tokens == 64**2 + 512 and two.block_ranges == (range(5), range(5, 25)) and two.width == 3072
    assert not any(one.ffns) and not any(two.ffns)


def test_a_whole_job_needs_the_rest_of_the_pipeline():
    with pytest.raises(UserError, match="of z-image only the transformer's size is known.*or name one of flux.1-dev"):
        TeacherSize.named("z-image", 1024, 1024)
