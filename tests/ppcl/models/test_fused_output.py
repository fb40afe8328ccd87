"""A fused output projection as two maps: the same numbers, gradients and parameters as the stock one."""

import pytest
import torch
from torch import nn

from ppcl.models import FusedParts, adapter_of, embed, run_blocks
from ppcl.models.block_view import view
from ppcl.models.fused_output import FusedOutput, reader_of, separate_output, unfused
from ppcl.models.lora_linear import LoraLinear
from ppcl.replacements.parameter_counts import count_parameters
from tests import tiny

# The first single-stream block of the tiny FLUX.1.
NUMBER = 3


@pytest.fixture
def model():
    return tiny.flux_transformer()


@pytest.fixture
def linear():
    torch.manual_seed(0)
    return nn.Linear(10, 4).requires_grad_(False)


def test_a_single_stream_block_is_the_same_with_its_output_in_two(model):
    adapter = adapter_of(model)
    block = adapter.blocks(model)[NUMBER]
    (where,) = adapter.parts_of(model, NUMBER, block).values()
    assert isinstance(where, FusedParts)
    made = unfused(block, [where])
    assert unfused(made, [where]) is made and isinstance(made.get_submodule(where.fused), FusedOutput)
    assert count_parameters(made) == count_parameters(block)
    assert made.proj_out.ffn.weight.untyped_storage().data_ptr() == block.proj_out.weight.untyped_storage().data_ptr()
    streams, context = embed(model, tiny.inputs(model))
    one, two = (run_blocks(adapter, [each], streams, context) for each in (block, made))
    for a, b in zip(one, two, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-6)
    again = made.get_submodule(where.fused).joined()
    assert torch.equal(again["weight"], block.proj_out.weight) and torch.equal(again["bias"], block.proj_out.bias)


def test_a_block_of_two_streams_stays_as_it_is(model):
    adapter = adapter_of(model)
    block = adapter.blocks(model)[0]
    parts = adapter.parts_of(model, 0, block)
    assert unfused(block, parts.values()) is block
    assert reader_of(block, parts["img"], parts["img"].out) == ("attn.to_out.0", slice(None))


def test_what_is_captured_of_a_stock_block_are_the_inputs_of_either_map(model):
    adapter = adapter_of(model)
    block = adapter.blocks(model)[NUMBER]
    (where,) = adapter.parts_of(model, NUMBER, block).values()
    made, seen = unfused(block, [where]), {}
    streams, context = embed(model, tiny.inputs(model))
    for path in (where.out, where.ffn_down):
        made.get_submodule(path).register_forward_pre_hook(lambda _, args, path=path: seen.update({path: args[0]}))
    run_blocks(adapter, [made], streams, context)
    for path in (where.out, where.ffn_down):
        own, inputs = reader_of(block, where, path)
        read = []
        handle = block.get_submodule(own).register_forward_pre_hook(lambda _, args, read=read: read.append(args[0]))
        run_blocks(adapter, [block], streams, context)
        handle.remove()
        assert torch.equal(read[0][..., inputs], seen[path])


def test_a_trained_map_stays_whole_and_gets_its_gradient(linear):
    linear.requires_grad_(True)
    output = FusedOutput.of(linear, 3)
    assert dict(output.named_parameters()).keys() == {"attention.source.weight", "attention.source.bias"}
    x = torch.randn(5, 10)
    torch.testing.assert_close(output(x), linear(x))
    output(x).square().sum().backward()
    grads = [p.grad.clone() for p in linear.parameters()]
    linear.zero_grad()
    linear(x).square().sum().backward()
    for made, p in zip(grads, linear.parameters(), strict=True):
        torch.testing.assert_close(made, p.grad)


@pytest.mark.parametrize("with_bias", [False, True])
def test_a_lora_is_on_once(linear, with_bias):
    lora = LoraLinear(linear, torch.randn(2, 10), torch.randn(4, 2), 0.5, "it", torch.randn(4) if with_bias else None)
    output, x = FusedOutput.of(lora, 3), torch.randn(5, 10)
    torch.testing.assert_close(output(x), lora(x), rtol=1e-5, atol=1e-5)
    parts = (output.attention, output.ffn)
    assert sum(part.share for part in parts) == pytest.approx(1.0)
    merged = view(output, {"attention": output.attention.merged(), "ffn": output.ffn.merged()}).joined()
    torch.testing.assert_close(merged["weight"], lora.merged().weight)
    torch.testing.assert_close(merged["bias"], lora.merged().bias)


@pytest.mark.parametrize("with_lora", [False, True])
def test_two_biases_become_one(linear, with_lora):
    output = FusedOutput.of(linear, 3)
    output.attention = nn.Linear(3, 4).requires_grad_(False)
    if with_lora:
        output.ffn = LoraLinear(output.ffn, torch.randn(2, 7), torch.randn(4, 2), 0.5, "it")
    x, own = torch.randn(5, 10), output.attention
    before = output(x)
    output.join_biases()
    torch.testing.assert_close(output(x), before, rtol=1e-5, atol=1e-5)
    assert output.attention.bias is None and own.bias is not None
    assert output.attention.weight is own.weight
    # Gradients would end in a sum that is made once.
    trained = FusedOutput(nn.Linear(3, 4), nn.Linear(7, 4))
    trained.join_biases()
    assert trained.attention.bias is not None


def test_weights_of_ones_own_are_copies(model):
    adapter = adapter_of(model)
    block = adapter.blocks(model)[NUMBER]
    (where,) = adapter.parts_of(model, NUMBER, block).values()
    output = separate_output(block, where)
    before, x = block.proj_out.weight.clone(), torch.randn(2, block.proj_out.in_features)
    torch.testing.assert_close(output(x), block.proj_out(x), rtol=1e-5, atol=1e-5)
    with torch.no_grad():
        output.ffn.weight.zero_()
    assert torch.equal(block.proj_out.weight, before)
