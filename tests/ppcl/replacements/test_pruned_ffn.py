"""FFNs with fewer hidden units, against greedy elimination by plain least squares, and in blocks of every family."""

from types import SimpleNamespace

import pytest
import torch
from accelerate import init_empty_weights

from ppcl.config.schema import Distillation
from ppcl.models import Streams, adapter_of, embed, run_blocks
from ppcl.models.block_view import linear_at
from ppcl.replacements import Interval, TextRun
from ppcl.replacements.ffn import with_ffn
from ppcl.replacements.io import load_replacement, save_replacement
from ppcl.replacements.pruned_ffn import PrunedFfnMaps
from ppcl.replacements.text_projectors import TextProjectors, text_run
from ppcl.training.distillation.objectives import StudentObjective, TeacherBlocks
from tests import tiny
from tests.ppcl.replacements.test_modulation import MODELS, WIDTH, randomised


@pytest.fixture(params=MODELS)
def model(request):
    return MODELS[request.param]()


@torch.no_grad()
def test_a_narrow_ffn_in_a_block(model):
    adapter = adapter_of(model)
    block = adapter.blocks(model)[1]
    parts = adapter.parts_of(model, 1, block)
    streams, context = embed(model, tiny.inputs(model))
    whole = run_blocks(adapter, [block], streams, context)
    halves = PrunedFfnMaps.new(adapter, block, parts, 50)
    made = run_blocks(adapter, [with_ffn(adapter, block, parts, halves)], streams, context)
    # The units that went say nothing any more: the same as with their columns set to 0.
    kept = halves.up["img"].out_features
    assert kept == block.get_submodule(parts["img"].ffn).net[0].proj.out_features // 2
    downs = [block.get_submodule(where.ffn).net[2] for where in parts.values()]
    before = [down.weight.clone() for down in downs]
    for down in downs:
        down.weight[:, kept:] = 0
    cut = run_blocks(adapter, [block], streams, context)
    for down, weight in zip(downs, before, strict=True):
        down.weight.copy_(weight)
    for stream in Streams._fields:
        assert torch.allclose(getattr(made, stream), getattr(cut, stream), atol=1e-5)
        assert not torch.allclose(getattr(made, stream), getattr(whole, stream), atol=1e-4)
    again = run_blocks(adapter, [block], streams, context)
    assert all(torch.equal(a, b) for a, b in zip(whole, again, strict=True)), "the teacher's own block has changed"


@torch.no_grad()
def test_a_narrow_ffn_within_a_text_run_is_the_images(model):
    adapter = adapter_of(model)
    blocks = {n: adapter.blocks(model)[n] for n in (0, 1)}
    run = TextRun(0, 1)
    projectors = randomised(TextProjectors(run, WIDTH, text_goes_on=True))
    parts = adapter.parts_of(model, 0, blocks[0])
    narrow = randomised(PrunedFfnMaps.new(adapter, blocks[1], parts, 25))
    streams, context = embed(model, tiny.inputs(model))
    standing = text_run(adapter, blocks, parts, projectors, {1: narrow})
    made = run_blocks(adapter, list(standing.values()), streams, context)
    for tensor in narrow.up["txt"].parameters():
        tensor.fill_(torch.nan)
    again = run_blocks(adapter, list(standing.values()), streams, context)
    assert torch.equal(made.img, again.img) and torch.equal(made.txt, again.txt)
    other = run_blocks(adapter, list(text_run(adapter, blocks, parts, projectors).values()), streams, context)
    assert not torch.allclose(made.img, other.img, atol=1e-4)


@torch.no_grad()
@pytest.mark.parametrize(
    ("model", "interval", "streams"),
    [
        (tiny.flux_transformer, Interval(0, 2), {"img", "txt"}),
        (tiny.flux_transformer, Interval(3, 5), {"img"}),
        (tiny.sd3_transformer, Interval(1, 2), {"img", "txt"}),
        (tiny.sd3_transformer, Interval(3, 4), {"img", "txt"}),
    ],
)
def test_students_of_every_family_are_narrow(tmp_path, model, interval, streams):
    """FLUX's single-stream blocks have one FFN for all tokens."""
    model = model()
    adapter = adapter_of(model)
    blocks = dict(enumerate(adapter.blocks(model)))
    objective = StudentObjective(
        TeacherBlocks(adapter, model, blocks, len(blocks)),
        interval,
        Distillation(student_keep_percent=50, init="first"),
    )
    parts = adapter.parts_of(model, interval.first, blocks[interval.first])
    assert set(parts) == streams == {name.split("-")[-1] for name in objective.moments()}
    for stream, where in parts.items():
        whole, narrow = (
            linear_at(block, adapter.ffn_maps(where)[0]) for block in (blocks[interval.first], objective.module.block)
        )
        assert narrow.out_features == whole.out_features // 2, stream
    save_replacement(objective.module, interval, adapter, tmp_path / f"{interval.name}.safetensors")
    with init_empty_weights():
        empty = type(model).from_config(model.config)
    teacher = SimpleNamespace(adapter=adapter, empty_transformer=lambda: empty, place="here")
    loaded = load_replacement(tmp_path / f"{interval.name}.safetensors", teacher)
    streams, context = embed(model, tiny.inputs(model))
    one, two = (student.streams(streams, context) for student in (objective.module, loaded))
    assert torch.equal(one.img, two.img)
