"""Width replacements in a block, against the same arithmetic written out, for every family."""

import pytest
import torch
from torch import nn

from ppcl.models import Streams, adapter_of, embed, run_blocks
from ppcl.replacements import TextRun
from ppcl.replacements.ffn import with_ffn
from ppcl.replacements.linear_ffn import LinearFfnMaps
from ppcl.replacements.text_projectors import TextProjectors, text_run
from tests import tiny

MODELS = {"qwen": tiny.qwen_transformer, "flux": tiny.flux_transformer, "sd3": tiny.sd3_transformer}
WIDTH = 32


@pytest.fixture(params=MODELS)
def model(request):
    return MODELS[request.param]()


def randomised(module, seed=0):
    generator = torch.Generator().manual_seed(seed)
    for p in module.parameters():
        p.data = torch.randn(p.shape, generator=generator) * 0.2
    return module.requires_grad_(False)


def heard(module, run, argument=None):
    """What `module` was called with while `run` ran."""
    seen = []
    handle = module.register_forward_pre_hook(
        lambda _, args, kwargs: seen.append(kwargs[argument] if argument else args[0]), with_kwargs=True
    )
    try:
        result = run()
    finally:
        handle.remove()
    return seen[0], result


@torch.no_grad()
def test_a_replaced_ffn_is_the_residual_map_behind_the_attention(model):
    adapter = adapter_of(model)
    block = adapter.blocks(model)[1]
    parts = adapter.parts_of(model, 1, block)
    maps = randomised(LinearFfnMaps.new(parts, WIDTH))
    streams, context = embed(model, tiny.inputs(model))
    made = run_blocks(adapter, [with_ffn(adapter, block, parts, maps)], streams, context)
    for stream in Streams._fields:
        norm2 = block.get_submodule(parts[stream].norm2)
        g, _ = heard(norm2, lambda: run_blocks(adapter, [block], streams, context))
        assert torch.allclose(getattr(made, stream), g + maps[stream](g), atol=1e-5)


@torch.no_grad()
def test_a_text_run_feeds_the_attention_from_its_first_block(model):
    adapter = adapter_of(model)
    blocks, run = adapter.blocks(model), TextRun(0, 2)
    projectors = randomised(TextProjectors(run, WIDTH, text_goes_on=True))
    parts = adapter.parts_of(model, 0, blocks[0])
    placed = text_run(adapter, {b: blocks[b] for b in run.blocks}, parts, projectors)
    streams, context = embed(model, tiny.inputs(model))

    z, first = heard(blocks[0].attn, lambda: run_blocks(adapter, [blocks[0]], streams, context), adapter.txt)
    after = run_blocks(adapter, [placed[0]], streams, context)
    assert torch.equal(after.img, first.img) and torch.equal(after.txt, torch.cat([first.txt, z], -1))

    # The image stream of a later block depends on the text by the attention's text input alone.
    class Given(nn.Module):
        def __init__(self, attention, text):
            super().__init__()
            self.attention, self.text = attention, text

        def forward(self, **named):
            return self.attention(**{**named, adapter.txt: self.text})

    expected = first.img
    for number in (1, 2):
        block, attention = blocks[number], blocks[number].attn
        block.attn = Given(attention, projectors.z[str(number)](z))
        expected = run_blocks(adapter, [block], Streams(expected, first.txt), context).img
        block.attn = attention
        after = run_blocks(adapter, [placed[number]], after, context)
        assert torch.allclose(after.img, expected, atol=1e-5)
    assert torch.allclose(after.txt, first.txt + projectors.h(first.txt), atol=1e-5)


@torch.no_grad()
def test_an_ffn_replaced_within_a_text_run_is_the_images(model):
    adapter = adapter_of(model)
    blocks, run = adapter.blocks(model), TextRun(0, 1)
    parts = adapter.parts_of(model, 0, blocks[0])
    projectors, maps = randomised(TextProjectors(run, WIDTH, True)), randomised(LinearFfnMaps.new(parts, WIDTH), 1)
    streams, context = embed(model, tiny.inputs(model))
    both = text_run(adapter, {b: blocks[b] for b in run.blocks}, parts, projectors, {0: maps, 1: maps})
    made = run_blocks(adapter, [both[0], both[1]], streams, context)

    start = run_blocks(adapter, [both[0]], streams, context)
    text_only = text_run(adapter, {b: blocks[b] for b in run.blocks}, parts, projectors)
    g, _ = heard(
        blocks[1].get_submodule(parts["img"].norm2), lambda: run_blocks(adapter, [text_only[1]], start, context)
    )
    assert torch.allclose(made.img, g + maps["img"](g), atol=1e-5)
    first = run_blocks(adapter, [with_ffn(adapter, blocks[0], parts, maps)], streams, context)
    assert torch.allclose(made.txt, first.txt + projectors.h(first.txt), atol=1e-5)


@torch.no_grad()
def test_views_leave_the_teachers_block_as_it_was(model):
    adapter = adapter_of(model)
    blocks = adapter.blocks(model)
    parts = adapter.parts_of(model, 1, blocks[1])
    streams, context = embed(model, tiny.inputs(model))
    before = run_blocks(adapter, blocks, streams, context)
    modules = dict(model.named_modules())
    maps = randomised(LinearFfnMaps.new(parts, WIDTH))
    projectors = randomised(TextProjectors(TextRun(0, 1), WIDTH, True))
    placed = text_run(adapter, {0: blocks[0], 1: blocks[1]}, parts, projectors, {1: maps})
    run_blocks(adapter, [*placed.values()], streams, context)
    assert dict(model.named_modules()) == modules
    after = run_blocks(adapter, blocks, streams, context)
    assert torch.equal(before.img, after.img)
    # No weight is copied: what is left of the block is the block's own memory.
    storages = {
        p.untyped_storage().data_ptr() for p in [*blocks[1].parameters(), *maps.parameters(), *projectors.parameters()]
    }
    assert {p.untyped_storage().data_ptr() for p in placed[1].parameters()} <= storages
    own = sum(p.numel() for p in blocks[1].parameters())
    assert sum(p.numel() for p in placed[1].parameters()) < 0.6 * own
