"""Families whose stock class cannot describe a model with fewer blocks."""

from types import SimpleNamespace

import pytest

from ppcl.errors import UserError
from ppcl.export.variant_blocks import VariantBlocks
from ppcl.models import adapter_of
from ppcl.replacements import Interval


def test_a_chroma_with_fewer_blocks_is_refused_with_the_reason():
    teacher = SimpleNamespace(adapter=adapter_of("ChromaTransformer2DModel"))
    with pytest.raises(UserError, match="a Chroma with fewer blocks cannot be exported: .*number of all blocks"):
        VariantBlocks(teacher, {Interval(0, 1): "00-01.safetensors"})
