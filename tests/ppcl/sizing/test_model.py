"""What is known of a model from its configuration alone."""

import pytest

from ppcl.errors import UserError
from ppcl.sizing.model import model_of


def test_parameters_and_streams_are_those_of_the_published_models(models):
    assert [round(m.parameters / 1e9, 2) for m in models] == [20.43, 11.90, 8.06]
    assert [len(m.blocks) for m in models] == [60, 57, 38]
    assert [m.stream_bytes for m in models] == [(4096 + 512) * 3072 * 2] * 2 + [(4096 + 333) * 2432 * 2]


def test_what_cannot_be_sized_is_told(tmp_path):
    with pytest.raises(
        UserError, match="not a diffusers pipeline folder.*or name one of flux.1-dev, qwen-image, sd3.5-large"
    ):
        model_of(str(tmp_path / "gpt"), 1024, 1024)
    with pytest.raises(UserError, match="1000 × 1024 pixels: both must be multiples of 16"):
        model_of("qwen-image", 1024, 1000)
