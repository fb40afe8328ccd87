"""Learned gates find the blocks that do nothing."""

import pytest
import torch

from ppcl.ablation import selection
from ppcl.ablation.gates import learned_gates
from ppcl.models import adapter_of
from tests import tiny
from tests.samples import MemorySamples


@pytest.fixture
def model_with_idle_blocks():
    """Blocks 1 and 3 of five change next to nothing."""
    model = tiny.qwen_transformer()
    for number, block in enumerate(adapter_of(model).blocks(model)):
        for name, parameter in block.named_parameters():
            if number in (1, 3) and ("_mod." in name):
                parameter.data.zero_()
    return model


def test_measured_errors_and_learned_gates_find_idle_blocks(model_with_idle_blocks):
    model = model_with_idle_blocks
    count = len(adapter_of(model).blocks(model))
    samples = MemorySamples(64)
    errors = selection.skip_errors(
        model, [samples.batch(samples.ids("train")[:16], "cpu", torch.float32)], lambda _: None
    )
    assert (
        len(errors) == count
        and sorted(range(count), key=errors.__getitem__)[:2] == [1, 3]
        and errors[0] > 10 * errors[1]
    )
    before = [p.clone() for p in model.parameters()]
    logits = learned_gates(model, samples, 2, 60, 8, 0, lambda _: None)
    assert set(sorted(range(count), key=logits.__getitem__)[:2]) == {1, 3}
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))
    position = selection.by_position([1.0] * 4)
    assert position == [1.0, 0.75, 0.5, 0.25]
