"""FFNs with fewer hidden units, against greedy elimination by plain least squares, and in blocks of every family."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from accelerate import init_empty_weights

from ppcl.config.schema import Distillation
from ppcl.linalg import Moments
from ppcl.models import Streams, adapter_of, embed, run_blocks
from ppcl.replacements import Interval, TextRun
from ppcl.replacements.block_view import linear_at
from ppcl.replacements.ffn import with_ffn
from ppcl.replacements.io import load_replacement, save_replacement
from ppcl.replacements.pruned_ffn import PrunedFfnMaps, eliminate_units
from ppcl.replacements.text_projectors import TextProjectors, text_run
from ppcl.training.distillation.objectives import StudentObjective, TeacherBlocks
from tests import tiny
from tests.ppcl.replacements.test_block_view import MODELS, WIDTH, randomised


def counted(tokens, pieces=1):
    whole = Moments(tokens.shape[1], 0)
    for piece in tokens.tensor_split(pieces):
        part = Moments(tokens.shape[1], 0)
        part.update(piece, piece[:, :0])
        whole.merge(part)
    return whole


def hidden_units(n=400, h=9, seed=0):
    """Correlated, off-centre, of very different sizes."""
    generator = torch.Generator().manual_seed(seed)
    mix = torch.randn(h, h, generator=generator, dtype=torch.float64) * torch.logspace(-1, 1, h, dtype=torch.float64)
    return torch.randn(n, h, generator=generator, dtype=torch.float64) @ mix + torch.arange(h) * 3.0


def refitted(x, y, units):
    """Least squares of `y` on those units and a constant, by numpy, and its squared error."""
    a = np.concatenate([x[:, units], np.ones((len(x), 1))], 1)
    solution = np.linalg.lstsq(a, y, rcond=None)[0]
    return solution, float(np.square(a @ solution - y).sum())


def test_units_go_one_by_one_as_plain_least_squares_says():
    x = hidden_units()
    w, b = torch.randn(4, 9, dtype=torch.float64), torch.randn(4, dtype=torch.float64)
    made = eliminate_units(counted(x, pieces=3), w, b, [7, 4, 1], ridge=0.0)
    y = (x @ w.T + b).numpy()
    left = list(range(9))
    while len(left) > 1:
        errors = {unit: refitted(x.numpy(), y, [u for u in left if u != unit])[1] for unit in left}
        left.remove(min(errors, key=errors.get))
        if len(left) in made:
            solution, error = refitted(x.numpy(), y, left)
            narrow = made[len(left)]
            assert narrow.units.tolist() == left
            assert np.allclose(narrow.weight.numpy().T, solution[:-1], atol=1e-6)
            assert np.allclose(narrow.bias.numpy(), solution[-1], atol=1e-5)
            assert narrow.error == pytest.approx(error / np.square(y - y.mean(0)).sum(), rel=1e-5, abs=1e-12)


def test_what_other_units_can_say_goes_first_and_costs_nothing():
    x = hidden_units(h=6)
    # Units 6 and 7 say what others say; unit 8 never changes.
    x = torch.cat([x, x[:, :1] + x[:, 1:2], 2 * x[:, 2:3], torch.full_like(x[:, :1], 5.0)], 1)
    w, b = torch.randn(3, 9, dtype=torch.float64), torch.zeros(3, dtype=torch.float64)
    (narrow,) = eliminate_units(counted(x), w, b, [6], ridge=1e-9).values()
    assert narrow.error < 1e-6 and 8 not in narrow.units
    assert torch.allclose(x[:, narrow.units] @ narrow.weight.T + narrow.bias, x @ w.T + b, atol=1e-2)


def test_fewer_tokens_than_units_are_no_obstacle():
    x = hidden_units(n=5)
    w, b = torch.randn(3, 9, dtype=torch.float64), torch.zeros(3, dtype=torch.float64)
    (narrow,) = eliminate_units(counted(x), w, b, [5], ridge=1e-6).values()
    assert torch.isfinite(narrow.weight).all()
    # Five tokens lie in four dimensions: four units say them all.
    assert narrow.error < 1e-3


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
        (tiny.flux_transformer, Interval(3, 5), set()),
        (tiny.sd3_transformer, Interval(1, 2), {"img", "txt"}),
        (tiny.sd3_transformer, Interval(3, 4), {"img", "txt"}),
    ],
)
def test_students_of_every_family_are_narrow_where_blocks_have_ffns(tmp_path, model, interval, streams):
    """FLUX's single-stream blocks have none of their own: their students stay whole."""
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
            linear_at(block, f"{where.ffn}.{adapter.ffn_up}")
            for block in (blocks[interval.first], objective.module.block)
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
