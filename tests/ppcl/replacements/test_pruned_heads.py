"""Attention with fewer heads: in blocks of every family, as a file, beside other replacements, and fitted."""

from types import SimpleNamespace

import pytest
import torch
from accelerate import init_empty_weights

from ppcl.config.schema import Distillation
from ppcl.errors import UserError
from ppcl.linalg import Moments
from ppcl.models import Streams, adapter_of, embed, run_blocks
from ppcl.models.block_view import linear_at
from ppcl.replacements import Interval, LowRankModulation, PrunedFfn, PrunedHeads, TextRun, checked_plan, conflicts
from ppcl.replacements.assembly import block_map
from ppcl.replacements.io import load_replacement, save_replacement
from ppcl.replacements.parameter_counts import count_parameters, parameter_counts
from ppcl.replacements.pruned_ffn import PrunedFfnMaps
from ppcl.replacements.pruned_heads import HeadPaths, PrunedHeadMaps, kept_heads
from ppcl.search.checks import optimistic_counts
from ppcl.training.captured import CapturedActivations, CaptureSpec
from ppcl.training.distillation.objectives import PrunedHeadsObjective, Solutions, TeacherBlocks
from ppcl.training.teacher_segment import TeacherSegment
from tests import tiny
from tests.ppcl.replacements.test_modulation import MODELS, randomised

LAST = {"qwen": 5, "flux": 2, "sd3": 4}


@pytest.fixture(params=MODELS)
def family(request):
    return request.param


@pytest.fixture
def model(family):
    return MODELS[family]()


def maps_of(model, number, keep_percent=50):
    """Of a block and its paths, randomised maps of its first heads."""
    adapter = adapter_of(model)
    block = adapter.blocks(model)[number]
    paths = HeadPaths.of(adapter, model, number, block)
    return block, paths, randomised(PrunedHeadMaps.new(block, paths, keep_percent), number)


def teacher_of(model):
    with init_empty_weights():
        empty = type(model).from_config(model.config)
    return SimpleNamespace(adapter=adapter_of(model), empty_transformer=lambda: empty, place="here")


@torch.no_grad()
@pytest.mark.parametrize("where", [1, "last"])
def test_heads_that_went_say_nothing_any_more(family, model, where):
    """The same as with their columns of the output projections set to 0; SD3's last block has no text output."""
    adapter, number = adapter_of(model), LAST[family] if where == "last" else where
    block = adapter.blocks(model)[number]
    paths = HeadPaths.of(adapter, model, number, block)
    streams, context = embed(model, tiny.inputs(model))
    whole = run_blocks(adapter, [block], streams, context)
    half = PrunedHeadMaps.new(block, paths, 50)
    plan = {PrunedHeads(number, 50): half}
    (view,) = block_map(adapter, model, adapter.blocks(model), plan, plan).values()
    made = run_blocks(adapter, [view], streams, context)
    assert half.heads == (0,) and paths.heads(block) == 2 and paths.heads(view) == 1
    assert set(paths.out) == ({"img"} if getattr(block, "context_pre_only", False) else {"img", "txt"})
    outs = [linear_at(block, path) for path in paths.out.values()]
    before = [out.weight.clone() for out in outs]
    for out in outs:
        out.weight[:, paths.head_width(block) :] = 0
    cut = run_blocks(adapter, [block], streams, context)
    for out, weight in zip(outs, before, strict=True):
        out.weight.copy_(weight)
    for stream in paths.out:
        assert torch.allclose(getattr(made, stream), getattr(cut, stream), atol=1e-5)
        assert not torch.allclose(getattr(made, stream), getattr(whole, stream), atol=1e-4)
    again = run_blocks(adapter, [block], streams, context)
    assert all(torch.equal(a, b) for a, b in zip(whole, again, strict=True) if a is not None), (
        "the teacher's own block has changed"
    )


@torch.no_grad()
def test_a_file_gives_the_same_maps_and_the_numbers_of_the_heads(model, tmp_path):
    block, paths, maps = maps_of(model, 1)
    maps.heads = (1,)
    one = PrunedHeads(1, 50)
    save_replacement(maps, one, adapter_of(model), tmp_path / f"{one.name}.safetensors")
    loaded = load_replacement(tmp_path / "heads-01-50.safetensors", teacher_of(model))
    assert loaded.heads == (1,)
    assert loaded.state_dict().keys() == maps.state_dict().keys()
    assert all(torch.equal(a, b) for a, b in zip(loaded.parameters(), maps.parameters(), strict=True))


@torch.no_grad()
def test_parameter_counts_are_those_of_the_view(family, model, tmp_path):
    adapter, number, teacher = adapter_of(model), LAST[family], teacher_of(model)
    block, _, maps = maps_of(model, number)
    one = PrunedHeads(number, 50)
    save_replacement(maps, one, adapter, tmp_path / f"{one.name}.safetensors")
    counts = parameter_counts(teacher, {one: tmp_path / f"{one.name}.safetensors"})
    (view,) = block_map(adapter, model, adapter.blocks(model), {one: maps}, [one]).values()
    assert counts.saved(one) == count_parameters(block) - count_parameters(view) > 0
    assert optimistic_counts(teacher, [one], 100).saved(one) == counts.saved(one)


@torch.no_grad()
def test_heads_and_ffn_of_a_block_go_together(model):
    adapter = adapter_of(model)
    blocks = adapter.blocks(model)
    parts = adapter.parts_of(model, 1, blocks[1])
    block, paths, maps = maps_of(model, 1)
    ffns = randomised(PrunedFfnMaps.new(adapter, block, parts, 50), 3)
    heads, ffn = PrunedHeads(1, 50), PrunedFfn(1, 50)
    assert not conflicts(heads, ffn)
    both = block_map(adapter, model, blocks, {ffn: ffns, heads: maps}, [heads, ffn])[1]
    assert paths.heads(both) == 1
    for path in paths.all:
        assert both.get_submodule(path) is block_map(adapter, model, blocks, {heads: maps}, [heads])[1].get_submodule(
            path
        )
    for stream, where in parts.items():
        assert both.get_submodule(f"{where.ffn}.{adapter.ffn_up}") is ffns.maps(stream)[0]


def test_what_heads_go_with():
    block_ranges = [range(9)]
    plan = ["heads:3/50", "ffn:3/25", "heads:4/75", "modulations", "text:5-6"]
    assert len(checked_plan(plan, block_ranges)) == 5
    assert not conflicts(PrunedHeads(3, 50), LowRankModulation())
    for other in (PrunedHeads(3, 75), Interval(2, 3), TextRun(3, 4), TextRun(1, 3)):
        assert conflicts(PrunedHeads(3, 50), other) and conflicts(other, PrunedHeads(3, 50))
    with pytest.raises(UserError, match=r"the interval \[2, 3\] and the heads 3/50 overlap"):
        checked_plan(["2-3", "heads:3/50"], block_ranges)


@pytest.mark.parametrize(
    ("heads", "percent", "kept"), [(24, 50, 12), (24, 75, 18), (2, 75, 1), (4, 1, 1), (24, 99, 23)]
)
def test_at_least_one_head_stays_and_one_goes(heads, percent, kept):
    assert kept_heads(heads, percent) == kept


@torch.no_grad()
def test_the_fitted_maps_are_rows_of_the_blocks_own_and_least_squares(model):
    """Of attended inputs in which head 0 is a linear function of head 1: it leaves, and nothing is lost."""
    adapter = adapter_of(model)
    blocks = dict(enumerate(adapter.blocks(model)))
    objective = PrunedHeadsObjective(
        TeacherBlocks(adapter, model, blocks, len(blocks)), PrunedHeads(1, 50), Distillation()
    )
    paths, block = objective.paths, blocks[1]
    width = paths.head_width(block)
    generator = torch.Generator().manual_seed(0)
    mix, streams = torch.randn(width, width, generator=generator), {}
    for stream in paths.out:
        second = torch.randn(2, 300, width, generator=generator) + 2
        streams[1, stream] = torch.cat([second @ mix + 1, second], -1)
    moments = {name: Moments(*shape) for name, shape in objective.moments().items()}
    for name, x, y in objective.updates(CapturedActivations(attended=streams)):
        moments[name].update(x, y)
    widths = {name: {count} for name, count in objective.kept_units().items()}
    objective.initialize(Solutions(moments, 1e-9, widths))
    maps = objective.module
    # Either says all of the other; what stays is fitted.
    (kept,) = maps.heads
    rows = slice(kept * width, (kept + 1) * width)
    for stream, each in paths.qkv.items():
        for made, path in zip(maps.qkv[stream], each, strict=True):
            assert torch.equal(made.weight, linear_at(block, path).weight[rows])
            assert torch.equal(made.bias, linear_at(block, path).bias[rows])
    for stream, path in paths.out.items():
        x = streams[1, stream]
        wanted, made = linear_at(block, path)(x), maps.out[stream](x[..., rows])
        assert (wanted - made).abs().max() < 1e-2 * wanted.std()


@torch.no_grad()
def test_what_is_captured_is_what_the_heads_give(model):
    """The output projections of it are what the attention returns."""
    adapter = adapter_of(model)
    segment = TeacherSegment.__new__(TeacherSegment)
    segment.adapter, segment.transformer = adapter, model
    segment.blocks = {1: adapter.blocks(model)[1]}
    streams, context = embed(model, tiny.inputs(model))
    captured, returned = CapturedActivations(), []
    attention = segment.blocks[1].get_submodule(adapter.attention)
    handle = attention.register_forward_hook(lambda module, args, output: returned.append(output))
    with segment.listening(captured, CaptureSpec(attended=frozenset({1}))):
        run_blocks(adapter, [segment.blocks[1]], streams, context)
    handle.remove()
    paths = HeadPaths.of(adapter, model, 1, segment.blocks[1])
    for stream, output in zip(Streams._fields, returned[0], strict=True):
        made = linear_at(segment.blocks[1], paths.out[stream])(captured.attended[1, stream])
        assert torch.equal(made, output)
