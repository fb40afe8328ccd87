"""LoRAs on students: exact where a student is its block, and elsewhere the least squares that they are said to be."""

import copy

import numpy as np
import pytest
import torch

from ppcl.errors import UserError
from ppcl.export import export_folder
from ppcl.linalg import Moments
from ppcl.lora import AppliedLora, LoraTransfer, read_lora
from ppcl.models import embed, run_blocks
from ppcl.models.teacher import Teacher
from ppcl.replacements import Interval, Plan
from ppcl.replacements.io import save_replacement
from ppcl.replacements.replacement import TeacherStructure
from ppcl.replacements.student_block import StudentBlock, affine_map
from ppcl.replacements.switcher import VariantSwitcher
from ppcl.result import Result
from ppcl.training.lora_transfer import low_rank_fit, source_layers, transfer_lora
from tests import tiny
from tests.ppcl.export.replacements import MAKERS, WIDTH, result, student
from tests.ppcl.lora.loras import written
from tests.samples import MemorySamples

PLANS = {"affine": "0-1", "stock": "2-3", "both": "0-1,2-3", "low": "0-1,2-3,modulations"}


class Inputs:
    """The same random states of a tiny transformer of any family for every batch."""

    def __init__(self, transformer):
        self.transformer = transformer

    def ids(self, split):
        return np.arange(8)

    def batch(self, ids, device, dtype):
        return tiny.inputs(self.transformer, len(ids))


@torch.no_grad()
def velocity(transformer):
    return transformer(**tiny.inputs(transformer), return_dict=False)[0]


def switcher_of(teacher, folder, student):
    folder.mkdir(exist_ok=True)
    path = folder / f"{student.interval.name}.safetensors"
    save_replacement(student, student.interval, teacher.adapter, path)
    return VariantSwitcher(teacher, {student.interval: path})


def no_samples():
    raise AssertionError("samples were asked for")


@pytest.fixture(scope="module")
def job(teacher_folder, tmp_path_factory):
    folder = tmp_path_factory.mktemp("job")
    lora = written("qwen", Teacher(teacher_folder), folder / "lora")
    return result(folder / "job", teacher_folder, PLANS), lora


@pytest.fixture
def opened(job, monkeypatch):
    made = Result(job[0])
    monkeypatch.setattr(made, "_calibration", lambda: MemorySamples(48))
    return made


@pytest.mark.parametrize("affine", [False, True])
@pytest.mark.parametrize("family", MAKERS)
def test_a_student_that_is_its_block_takes_exactly_the_blocks_lora(family, affine, tmp_path):
    teacher = Teacher(MAKERS[family](tmp_path / "teacher"))
    transformer, interval = teacher.transformer(), Interval(2, 2)
    block = copy.deepcopy(teacher.adapter.blocks(transformer)[2])
    maps = {name: affine_map(WIDTH) for name in ("img", "txt")} if affine else None
    switch = switcher_of(teacher, tmp_path / "students", StudentBlock(teacher.adapter, interval, 2, block, maps))
    lora, transfer = read_lora(written(family, teacher, tmp_path / "lora"), teacher), LoraTransfer()
    samples = Inputs(transformer)
    transfer_lora(switch, transformer, [interval], lora, transfer, (lambda: samples) if affine else no_samples)
    for scale in (1.0, 0.4):
        switch(transformer, [], AppliedLora(lora, scale))
        expected = velocity(transformer)
        switch(transformer, [interval], AppliedLora(lora, scale))
        assert (velocity(transformer) - expected).abs().max() > 1e-3
        switch(transformer, [interval], AppliedLora(lora, scale, transfer))
        torch.testing.assert_close(velocity(transformer), expected, rtol=1e-4, atol=1e-5)


def test_low_rank_fit_is_least_squares():
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(500, 12, generator=generator, dtype=torch.float64) + 3
    y = torch.randn(500, 9, generator=generator, dtype=torch.float64) + x[:, :9]
    moments = Moments(12, 9)
    moments.update(x, y)
    expected = torch.linalg.lstsq(torch.cat([x, torch.ones(500, 1, dtype=x.dtype)], 1), y).solution
    fit = low_rank_fit(moments, ridge=0.0, left_out=0.0)
    torch.testing.assert_close((fit.up @ fit.down).T, expected[:12].float(), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(fit.bias, expected[12].float(), rtol=1e-4, atol=1e-4)


def test_low_rank_fit_finds_a_planted_rank_and_its_map():
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(500, 12, generator=generator, dtype=torch.float64) + 3
    planted = torch.randn(12, 3, generator=generator, dtype=torch.float64)
    planted = planted @ torch.randn(3, 9, generator=generator, dtype=torch.float64)
    moments = Moments(12, 9)
    moments.update(x, x @ planted + 0.5)
    fit = low_rank_fit(moments, ridge=0.0, left_out=1e-9)
    assert fit.down.shape == (3, 12)
    torch.testing.assert_close((fit.up @ fit.down).T, planted.float(), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(fit.bias, torch.full((9,), 0.5), rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_the_map_behind_a_student_is_fitted_to_what_the_lora_changes_beyond_its_block(teacher_folder, tmp_path):
    """By hand, sample by sample, against plain least squares of all tokens at once."""
    teacher, interval, samples = Teacher(teacher_folder), Interval(1, 2), MemorySamples(64)
    transformer = teacher.transformer()
    switch = switcher_of(teacher, tmp_path / "students", student(teacher, interval, affine=True))
    lora, transfer = read_lora(written("qwen", teacher, tmp_path / "lora"), teacher), LoraTransfer()
    transfer_lora(switch, transformer, [interval], lora, transfer, lambda: samples)
    (file,) = transfer.students
    plain = switch.modules(transformer, [interval])[file]
    update = copy.deepcopy(plain.block)
    prefix = "transformer_blocks.1."
    for name, layer in lora.layers.items():
        if name.startswith(prefix):
            update.get_submodule(name.removeprefix(prefix)).weight += layer.scale * layer.up @ layer.down
    own, changed = switch.blocks(transformer), switch.blocks(transformer, AppliedLora(lora))
    tokens = {"img": ([], []), "txt": ([], [])}
    for number in samples.ids("train"):
        inputs = samples.batch([number])
        streams, context = embed(transformer, inputs)
        x = run_blocks(teacher.adapter, changed[:1], streams, context)
        z = run_blocks(teacher.adapter, [update], x, context)
        with_it, without = (run_blocks(teacher.adapter, blocks[1:3], x, context) for blocks in (changed, own))
        before = plain.streams(x, context)
        for name, (inputs_of, targets) in tokens.items():
            kept = inputs["encoder_hidden_states_mask"][0].bool() if name == "txt" else slice(None)
            block, made = getattr(z, name)[0, kept], getattr(before, name)[0, kept]
            new = block + plain.affine[name](block)
            change = (getattr(with_it, name) - getattr(without, name))[0, kept]
            inputs_of.append(block)
            targets.append(change - (new - made))
    for name, (inputs_of, targets) in tokens.items():
        x, y = torch.cat(inputs_of).double(), torch.cat(targets).double()
        x1 = torch.cat([x, torch.ones(len(x), 1, dtype=x.dtype)], 1)
        best = (y - x1 @ torch.linalg.lstsq(x1, y).solution).square().sum()
        layer = transfer.students[file].layers[f"affine.{name}"]
        left = (y - x @ (layer.up @ layer.down).double().T - layer.bias).square().sum()
        # Ridge, and the share of the fitted variance that low rank leaves out.
        explained = (y - y.mean(0)).square().sum() - best
        assert best < 0.9 * y.square().sum() and best * 0.999 < left < best + 0.03 * explained, name


def test_the_update_is_cut_to_the_hidden_units_of_a_student(teacher_folder, tmp_path):
    teacher = Teacher(teacher_folder)
    structure = TeacherStructure(teacher.adapter, teacher.transformer())
    lora = read_lora(written("qwen", teacher, tmp_path), teacher)
    block = copy.deepcopy(structure.blocks[2])
    up, down = (f"img_mlp.{name}" for name in (teacher.adapter.ffn_up, teacher.adapter.ffn_down))
    rows = torch.arange(1, block.get_submodule(up).out_features, 3)
    fewer = torch.nn.Linear(WIDTH, len(rows))
    fewer.weight = torch.nn.Parameter(structure.blocks[2].get_submodule(up).weight[rows])
    block.set_submodule(up, fewer)
    block.set_submodule(down, torch.nn.Linear(len(rows), WIDTH))
    made = StudentBlock(teacher.adapter, Interval(2, 3), 2, block)
    layers = source_layers(structure, made, "transformer_blocks.2.", lora)
    assert {name for name in lora.layers if name.startswith("transformer_blocks.2.")} == {
        f"transformer_blocks.2.{path.removeprefix('block.')}" for path in layers
    }
    whole = lora.layers[f"transformer_blocks.2.{up}"], lora.layers[f"transformer_blocks.2.{down}"]
    assert torch.equal(layers[f"block.{up}"].up, whole[0].up[rows])
    assert torch.equal(layers[f"block.{up}"].down, whole[0].down)
    assert torch.equal(layers[f"block.{down}"].down, whole[1].down[:, rows])


@pytest.mark.parametrize("name", PLANS)
def test_an_export_has_the_transfer_in_its_weights(opened, job, tmp_path, name):
    import diffusers

    from ppcl.models.pruned_transformer import pruned_class

    (applied,) = opened.transferred_loras([name], [(job[1], 0.7)])
    facts = export_folder(opened, name, tmp_path / "out", torch.float32, transformer_only=True, lora=applied)
    stock = opened.teacher.adapter.transformer
    assert facts.obstacles == export_folder(opened, name, tmp_path / "none", transformer_only=True).obstacles
    assert bool(facts.obstacles) == (name != "stock")
    model_class = pruned_class(stock) if facts.obstacles else getattr(diffusers, stock)
    exported = velocity(model_class.from_pretrained(tmp_path / "out"))
    pipeline = opened.pipeline(name, lora=(job[1], 0.7), lora_transfer=True)
    torch.testing.assert_close(exported, velocity(pipeline.transformer), rtol=1e-4, atol=1e-5)
    told = str(opened.coverage(pipeline, name, (job[1], 0.7), lora_transfer=True))
    assert told in facts.lora and "; transferred to students: transformer_blocks." in told
    opened.switch(pipeline, name, (job[1], 0.7))
    assert (velocity(pipeline.transformer) - exported).abs().max() > 1e-3


def test_what_is_transferred_is_told_apart_from_what_is_left_out(opened, job):
    pipeline = opened.pipeline("teacher")
    layers = opened.applied_lora(job[1]).lora.layers
    of = {n: [name for name in layers if name.startswith(f"transformer_blocks.{n}.")] for n in range(4)}
    affine = opened.coverage(pipeline, "affine", job[1], lora_transfer=True)
    assert (affine.transferred, affine.lost) == ([*of[0], *of[1]], [])
    # A stock block has no map behind it that could take the second block's.
    stock = opened.coverage(pipeline, "stock", job[1], lora_transfer=True)
    assert (stock.transferred, stock.lost) == (of[2], of[3])
    without = opened.coverage(pipeline, "stock", job[1])
    assert (without.transferred, without.lost) == (None, [*of[2], *of[3]]) and stock.share == without.share


def test_the_same_samples_give_the_same_transfer_and_the_pipeline_stays_as_it_was(job, monkeypatch):
    fits = []
    for _ in range(2):
        made = Result(job[0])
        monkeypatch.setattr(made, "_calibration", lambda: MemorySamples(48))
        pipeline = made.pipeline("low", lora=job[1])
        before = velocity(pipeline.transformer)
        made.coverage(pipeline, "both", job[1], lora_transfer=True)
        assert torch.equal(velocity(pipeline.transformer), before)
        (transfer,) = made._transfers.values()
        fits.append({(file.name, path): one for file, u in transfer.students.items() for path, one in u.layers.items()})
    assert fits[0].keys() == fits[1].keys() and len(fits[0]) > 4
    assert all(torch.equal(one.up, fits[1][key].up) for key, one in fits[0].items())


def test_with_weights_that_come_and_go(opened, job, monkeypatch):
    expected = velocity(opened.pipeline("both", lora=job[1], lora_transfer=True).transformer)
    other = Result(job[0], memory={"offload": "group"})
    monkeypatch.setattr(other, "_calibration", lambda: MemorySamples(48))
    pipeline = other.pipeline("both", lora=job[1], lora_transfer=True)
    torch.testing.assert_close(velocity(pipeline.transformer), expected, rtol=1e-4, atol=1e-5)


def test_a_lora_outside_of_the_intervals_needs_no_samples_and_says_so(job, teacher_folder, tmp_path):
    teacher = Teacher(teacher_folder)
    lora = written("qwen", teacher, tmp_path, target_modules=r".*transformer_blocks\.[45]\.attn\.to_q|proj_out")
    made = Result(job[0])
    pipeline = made.pipeline("both", lora=lora, lora_transfer=True)
    with_it = velocity(pipeline.transformer)
    told = str(made.coverage(pipeline, "both", lora, lora_transfer=True))
    assert told == "all of the LoRA is on; nothing to transfer: it changes no block that a student stands for"
    made.switch(pipeline, "both", lora)
    assert torch.equal(velocity(pipeline.transformer), with_it)


def test_a_result_without_calibration_samples_says_what_lacks(job):
    made = Result(job[0])
    pipeline = made.pipeline("stock", lora=job[1], lora_transfer=True)
    before = velocity(pipeline.transformer)
    with pytest.raises(UserError, match="has no calibration samples, to which a LoRA's transfer to students"):
        made.switch(pipeline, "affine", job[1], lora_transfer=True)
    assert torch.equal(velocity(pipeline.transformer), before)


def test_plans_share_what_their_students_take(opened, job, monkeypatch):
    pipeline = opened.pipeline("both", lora=job[1], lora_transfer=True)
    monkeypatch.setattr(opened, "_calibration", no_samples)
    for plan in ("affine", Plan.parse("0-1"), "low"):
        opened.switch(pipeline, plan, (job[1], 0.3), lora_transfer=True)
