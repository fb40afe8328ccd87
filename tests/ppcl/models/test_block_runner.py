import pytest
import torch
from torch import nn

from ppcl.errors import UserError
from ppcl.models import adapter_of, embed, head, run_blocks, swap, swapped
from tests import tiny

FAMILIES = {"qwen": tiny.qwen_transformer, "flux": tiny.flux_transformer, "sd3": tiny.sd3_transformer}


@pytest.fixture(params=FAMILIES)
def model(request):
    return FAMILIES[request.param]()


class Identity(nn.Module):
    """A swap that changes nothing: another module that calls the block it stands for."""

    def __init__(self, block: nn.Module):
        super().__init__()
        self.block = block
        self.context_pre_only = getattr(block, "context_pre_only", False)
        self.calls = 0

    def forward(self, **arguments):
        self.calls += 1
        return self.block(**arguments)


@torch.no_grad()
def test_embed_blocks_head_is_the_stock_forward_bitwise(model):
    adapter, inputs = adapter_of(model), tiny.inputs(model)
    stock = model(**inputs).sample
    streams, context = embed(model, inputs)
    streams = run_blocks(adapter, adapter.blocks(model), streams, context)
    assert torch.equal(head(model, streams, inputs), stock)
    assert torch.equal(model(**inputs).sample, stock), "taking the forward apart must leave the model as it was"


@torch.no_grad()
def test_a_run_of_blocks_alone_continues_where_the_one_before_stopped(model):
    adapter, inputs = adapter_of(model), tiny.inputs(model)
    blocks = adapter.blocks(model)
    start, context = embed(model, inputs)
    whole = run_blocks(adapter, blocks, start, context)
    parts = run_blocks(adapter, blocks[2:], run_blocks(adapter, blocks[:2], start, context), context)
    assert torch.equal(parts.img, whole.img)


@torch.no_grad()
def test_identity_swap_is_the_stock_forward_bitwise_and_is_put_back(model):
    adapter, inputs = adapter_of(model), tiny.inputs(model)
    stock, before = model(**inputs).sample, adapter.blocks(model)
    wrapped = {i: Identity(block) for i, block in enumerate(before)}
    with swapped(model, wrapped):
        assert torch.equal(model(**inputs).sample, stock)
    assert [w.calls for w in wrapped.values()] == [1] * len(before)
    assert all(a is b for a, b in zip(adapter.blocks(model), before, strict=True))


@torch.no_grad()
def test_a_swapped_block_changes_the_output(model):
    inputs = tiny.inputs(model)
    stock = model(**inputs).sample
    other = FAMILIES["qwen" if "Qwen" in type(model).__name__ else "flux" if "Flux" in type(model).__name__ else "sd3"](
        seed=9
    )
    with swapped(model, {1: adapter_of(model).blocks(other)[1]}):
        assert not torch.allclose(model(**inputs).sample, stock)


def test_a_block_that_does_not_exist_is_refused_and_nothing_is_swapped(model):
    adapter = adapter_of(model)
    before = adapter.blocks(model)
    with pytest.raises(UserError, match=f"block {len(before)} does not exist.*blocks 0 to {len(before) - 1}"):
        swap(model, {0: nn.Identity(), len(before): nn.Identity()})
    assert adapter.blocks(model)[0] is before[0]


def test_flux_has_one_span_a_block_list():
    model = tiny.flux_transformer(double=3, single=4)
    assert adapter_of(model).block_ranges(model) == [range(0, 3), range(3, 7)]


def test_an_unsupported_transformer_is_named_with_the_nearest_supported_one():
    with pytest.raises(UserError, match="Linear is not supported; the nearest supported one is .*ppcl architectures"):
        adapter_of(nn.Linear(1, 1))
    with pytest.raises(UserError, match="nearest supported one is WanTransformer3DModel"):
        adapter_of("WanVACETransformer3DModel")
