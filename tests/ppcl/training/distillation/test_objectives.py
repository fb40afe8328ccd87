"""Width and depth in one phase: the closed-form starts, the dims, what a plan leaves of a transformer."""

import json

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch.nn import functional as F

from ppcl.config.schema import Distillation
from ppcl.models import adapter_of, embed, run_blocks
from ppcl.models.teacher import Teacher
from ppcl.replacements import Interval, LinearFfn, LowRankModulation, TextRun
from ppcl.replacements.ffn import Ffn
from ppcl.replacements.io import files_in, load_replacement
from ppcl.replacements.parameter_counts import parameter_counts
from ppcl.replacements.switcher import VariantSwitcher
from ppcl.training.distillation.objectives import TeacherBlocks, new_objective
from ppcl.training.distillation.segments import segment_of
from ppcl.training.distillation.trainer import distil
from ppcl.training.losses import normalized, relative
from ppcl.training.parallel_dims import ParallelDims
from ppcl.training.pipeline import PipelineStage
from ppcl.training.run_context import RunContext
from ppcl.training.teacher_segment import TeacherSegment
from tests import ranks, tiny
from tests.samples import MemorySamples

# The plan's entries overlap: nothing of one objective enters another.
PLAN = [
    Interval(0, 1),
    Interval(3, 5),
    TextRun(1, 3),
    TextRun(4, 5),
    LinearFfn(0),
    LinearFfn(2),
    LinearFfn(5),
    LowRankModulation(),
]
SETTINGS = Distillation(steps=4, batch_size=8, learning_rate=1e-3, warmup=1, ridge=1e-9, train="all")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tiny.qwen_pipeline(tmp_path_factory.mktemp("teacher") / "pipeline")


def train(folder, out, settings=SETTINGS):
    dims = ParallelDims.join(settings.pipeline_parallel, settings.data_parallel)
    with torch.enable_grad():
        distil(Teacher(folder), MemorySamples(), PLAN, settings, RunContext(out, out / "checkpoints", dims=dims), 0.05)


@pytest.fixture(scope="module")
def started(folder, tmp_path_factory):
    """Closed-form starts: a rate this small leaves them as they are."""
    out = tmp_path_factory.mktemp("started")
    train(folder, out, SETTINGS.model_copy(update={"steps": 1, "learning_rate": 1e-12}))
    return out


@pytest.fixture(scope="module")
def trained(folder, tmp_path_factory):
    out = tmp_path_factory.mktemp("trained")
    train(folder, out)
    return out


class Heard:
    """Everything the stock forward's blocks did on the fitting samples, by hooks of the test's own."""

    def __init__(self, folder):
        model = Teacher(folder).transformer()
        samples = MemorySamples()
        inputs = samples.batch(samples.ids("train"))
        self.mask = inputs["encoder_hidden_states_mask"].bool()
        self.z, self.g, self.h = {}, {}, {}
        for number, block in enumerate(model.transformer_blocks):
            block.attn.register_forward_pre_hook(
                lambda _, a, kw, n=number: self.z.update({n: kw["encoder_hidden_states"]}), with_kwargs=True
            )
            block.img_norm2.register_forward_pre_hook(lambda _, a, n=number: self.g.update({(n, "img"): a[0]}))
            block.txt_norm2.register_forward_pre_hook(lambda _, a, n=number: self.g.update({(n, "txt"): a[0]}))
            block.register_forward_hook(
                lambda _, a, out, n=number: self.h.update({(n, "txt"): out[0], (n, "img"): out[1]})
            )
        with torch.no_grad():
            model(**inputs)

    def tokens(self, x, text):
        return (x[self.mask] if text else x.flatten(0, 1)).double().numpy()


def lstsq(x, y):
    solution = np.linalg.lstsq(np.hstack([x, np.ones((len(x), 1))]), y, rcond=None)[0]
    return solution[:-1].T, solution[-1]


def assert_map(linear, x, y):
    weight, bias = lstsq(x, y)
    assert np.allclose(linear.weight.numpy(), weight, atol=2e-3) and np.allclose(linear.bias.numpy(), bias, atol=2e-3)


@torch.no_grad()
def test_the_starts_are_the_least_squares_maps(folder, started):
    heard, teacher = Heard(folder), Teacher(folder)
    maps = load_replacement(started / "ffn-02.safetensors", teacher)
    for stream in ("img", "txt"):
        g = heard.tokens(heard.g[2, stream], stream == "txt")
        assert_map(maps[stream], g, heard.tokens(heard.h[2, stream], stream == "txt") - g)
    projectors = load_replacement(started / "text-01-03.safetensors", teacher)
    for number in (2, 3):
        assert_map(projectors.z[str(number)], heard.tokens(heard.z[1], True), heard.tokens(heard.z[number], True))
    after = heard.tokens(heard.h[1, "txt"], True)
    assert_map(projectors.h, after, heard.tokens(heard.h[3, "txt"], True) - after)


def test_behind_the_last_block_no_text_stream_is_made(folder, started):
    assert load_replacement(started / "text-04-05.safetensors", Teacher(folder)).h is None


@pytest.mark.parametrize(("pp", "dp"), [(2, 1), (1, 2)])
def test_the_mesh_does_not_change_the_replacements(folder, trained, tmp_path, pp, dp, monkeypatch):
    # The plan of the other tests overlaps everywhere and leaves no place to cut.
    plan = [Interval(0, 1), TextRun(1, 2), TextRun(3, 5), LinearFfn(0), LinearFfn(5), LowRankModulation()]
    alone, shared = tmp_path / "alone", tmp_path / "shared"
    monkeypatch.setattr("tests.ppcl.training.distillation.test_objectives.PLAN", plan)
    train(folder, alone)
    ranks.run(
        pp * dp,
        _train_plan,
        folder,
        shared,
        plan,
        SETTINGS.model_copy(update={"pipeline_parallel": pp, "data_parallel": dp}),
    )
    assert files_in(alone).keys() == files_in(shared).keys() == set(plan)
    for entry, path in files_in(alone).items():
        one, two = (load_replacement(p, Teacher(folder)).state_dict() for p in (path, files_in(shared)[entry]))
        for name in one:
            difference = (one[name] - two[name]).norm() / one[name].norm().clamp_min(1e-6)
            assert difference <= 2e-5, f"{entry} {name}: {difference:.2e}"


def _train_plan(folder, out, plan, settings):
    globals()["PLAN"] = plan
    train(folder, out, settings)


def test_training_lowers_every_loss_that_is_not_at_its_optimum(folder, tmp_path):
    train(folder, tmp_path, SETTINGS.model_copy(update={"steps": 30, "learning_rate": 3e-3}))
    for entry in PLAN[:-1]:
        curve = json.loads((tmp_path / f"{entry.name}.json").read_text())["curve"]
        first, last = (np.mean([point["loss"] for point in part]) for part in (curve[:3], curve[-3:]))
        assert last < (1.02 if isinstance(entry, Ffn) else 0.98) * first, entry


@torch.no_grad()
def test_the_losses_are_those_written_out(folder, started):
    """Every objective's losses on one batch against the stock blocks with hooks, and the modules called by hand."""
    teacher = Teacher(folder)
    segment = TeacherSegment(teacher, range(6), PLAN, "cpu", torch.float32)
    objective = new_objective(
        TeacherBlocks(segment.adapter, segment.transformer, segment.blocks, 6), LinearFfn(2), Distillation(init="first")
    )
    objective.module.load_state_dict(load_replacement(started / "ffn-02.safetensors", teacher).state_dict())
    samples = MemorySamples()
    captured = segment.run(samples.batch(samples.ids("train")), PipelineStage(0, 1), objective.capture)
    heard = Heard(folder)
    parts = {name: float(total / n) for name, (total, n) in objective.losses(captured, normalized).items()}
    g, h = (torch.tensor(heard.tokens(x[2, "txt"], True)).float() for x in (heard.g, heard.h))
    added = objective.module["txt"](g)
    assert parts["txt"] == pytest.approx(
        float((F.normalize(g + added, dim=-1) - F.normalize(h, dim=-1)).square().sum(-1).mean()), rel=1e-4
    )
    assert parts["txt_ffn"] == pytest.approx(float((added - (h - g)).square().sum() / (h - g).square().sum()), rel=1e-4)


@torch.no_grad()
def test_a_run_of_text_streams_replaced_by_their_own_values_changes_nothing(folder):
    """With one sample, one token and one timestep each map can be exact: then the images must be the teacher's."""
    teacher = Teacher(folder)
    segment = TeacherSegment(teacher, range(6), [], "cpu", torch.float32)
    objective = new_objective(
        TeacherBlocks(segment.adapter, segment.transformer, segment.blocks, 6),
        TextRun(1, 3),
        Distillation(init="first"),
    )
    captured = segment.run(MemorySamples().batch([3]), PipelineStage(0, 1), objective.capture)
    for number, linear in objective.module.z.items():
        x, y = (captured.text_inputs[b][0].double() for b in (1, int(number)))
        linear.weight.copy_(torch.linalg.lstsq(x, y).solution.T)
        linear.bias.zero_()
    h, after = (captured.boundaries[b].txt[0].double() for b in (2, 4))
    objective.module.h.weight.copy_(torch.linalg.lstsq(h, after - h).solution.T)
    objective.module.h.bias.zero_()
    model = teacher.transformer()
    inputs = MemorySamples().batch([3])
    expected = model(**inputs, return_dict=False)[0]
    switch = VariantSwitcher(teacher, {TextRun(1, 3): None})
    switch._loaded[TextRun(1, 3), False, "cpu", torch.float32] = objective.module
    switch(model, [TextRun(1, 3)])
    assert torch.allclose(model(**inputs, return_dict=False)[0], expected, atol=2e-4)


@torch.no_grad()
@pytest.mark.parametrize(
    "plan",
    [
        [LinearFfn(2)],
        [TextRun(1, 3)],
        [TextRun(4, 5)],
        [Interval(0, 1), LinearFfn(2)],
        [TextRun(1, 3), LinearFfn(2), LinearFfn(0), LinearFfn(5)],
        [TextRun(1, 3), TextRun(4, 5), LinearFfn(2), LinearFfn(5)],
        [LowRankModulation()],
        [LowRankModulation(), Interval(0, 1), Interval(3, 5), LinearFfn(2)],
        [LowRankModulation(), TextRun(1, 3), LinearFfn(0), LinearFfn(2), LinearFfn(5)],
    ],
)
def test_a_plan_counts_what_the_plugged_transformer_holds(folder, trained, plan):
    teacher = Teacher(folder)
    model, switch = teacher.transformer(), VariantSwitcher(teacher, files_in(trained))
    counted = parameter_counts(teacher, switch.files)
    before = model(**MemorySamples().batch([0, 1]), return_dict=False)[0]
    switch(model, plan)
    assert sum(p.numel() for p in model.parameters()) == counted.parameters(plan) < counted.total
    made = model(**MemorySamples().batch([0, 1]), return_dict=False)[0]
    assert made.shape == before.shape and not torch.allclose(made, before)
    switch(model, [])
    assert torch.equal(model(**MemorySamples().batch([0, 1]), return_dict=False)[0], before)


def test_a_target_that_is_nothing_leaves_the_loss_finite():
    total, divisor = relative(torch.zeros(2, 3, 4), torch.zeros(2, 3, 4))
    assert float(total) / divisor == 0.0


def test_a_cut_never_falls_into_a_text_run():
    plan = [TextRun(1, 3), LinearFfn(0), LinearFfn(5)]
    for stage in range(2):
        part = segment_of(stage, 2, 6, plan, "all")
        assert all((entry.first in part) == (entry.last in part) for entry in plan)


@torch.no_grad()
def test_the_teachers_own_streams_are_what_is_seen(folder):
    segment = TeacherSegment(Teacher(folder), range(6), PLAN, "cpu", torch.float32)
    objective = new_objective(
        TeacherBlocks(segment.adapter, segment.transformer, segment.blocks, 6),
        TextRun(1, 3),
        Distillation(init="first"),
    )
    inputs = MemorySamples().batch([0, 1])
    captured = segment.run(inputs, PipelineStage(0, 1), objective.capture)
    model = Teacher(folder).transformer()
    streams, context = embed(model, inputs)
    expected = run_blocks(adapter_of(model), adapter_of(model).blocks(model)[:3], streams, context)
    assert torch.equal(captured.boundaries[3].img, expected.img)
    # No hook is left behind.
    assert not any(module._forward_pre_hooks for module in segment.transformer.modules())


def test_linear_maps_stay_at_their_least_squares_optimum_by_default_and_students_are_the_same(teacher_folder, tmp_path):
    plan = [Interval(4, 5), TextRun(0, 2), LinearFfn(3)]
    made = {}
    for train in ("students", "all"):
        settings = SETTINGS.model_copy(update={"train": train, "steps": 2})
        folder = tmp_path / train
        with torch.enable_grad():
            distil(Teacher(teacher_folder), MemorySamples(), plan, settings, RunContext(folder, folder / "checkpoints"))
        made[train] = {replacement: load_file(folder / f"{replacement.name}.safetensors") for replacement in plan}
        start = json.loads((folder / f"{LinearFfn(3).name}.json").read_text())
        assert (start["curve"] == []) == (train == "students")
    student, *linear = plan
    for name, tensor in made["all"][student].items():
        assert torch.equal(tensor, made["students"][student][name]), name
    for replacement in linear:
        closed = load_file(tmp_path / "students" / "checkpoints" / f"{replacement.name}.safetensors")
        for name, tensor in made["students"][replacement].items():
            assert torch.equal(tensor, closed[name]), name
        assert any(not torch.equal(made["all"][replacement][name], closed[name]) for name in closed)
