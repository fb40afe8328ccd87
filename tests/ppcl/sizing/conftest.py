"""The published models that sizes are told of."""

import warnings

import pytest

from ppcl.sizing.model import model_of


@pytest.fixture(scope="session")
def models():
    with warnings.catch_warnings(action="ignore"):
        return [model_of(name, 1024, 1024) for name in ("qwen-image", "flux.1-dev", "sd3.5-large")]
