"""Width of FLUX.1's single-stream blocks: fitted, switched, counted, exported, with LoRAs, and fine-tuned."""

import copy
import json

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from ppcl.config.schema import Distillation, Memory, Sampling
from ppcl.export.variant_blocks import VariantBlocks
from ppcl.lora import AppliedLora, LoraTransfer, read_lora
from ppcl.models import embed, run_blocks
from ppcl.models.lora_linear import LoraLinear
from ppcl.models.placement import place
from ppcl.models.teacher import Teacher
from ppcl.replacements import Interval, LowRankModulation, Plan, PrunedFfn, PrunedHeads
from ppcl.replacements.io import files_in, load_replacement
from ppcl.replacements.parameter_counts import count_parameters, parameter_counts
from ppcl.replacements.replacement import TeacherStructure
from ppcl.replacements.switcher import VariantSwitcher
from ppcl.search.checks import optimistic_counts
from ppcl.training.distillation.trainer import distil
from ppcl.training.finetuning.trainer import DistilledReplacements, finetune
from ppcl.training.finetuning.tuned_blocks import tuned_blocks
from ppcl.training.finetuning.variant_model import VariantModel
from ppcl.training.lora_transfer import source_layers, transfer_lora
from ppcl.training.parallel_dims import ParallelDims
from ppcl.training.run_context import RunContext
from tests import ranks, tiny
from tests.ppcl.lora.loras import written
from tests.ppcl.training.finetuning.test_trainer import SETTINGS, assert_same, losses, states
from tests.samples import FluxSamples

# Blocks 4 to 9 are single-stream: 32 inputs of their output projection are the attention's, 128 hidden units.
MADE = Plan.parse("6-7,ffn:4/50,ffn:4/25,heads:4/50,ffn:5/50,heads:8/50,modulations")
PLANS = [
    "ffn:4/50",
    "ffn:4/25,ffn:5/50",
    "heads:4/50",
    "heads:4/50,ffn:4/25",
    "modulations",
    "heads:4/50,ffn:4/50,heads:8/50,modulations",
    "6-7",
    "6-7,ffn:5/50,heads:8/50,modulations",
]
DISTILLATION = Distillation(
    steps=2, batch_size=8, learning_rate=1e-4, warmup=1, ridge=1e-9, student_keep_percent=50, init="affine"
)


@pytest.fixture(scope="module")
def teacher(tmp_path_factory):
    return Teacher(tiny.flux_pipeline(tmp_path_factory.mktemp("teacher") / "pipeline"))


@pytest.fixture(scope="module")
def samples(teacher):
    return FluxSamples(teacher.transformer())


@pytest.fixture(scope="module")
def folder(teacher, samples, tmp_path_factory):
    out = tmp_path_factory.mktemp("students")
    with torch.enable_grad():
        distil(teacher, samples, MADE, DISTILLATION, RunContext(out, out / "c"), 0.1)
    return out


@pytest.fixture(scope="module")
def files(folder):
    return files_in(folder)


@pytest.fixture(scope="module")
def inputs(teacher, samples):
    """What the stock output projection of block 4 reads of the samples that are fitted: all tokens `(n, 160)`."""
    model, read = teacher.transformer(), []
    block = teacher.adapter.blocks(model)[4]
    block.proj_out.register_forward_pre_hook(lambda _, args: read.append(args[0].flatten(0, 1)))
    with torch.no_grad():
        model(**samples.batch(samples.ids("train")), return_dict=False)
    return read[0].double(), block


@torch.no_grad()
def velocity(model):
    return model(**tiny.inputs(model), return_dict=False)[0]


def lstsq(x, y):
    solution = np.linalg.lstsq(np.hstack([x, np.ones((len(x), 1))]), y, rcond=None)[0]
    return torch.tensor(solution[:-1].T), torch.tensor(solution[-1])


@torch.no_grad()
@pytest.mark.parametrize("percent", [50, 25])
def test_the_units_that_stay_take_over_in_the_least_squares_sense(teacher, files, inputs, percent):
    """Against plain least squares in float64, of all tokens of both streams; text and image have 6 and 16."""
    x, block = inputs
    assert len(x) == 48 * (6 + 16)
    x = x[:, 32:]
    maps = load_replacement(files[PrunedFfn(4, percent)], teacher)
    up, down = maps.maps("img")
    own = block.proj_mlp.weight
    units = [int((own - row).abs().sum(1).argmin()) for row in up.weight]
    assert len(units) == 128 * percent // 100 and torch.equal(own[units], up.weight)
    assert torch.equal(block.proj_mlp.bias[units], up.bias) and units != list(range(len(units)))
    target = x @ block.proj_out.weight[:, 32:].double().T
    weight, bias = lstsq(x[:, units].numpy(), target.numpy())
    torch.testing.assert_close(down.weight.double(), weight, rtol=2e-3, atol=2e-3)
    torch.testing.assert_close(down.bias.double(), bias + block.proj_out.bias, rtol=2e-3, atol=2e-3)

    def error(kept):
        made = lstsq(x[:, kept].numpy(), target.numpy())
        return float((x[:, kept] @ made[0].T + made[1] - target).square().mean())

    generator = torch.Generator().manual_seed(0)
    others = [torch.randperm(128, generator=generator)[: len(units)] for _ in range(20)]
    assert error(units) < 0.9 * min(map(error, others))


@torch.no_grad()
def test_the_head_that_stays_is_the_better_one_and_takes_over(teacher, files, inputs):
    x, block = inputs
    x = x[:, :32]
    maps = load_replacement(files[PrunedHeads(4, 50)], teacher)
    target = x @ block.proj_out.weight[:, :32].double().T
    fits = [lstsq(x[:, rows].numpy(), target.numpy()) for rows in (slice(0, 16), slice(16, 32))]
    errors = [
        float((x[:, 16 * head : 16 * head + 16] @ weight.T + bias - target).square().mean())
        for head, (weight, bias) in enumerate(fits)
    ]
    (kept,) = maps.heads
    assert errors[kept] == min(errors)
    torch.testing.assert_close(maps.out["img"].weight.double(), fits[kept][0], rtol=2e-3, atol=2e-3)
    torch.testing.assert_close(maps.out["img"].bias.double(), fits[kept][1], rtol=2e-3, atol=2e-3)
    for made, name in zip(maps.qkv["img"], ("to_q", "to_k", "to_v"), strict=True):
        assert torch.equal(made.weight, getattr(block.attn, name).weight[16 * kept : 16 * kept + 16])


@torch.no_grad()
def test_heads_and_units_of_a_block_compose(teacher, files):
    """As the stock block with both sets of columns in its own output projection, and 0 where something went."""
    model, switch = teacher.transformer(), VariantSwitcher(teacher, files)
    ffn, heads = (load_replacement(files[one], teacher) for one in (PrunedFfn(4, 25), PrunedHeads(4, 50)))
    block = copy.deepcopy(teacher.adapter.blocks(model)[4])
    up, down = ffn.maps("img")
    units = [int((block.proj_mlp.weight - row).abs().sum(1).argmin()) for row in up.weight]
    weight = torch.zeros_like(block.proj_out.weight)
    (kept,) = heads.heads
    weight[:, 16 * kept : 16 * kept + 16] = heads.out["img"].weight
    weight[:, [32 + unit for unit in units]] = down.weight
    block.proj_out.weight.copy_(weight)
    block.proj_out.bias.copy_(down.bias + heads.out["img"].bias)
    streams, context = embed(model, tiny.inputs(model))
    expected = run_blocks(teacher.adapter, [block], streams, context)
    made = switch.replacements(model, Plan.parse("ffn:4/25,heads:4/50"))[4]
    assert made.proj_out.attention.weight.shape == (32, 16) and made.proj_out.ffn.weight.shape == (32, 32)
    for a, b in zip(run_blocks(teacher.adapter, [made], streams, context), expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("plan", PLANS)
def test_a_plan_is_switched_counted_exported_and_read_back(teacher, files, plan):
    plan, model, switch = Plan.parse(plan), teacher.transformer(), VariantSwitcher(teacher, files)
    counted, teachers = parameter_counts(teacher, files), velocity(model)
    switch(model, plan)
    assert count_parameters(model) == counted.parameters(plan) < counted.total
    expected = velocity(model)
    assert (expected - teachers).abs().max() > 1e-3
    blocks = VariantBlocks(teacher, {one: files[one] for one in plan})
    made = blocks.empty_model()
    state = {n: t for group in blocks.groups() for n, t in blocks.tensors(group, torch.float32).items()}
    made.load_state_dict(state, strict=True, assign=True)
    shapes = {n: t.shape for group in blocks.groups() for n, t in blocks.shapes(group).items()}
    assert {name: tensor.shape for name, tensor in state.items()} == shapes
    assert count_parameters(made) == counted.parameters(plan)
    torch.testing.assert_close(velocity(made), expected, rtol=1e-5, atol=1e-6)
    switch(model, ())
    assert torch.equal(velocity(model), teachers)


@pytest.mark.parametrize("mode", ["group", "model"])
def test_weights_that_come_and_go_give_the_same_numbers(teacher, files, mode):
    """Maps in two are of what the host has, whether their block is on the device or not."""
    pipeline, model, switch = teacher.pipeline(), teacher.transformer(), VariantSwitcher(teacher, files)
    place(pipeline, "cpu", Memory(offload=mode))
    for plan in map(Plan.parse, ("ffn:4/25,ffn:5/50", "heads:4/50,ffn:4/25", "", "6-7,ffn:5/50,heads:8/50")):
        switch(pipeline.transformer, plan)
        switch(model, plan)
        torch.testing.assert_close(velocity(pipeline.transformer), velocity(model), rtol=1e-5, atol=1e-6)


def test_what_is_counted_before_training_is_what_is_made(teacher, files):
    before = optimistic_counts(teacher, MADE, DISTILLATION.student_keep_percent)
    counted = parameter_counts(teacher, files)
    for one in MADE:
        if isinstance(one, PrunedHeads):
            assert before.saved(one) == counted.saved(one)
        elif not isinstance(one, LowRankModulation):
            # Of the last bias, and of a student's affine maps.
            assert 0 <= before.saved(one) - counted.saved(one) < 2 * 33 * 32 + 64


def test_a_student_keeps_half_of_its_units(teacher, files):
    student = load_replacement(files[Interval(6, 7)], teacher)
    assert student.block.proj_mlp.out_features == 64 == student.block.proj_out.ffn.in_features
    assert student.block.proj_out.attention.in_features == 32


@pytest.fixture(scope="module")
def lora(teacher, tmp_path_factory):
    targets = ["attn.to_q", "proj_mlp", "norm.linear", "proj_out"]
    path = written("flux", teacher, tmp_path_factory.mktemp("lora"), target_modules=targets)
    made = read_lora(path, teacher)
    assert {"single_transformer_blocks.0.proj_out", "single_transformer_blocks.0.proj_mlp"} <= made.layers.keys()
    return made


def _update(lora, name):
    layer = lora.layers[f"single_transformer_blocks.{name}"]
    return layer.scale * layer.up @ layer.down


@torch.no_grad()
def test_a_lora_is_cut_to_the_units_and_heads_that_stay(teacher, files, lora):
    model, switch = teacher.transformer(), VariantSwitcher(teacher, files)
    plan = Plan.parse("ffn:4/25,heads:4/50")
    own = switch.blocks(model)[4]
    switch(model, plan, AppliedLora(lora))
    block = teacher.adapter.blocks(model)[4]
    up, out = block.proj_mlp, block.proj_out
    units = [int((own.proj_mlp.weight - row).abs().sum(1).argmin()) for row in up.base.weight]
    (kept,) = load_replacement(files[PrunedHeads(4, 50)], teacher).heads
    rows = slice(16 * kept, 16 * kept + 16)
    columns = [32 + unit for unit in units]
    assert all(isinstance(one, LoraLinear) for one in (up, out.attention, out.ffn))
    torch.testing.assert_close(up.merged().weight - up.base.weight, _update(lora, "0.proj_mlp")[units])
    change = _update(lora, "0.proj_out")
    torch.testing.assert_close(out.ffn.merged().weight - out.ffn.base.weight, change[:, columns])
    torch.testing.assert_close(out.attention.merged().weight - out.attention.base.weight, change[:, rows])
    coverage = switch.coverage(model, plan, AppliedLora(lora))
    assert not coverage.lost and "single_transformer_blocks.0.proj_out" in coverage.cut
    left = {name: layer.norm**2 for name, layer in lora.layers.items()}
    left["single_transformer_blocks.0.proj_out"] = float(change[:, rows].norm() ** 2 + change[:, columns].norm() ** 2)
    left["single_transformer_blocks.0.proj_mlp"] = float(_update(lora, "0.proj_mlp")[units].norm()) ** 2
    left["single_transformer_blocks.0.attn.to_q"] = float(_update(lora, "0.attn.to_q")[rows].norm()) ** 2
    whole = sum(layer.norm**2 for layer in lora.layers.values())
    assert coverage.share == pytest.approx(sum(left.values()) / whole, rel=1e-4)


@pytest.mark.parametrize("plan", ["ffn:4/25,heads:4/50", "heads:8/50", "6-7,ffn:5/50,modulations"])
def test_an_export_has_the_lora_in_its_weights(teacher, files, lora, samples, plan):
    model, switch, plan = teacher.transformer(), VariantSwitcher(teacher, files), Plan.parse(plan)
    transfer = LoraTransfer()
    transfer_lora(switch, model, plan, lora, transfer, lambda: samples)
    applied = AppliedLora(lora, 0.7, transfer)
    switch(model, plan)
    without = velocity(model)
    switch(model, plan, applied)
    expected = velocity(model)
    assert (expected - without).abs().max() > 1e-3
    blocks = VariantBlocks(teacher, {one: files[one] for one in plan}, applied)
    made = blocks.empty_model()
    made.load_state_dict(
        {n: t for group in blocks.groups() for n, t in blocks.tensors(group, torch.float32).items()}, assign=True
    )
    torch.testing.assert_close(velocity(made), expected, rtol=1e-4, atol=1e-5)
    assert str(blocks.coverage()) == str(switch.coverage(model, plan, applied))


@torch.no_grad()
def test_a_narrow_student_takes_the_lora_of_its_units(teacher, files, lora):
    structure = TeacherStructure(teacher.adapter, teacher.transformer())
    student = load_replacement(files[Interval(6, 7)], teacher)
    own = structure.blocks[6]
    # As if no step had moved them.
    units = torch.arange(0, 128, 2)
    student.block.proj_mlp.weight.copy_(own.proj_mlp.weight[units])
    layers = source_layers(structure, student, "single_transformer_blocks.2.", lora)
    assert not any(path.endswith("proj_out") for path in layers)

    def update(path):
        return layers[path].scale * layers[path].up @ layers[path].down

    whole = _update(lora, "2.proj_out")
    torch.testing.assert_close(update("block.proj_out.attention"), whole[:, :32])
    torch.testing.assert_close(update("block.proj_out.ffn"), whole[:, 32 + units])
    torch.testing.assert_close(update("block.proj_mlp"), _update(lora, "2.proj_mlp")[units])
    torch.testing.assert_close(update("block.norm.linear"), _update(lora, "2.norm.linear"))


def test_every_parameter_of_a_plan_gets_a_gradient(teacher, files, samples):
    plan = Plan.parse("6-7,ffn:4/25,heads:4/50,ffn:5/50,heads:8/50")
    model = VariantModel(teacher, {one: files[one] for one in plan}, {}, "cpu", torch.float32, False)
    with torch.enable_grad():
        parameters = model.trained_parameters(plan)
        model.velocity(plan, samples.batch([0, 1]), training=True).square().sum().backward()
    for name, p in parameters.items():
        assert p.grad is not None and p.grad.abs().max() > 0, name


def tune(teacher, samples, files, out, settings, variants):
    out.mkdir(exist_ok=True)
    dims = ParallelDims.join(1, settings.data_parallel)
    with torch.enable_grad():
        finetune(
            teacher,
            samples,
            DistilledReplacements(files, variants, dict.fromkeys(files, 0.1)),
            settings,
            RunContext(out, out / "checkpoints", dims=dims),
            Sampling(steps=4, arguments={"guidance_scale": 2.5}),
        )


IN_FULL = "ffn:4/25,heads:4/50,ffn:5/50,heads:8/50,modulations"


def test_a_block_trained_in_full_leaves_out_what_its_plan_does_not_run(teacher, files):
    left_out = {
        one.block: set(paths)
        for one, paths in tuned_blocks(teacher, {one: files[one] for one in Plan.parse(IN_FULL)}).items()
    }
    qkv = {"attn.to_q", "attn.to_k", "attn.to_v"}
    assert left_out[4] == {"proj_mlp", "proj_out"} | qkv
    # One half of the output projection is run.
    assert (left_out[5], left_out[8], left_out[9]) == ({"proj_mlp"}, qkv, set())


@pytest.mark.parametrize("train", ["replacements", "all"])
def test_fine_tuning_improves_it_on_one_rank_and_two(teacher, samples, files, tmp_path, train):
    variants = {"teacher": [], "narrow": Plan.parse(IN_FULL)}
    given = {"steps": 12, "learning_rate": 1e-4, "rollout_share": 0.0, "measured_plans": 1, "plan": "narrow"}
    settings = SETTINGS.model_copy(update=given | {"train": train, "ema": 0.0})
    tune(teacher, samples, files, tmp_path / "one", settings, variants)
    rows = json.loads((tmp_path / "one" / "finetuning.json").read_text())["plans"]
    assert rows[0]["after"] < rows[0]["before"]
    several = settings.model_copy(update={"data_parallel": 2})
    ranks.run(2, tune, teacher, samples, files, tmp_path / "two", several, variants)
    assert losses(tmp_path / "two") == pytest.approx(losses(tmp_path / "one"), rel=1e-5)
    place = teacher.place
    assert_same(states(place, tmp_path / "one"), states(place, tmp_path / "two"), 5e-5)
    if train == "all":
        tuned = load_file(tmp_path / "one" / "block-05.safetensors")
        assert "proj_out.weight" in tuned and "proj_mlp.weight" not in tuned
