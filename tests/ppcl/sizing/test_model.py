"""What is known of a model from its configuration alone."""

import pytest

from ppcl.errors import UserError
from ppcl.sizing.model import model_of


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
        UserError, match="not a diffusers pipeline folder.*or name one of flux.1-dev, qwen-image, sd3.5-large"
    ):
        model_of(str(tmp_path / "gpt"), 1024, 1024)
    with pytest.raises(UserError, match="1000 × 1024 pixels: both must be multiples of 16"):
        model_of("qwen-image", 1024, 1000)
