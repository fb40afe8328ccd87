"""Every record, on a tiny random model of its own class: the model in parts, replacements, and faults of a record."""

import dataclasses
import sys
from functools import cache

import pytest
import torch
from torch import nn
from torch.utils._pytree import tree_leaves, tree_map

from ppcl.config.schema import Distillation
from ppcl.errors import UserError
from ppcl.linalg import Moments
from ppcl.models import (
    Streams,
    adapter_of,
    check_record,
    embed,
    head,
    records,
    run_blocks,
    show_processor,
    swapped,
)
from ppcl.models import adapter as adapters
from ppcl.models.block_layout import registered_layout, resolved
from ppcl.replacements import Interval, LowRankModulation, PrunedFfn, TextRun
from ppcl.replacements.assembly import block_map
from ppcl.replacements.low_rank_modulation import ModulationBasis
from ppcl.replacements.pruned_ffn import PrunedFfnMaps
from ppcl.replacements.student_block import StudentBlock
from ppcl.replacements.text_projectors import TextProjectors
from ppcl.training.captured import CapturedActivations
from ppcl.training.distillation.objectives import Solutions, StudentObjective, TeacherBlocks
from ppcl.training.losses import LOSSES
from tests import tiny_families, tiny_pipelines
from tests.tiny import randomised

WIDTH = 32
WITH_PARTS = [record.transformer for record in records() if record.parts]

# What diffusers' registry says otherwise than the blocks do, by class.
WRONG_IN_REGISTRY = {
    "BriaTransformerBlock": "it leaves out the text stream, which the block returns",
    "ZImageTransformerBlock": "the argument is called x",
}


@cache
def model_of(name):
    return tiny_families.transformer(name)


@pytest.fixture(params=tiny_families.FAMILIES)
def model(request):
    return model_of(request.param)


@pytest.fixture(params=WITH_PARTS)
def model_with_parts(request):
    return model_of(request.param)


def velocity(model, inputs):
    """The stock forward's, as one tensor: Z-Image returns a list."""
    made = model(**inputs, return_dict=False)[0]
    return torch.stack(list(made))


def together(made):
    return torch.stack(list(made))


class Identity(nn.Module):
    """Another module that calls the block it stands for, as the stock forward calls it."""

    def __init__(self, block):
        super().__init__()
        self.block, self.calls = block, 0
        self.context_pre_only = getattr(block, "context_pre_only", False)
        show_processor(self, block)

    def forward(self, *arguments, **named):
        self.calls += 1
        return self.block(*arguments, **named)


def test_there_is_a_tiny_model_of_every_record():
    assert set(tiny_families.CONFIGS) == {record.transformer for record in records()}


@torch.no_grad()
def test_embed_blocks_head_is_the_stock_forward_bitwise(model):
    adapter, inputs = adapter_of(model), tiny_families.inputs(model)
    stock = velocity(model, inputs)
    assert stock.std() > 0.05, "the model does nothing"
    streams, context = embed(model, inputs)
    count = len(adapter.blocks(model))
    half = run_blocks(adapter, adapter.blocks(model)[: count // 2], streams, context, 0)
    streams = run_blocks(adapter, adapter.blocks(model)[count // 2 :], half, context, count // 2)
    assert torch.equal(together(head(model, streams, inputs)), stock)


@torch.no_grad()
def test_identity_swap_of_every_block_is_the_stock_forward_bitwise(model):
    adapter, inputs = adapter_of(model), tiny_families.inputs(model)
    wrapped = {number: Identity(block) for number, block in enumerate(adapter.blocks(model))}
    with swapped(model, wrapped):
        made = velocity(model, inputs)
    assert torch.equal(made, velocity(model, inputs))
    assert {one.calls for one in wrapped.values()} == {1}


def intervals(model):
    """One of two blocks in every block list, the last two."""
    return [Interval(span.stop - 2, span.stop - 1) for span in adapter_of(model).block_ranges(model)]


def captured(model, inputs):
    """Every boundary of one batch."""
    adapter = adapter_of(model)
    with torch.no_grad():
        streams, context = embed(model, inputs)
        boundaries = {0: streams}
        for number, block in enumerate(adapter.blocks(model)):
            boundaries[number + 1] = run_blocks(adapter, [block], boundaries[number], context, number)
    return CapturedActivations(boundaries=boundaries, context=context)


def objective_of(model, interval, batch, closed_form):
    """A student's objective, from its closed form or from maps that do nothing yet."""
    blocks = dict(enumerate(adapter_of(model).blocks(model)))
    objective = StudentObjective(
        TeacherBlocks(adapter_of(model), model, blocks, len(blocks)), interval, Distillation(init="affine")
    )
    if not closed_form:
        return objective
    moments = {name: Moments(*shape) for name, shape in objective.moments().items()}
    for name, x, y in objective.updates(batch):
        moments[name].update(x, y)
    objective.initialize(Solutions(moments, 1e-3, {}))
    return objective


def test_a_student_learns_and_stands_in_the_stock_forward(model):
    adapter, inputs = adapter_of(model), tiny_families.inputs(model)
    batch = captured(model, inputs)
    for interval in intervals(model):
        objective = objective_of(model, interval, batch, closed_form=False)
        parameters = [p.requires_grad_(True) for p in objective.module.parameters()]
        optimizer = torch.optim.Adam(parameters, 1e-4)
        losses = []
        for _ in range(4):
            terms = objective.losses(batch, LOSSES["relative"])
            loss = sum(value / divisor for value, divisor in terms.values())
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
        assert losses[-1] < losses[0]
        with torch.no_grad():
            blocks = adapter.blocks(model)
            student = objective.module.eval()
            standing = block_map(adapter, model, blocks, {interval: student}, [interval])
            with swapped(model, standing):
                made = velocity(model, inputs)
            branch = student.streams(batch.boundaries[interval.first], batch.context)
            rest = interval.last + 1
            branch = run_blocks(adapter, blocks[rest:], branch, batch.context, rest)
            assert torch.allclose(made, together(head(model, branch, inputs)), atol=1e-6)
            assert not torch.allclose(made, velocity(model, inputs), atol=1e-4)


@torch.no_grad()
def test_the_closed_form_of_a_student_is_better_than_its_block_alone(model):
    batch = captured(model, tiny_families.inputs(model))
    for interval in intervals(model):
        student = objective_of(model, interval, batch, closed_form=True).module
        target = batch.boundaries[interval.last + 1]
        made = student.streams(batch.boundaries[interval.first], batch.context)
        alone = batch.boundaries[interval.first + 1]

        def error(streams, target=target):
            return sum(float((x - y).square().sum()) for x, y in zip(streams, target, strict=True) if y is not None)

        assert error(made) < error(alone)


@torch.no_grad()
def test_blocks_are_removed(model):
    """An identity gives on what it is given, as if the block list were shorter."""
    adapter, inputs = adapter_of(model), tiny_families.inputs(model)
    batch, blocks = captured(model, inputs), adapter.blocks(model)
    for interval in intervals(model):
        if getattr(blocks[interval.last], "context_pre_only", False):
            continue
        standing = block_map(adapter, model, blocks, {interval: Identity(blocks[interval.first])}, [interval])
        with swapped(model, standing):
            made = velocity(model, inputs)
        rest = interval.last + 1
        after = run_blocks(adapter, blocks[rest:], batch.boundaries[interval.first + 1], batch.context, rest)
        assert torch.allclose(made, together(head(model, after, inputs)), atol=1e-6)


@torch.no_grad()
def test_a_whole_ffn_as_a_replacement_is_the_stock_forward(model_with_parts):
    model = model_with_parts
    adapter, inputs = adapter_of(model), tiny_families.inputs(model)
    blocks = adapter.blocks(model)
    assert set(adapter.parts_of(model, 1, blocks[1])) == {"img", "txt"}
    # The last block is of one stream, where a family has such blocks.
    for number in (1, len(blocks) - 1):
        parts = adapter.parts_of(model, number, blocks[number])
        for percent, same in ((100, True), (50, False)) if parts else ():
            one = PrunedFfn(number, percent)
            maps = {one: PrunedFfnMaps.new(adapter, blocks[number], parts, percent)}
            with swapped(model, block_map(adapter, model, blocks, maps, [one])):
                assert torch.allclose(velocity(model, inputs), velocity_of(model, inputs), atol=1e-6) is same


@cache
def _stock(name):
    model = model_of(name)
    return velocity(model, tiny_families.inputs(model))


def velocity_of(model, inputs):
    """The stock model's own velocity, whatever stands in it now."""
    return _stock(type(model).__name__)


@torch.no_grad()
def test_modulations_in_all_directions_are_the_stock_forward(model_with_parts):
    model = model_with_parts
    adapter, inputs = adapter_of(model), tiny_families.inputs(model)
    stock = _stock(type(model).__name__)
    for rank, same in ((WIDTH, True), (WIDTH // 2, False)):
        basis = ModulationBasis(WIDTH, rank)
        basis.directions.copy_(torch.linalg.qr(torch.randn(WIDTH, WIDTH))[0][:, :rank])
        one = LowRankModulation()
        standing = block_map(adapter, model, adapter.blocks(model), {one: basis}, [one])
        assert standing
        with swapped(model, standing):
            assert torch.allclose(velocity(model, inputs), stock, atol=2e-5) is same


@torch.no_grad()
def test_a_text_run_leaves_the_image_its_own_text(model_with_parts):
    """Its later block is the teacher's, whose attention is given what the projector makes as the text."""
    model = model_with_parts
    adapter, inputs = adapter_of(model), tiny_families.inputs(model)
    blocks, run = adapter.blocks(model), TextRun(0, 1)
    projectors = randomised(TextProjectors(run, WIDTH, True), 3)
    streams, context = embed(model, inputs)
    seen = []
    attention = blocks[0].get_submodule(adapter.attention)
    handle = attention.register_forward_pre_hook(
        lambda _, args, named: seen.append(named[adapter.txt]), with_kwargs=True
    )
    first = run_blocks(adapter, [blocks[0]], streams, context, 0)
    handle.remove()

    def given(_, args, named):
        return args, {**named, adapter.txt: projectors.z_map(1)(seen[0])}

    attention = blocks[1].get_submodule(adapter.attention)
    handle = attention.register_forward_pre_hook(given, with_kwargs=True)
    img = run_blocks(adapter, [blocks[1]], first, context, 1).img
    handle.remove()
    expected = Streams(img, first.require_txt() + projectors.h(first.txt))
    expected = head(model, run_blocks(adapter, blocks[2:], expected, context, 2), inputs)
    with swapped(model, block_map(adapter, model, blocks, {run: projectors}, [run])):
        assert torch.allclose(velocity(model, inputs), together(expected), atol=1e-5)


@pytest.mark.parametrize("record", records(), ids=lambda record: record.name)
def test_what_a_record_states_of_blocks_is_what_diffusers_registers(record):
    for block_list, class_name in zip(record.block_lists, record.block_classes, strict=True):
        registered = registered_layout(record.transformer, class_name)
        if block_list not in record.layouts:
            assert registered is not None, f"diffusers does not register {class_name}: the record must say it"
        elif registered is not None:
            agree = resolved(registered, record.transformer, class_name) == record.layout(block_list)
            assert agree is (class_name not in WRONG_IN_REGISTRY)


def test_every_width_that_is_lacking_has_a_reason():
    assert all(bool(record.parts) is ("width" not in record.notes) for record in records())


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"block_lists": ("gone", "single_transformer_blocks")}, "no list of blocks gone,"),
        ({"layer_counts": ("depth", "num_single_layers")}, "no key depth in its configuration"),
        ({"prompt_arguments": ("captions",)}, "no argument captions of its forward"),
        (
            {"block_classes": ("Gone", "FluxSingleTransformerBlock")},
            "no blocks of the class Gone in transformer_blocks",
        ),
        ({"ffn_up": "net.9"}, "no part ff.net.9 in the blocks of transformer_blocks"),
        (
            {"layouts": {"single_transformer_blocks": dataclasses.replace(adapters.BlockLayout(), img="x")}},
            "no argument x of the blocks in single_transformer_blocks",
        ),
    ],
)
def test_a_record_that_does_not_fit_the_installed_diffusers_is_found_at_once(monkeypatch, changes, sentence):
    model = model_of("FluxTransformer2DModel")
    record = dataclasses.replace(adapter_of(model), **changes)
    monkeypatch.setitem(adapters._RECORDS, record.transformer, record)
    with pytest.raises(UserError, match=sentence) as error:
        check_record(model)
    assert "diffusers" in str(error.value) and "install" in str(error.value)


def test_every_record_fits_the_installed_diffusers(model):
    check_record(model)


@torch.no_grad()
@pytest.mark.parametrize("name", tiny_pipelines.PIPELINES)
def test_a_variant_generates_through_the_stock_pipeline(name, monkeypatch):
    make, arguments = tiny_pipelines.PIPELINES[name]
    pipeline = make()
    module = sys.modules[type(pipeline).__module__]
    if hasattr(module, "calculate_dimensions"):
        # Else the image to edit is scaled to a megapixel.
        sides = len(module.calculate_dimensions(256, 1.0))
        monkeypatch.setattr(module, "calculate_dimensions", lambda area, ratio: (16, 16, None)[:sides])
    pipeline.set_progress_bar_config(disable=True)
    prompt = {} if "prompt_embeds" in arguments else {"prompt": "a red circle"}

    def generated():
        made = pipeline(**prompt, **arguments, generator=torch.Generator().manual_seed(0), output_type="latent")
        return made.images if hasattr(made, "images") else made.frames

    model = pipeline.transformer
    assert name in adapter_of(model).pipelines
    teachers = generated()
    intervals_ = intervals(model)
    blocks = adapter_of(model).blocks(model)
    # A student that is the interval's first block: one block of every list is gone.
    students = {i: StudentBlock(adapter_of(model), i, i.first, blocks[i.first]) for i in intervals_}
    with swapped(model, block_map(adapter_of(model), model, blocks, students, intervals_)):
        made = generated()
    assert torch.isfinite(made).all() and made.shape == teachers.shape and not torch.allclose(made, teachers)
    assert torch.equal(generated(), teachers)


def test_every_pipeline_that_generates_in_no_test_has_a_reason():
    elsewhere = {"FluxPipeline", "QwenImagePipeline", "StableDiffusion3Pipeline"}
    for record in records():
        for pipeline in record.pipelines:
            tested = pipeline in elsewhere or pipeline in tiny_pipelines.PIPELINES
            assert tested is not (pipeline in record.notes), pipeline


@torch.no_grad()
def test_a_context_is_a_tree_of_its_tensors(model):
    _, context = embed(model, tiny_families.inputs(model))
    tensors = [x for x in tree_leaves(context) if torch.is_tensor(x)]
    everywhere = [context.of(number)[1] for number in range(len(adapter_of(model).blocks(model)))]
    assert {id(x) for x in tensors} == {id(x) for x in tree_leaves(everywhere) if torch.is_tensor(x)}
    doubled = tree_map(lambda x: 2 * x if torch.is_tensor(x) and x.is_floating_point() else x, context)
    assert type(doubled) is type(context) and set(doubled) == set(context) and doubled.layouts == context.layouts
