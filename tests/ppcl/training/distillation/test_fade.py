"""Affine maps that fade out in distillation: the schedule, and the students that it leaves."""

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from jobs.stages import screening
from ppcl.config.schema import Config, Distillation
from ppcl.export import export_file
from ppcl.models import embed, run_blocks
from ppcl.models.teacher import Teacher
from ppcl.replacements import Interval
from ppcl.replacements.io import files_in, load_replacement
from ppcl.result import Result
from ppcl.storage.manifest import Artifacts
from ppcl.training.distillation.objectives import StudentObjective
from ppcl.training.distillation.objectives.student import affine_scale
from ppcl.training.distillation.trainer import distil
from ppcl.training.parallel_dims import ParallelDims
from ppcl.training.run_context import RunContext
from tests import ranks, tiny
from tests.ppcl.export.replacements import MAKERS, result
from tests.samples import MemorySamples

INTERVALS = [Interval(0, 1), Interval(3, 5)]
SETTINGS = Distillation(steps=6, batch_size=8, learning_rate=1e-3, warmup=2, checkpoint_every=2, fade=0.7)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tiny.qwen_pipeline(tmp_path_factory.mktemp("teacher") / "pipeline")


def train(folder, out, settings=SETTINGS, stop_after=None, start=None):
    def report(done, total, losses, phase=None):
        if phase is None and done == stop_after:
            raise KeyboardInterrupt

    dims = ParallelDims.join(settings.pipeline_parallel, settings.data_parallel)
    with torch.enable_grad():
        run = RunContext(out, out / "checkpoints", dims=dims, report=report)
        distil(Teacher(folder), MemorySamples(), INTERVALS, settings, run, start=start)


def students(out):
    return {path.stem: load_file(path) for path in sorted(out.glob("*.safetensors"))}


def assert_same(one, other, tolerance):
    assert one.keys() == other.keys() and len(one) == len(INTERVALS)
    for name, tensors in one.items():
        assert tensors.keys() == other[name].keys()
        for key, tensor in tensors.items():
            assert (tensor - other[name][key]).norm() <= tolerance * tensor.norm().clamp_min(1e-6), (name, key)


@pytest.fixture(scope="module")
def faded(folder, tmp_path_factory):
    out = tmp_path_factory.mktemp("faded")
    train(folder, out)
    return out


@pytest.mark.parametrize(
    ("steps", "fade", "expected"),
    [
        (5, 1.0, [1, 0.75, 0.5, 0.25, 0]),
        (6, 0.5, [1, 0.5, 0, 0, 0, 0]),
        (4, 0.25, [1, 0, 0, 0]),
        (4, 0.01, [1, 0, 0, 0]),
        (3, 0.0, [1, 1, 1]),
        (1, 1.0, [1]),
    ],
)
def test_the_scale_falls_in_a_line_from_the_first_step_to_the_end_of_the_share(steps, fade, expected):
    settings = Distillation(steps=steps, fade=fade)
    assert [affine_scale(step, settings) for step in range(steps)] == pytest.approx(expected, abs=1e-12)


def test_every_step_trains_with_the_scale_of_its_number(folder, tmp_path, monkeypatch):
    scales, losses = [], StudentObjective.losses

    def recorded(self, *given):
        scales.append(self.module.affine_scale)
        return losses(self, *given)

    monkeypatch.setattr(StudentObjective, "losses", recorded)
    with pytest.raises(KeyboardInterrupt):
        train(folder, tmp_path, stop_after=3)
    # The last checkpoint is that of two steps: the third is repeated with the scale that it had.
    train(folder, tmp_path)
    line = [1, 2 / 3, 1 / 3, 0, 0, 0]
    assert scales[:: len(INTERVALS)] == pytest.approx(line[:3] + line[2:])
    assert scales[:: len(INTERVALS)] == scales[1 :: len(INTERVALS)]


@torch.no_grad()
def test_the_student_ends_as_a_stock_block(folder, faded):
    teacher = Teacher(folder)
    model = teacher.transformer()
    blocks = teacher.adapter.blocks(model)
    for path, interval in zip(sorted(faded.glob("*.safetensors")), INTERVALS, strict=True):
        stored, stock = load_file(path), blocks[interval.first].state_dict()
        assert {name.removeprefix("block."): t.shape for name, t in stored.items()} == {
            name: t.shape for name, t in stock.items()
        }
        student = load_replacement(path, teacher)
        assert not student.affine and student.affine_scale == 1
        blocks[interval.first].load_state_dict({name.removeprefix("block."): t for name, t in stored.items()})
        inputs = embed(model, MemorySamples().batch([0, 1]))
        assert torch.equal(
            student.streams(*inputs).img, run_blocks(teacher.adapter, [blocks[interval.first]], *inputs).img
        )


@torch.no_grad()
def test_the_map_of_a_student_counts_by_its_scale(folder, tmp_path):
    train(folder, tmp_path, SETTINGS.model_copy(update={"fade": 0.0}))
    teacher = Teacher(folder)
    student = load_replacement(tmp_path / "03-05.safetensors", teacher)
    inputs = embed(teacher.transformer(), MemorySamples().batch([0, 1]))
    whole = student.streams(*inputs)
    student.affine_scale = 0.25
    quarter = student.streams(*inputs)
    student.affine_scale = 0.0
    none = student.streams(*inputs)
    for stream in ("img", "txt"):
        x, expected = getattr(none, stream), student.affine[stream](getattr(none, stream))
        assert torch.allclose(getattr(whole, stream), x + expected, atol=1e-6)
        assert torch.allclose(getattr(quarter, stream), x + 0.25 * expected, atol=1e-6)


def test_without_fade_the_map_stays(folder, tmp_path):
    train(folder, tmp_path, SETTINGS.model_copy(update={"fade": 0.0}))
    assert all({"affine.img.weight", "affine.txt.bias"} <= tensors.keys() for tensors in students(tmp_path).values())


@pytest.mark.parametrize("stop_after", [3, 5])
def test_a_stopped_run_continues_to_the_same_students(folder, faded, tmp_path, stop_after):
    """Before the map is gone, and behind it."""
    with pytest.raises(KeyboardInterrupt):
        train(folder, tmp_path, stop_after=stop_after)
    train(folder, tmp_path)
    assert_same(students(faded), students(tmp_path), 1e-6)


@pytest.mark.parametrize(("pp", "dp"), [(2, 1), (1, 2)])
def test_the_mesh_does_not_change_the_students(folder, faded, tmp_path, pp, dp):
    settings = SETTINGS.model_copy(update={"pipeline_parallel": pp, "data_parallel": dp})
    ranks.run(pp * dp, train, folder, tmp_path, settings)
    assert_same(students(faded), students(tmp_path), 1e-5)


def test_screened_students_keep_their_maps_which_fade_out_when_they_are_trained_on(folder, tmp_path):
    config = Config(teacher=folder, prompts="p.txt", distillation=SETTINGS, detection={"screening_steps": 4})
    short = screening.settings_of(config)
    assert short.fade == 0 and short.steps == 4
    train(folder, tmp_path / "screening", short)
    train(folder, tmp_path / "students", start=files_in(tmp_path / "screening"))
    for name, tensors in students(tmp_path / "students").items():
        screened = students(tmp_path / "screening")[name]
        assert {key for key in screened if key.startswith("block.")} == tensors.keys() < screened.keys()


class FamilySamples:
    """Random inputs of any family's transformer."""

    def __init__(self, transformer):
        self.transformer = transformer

    def ids(self, split):
        return np.arange(8)

    def batch(self, ids, device="cpu", dtype=torch.float32):
        return tiny.inputs(self.transformer, len(ids))


@pytest.mark.parametrize("family", MAKERS)
def test_students_whose_maps_faded_out_are_exported_as_a_single_file(family, tmp_path):
    """The student `0-1` of these results ended in an affine map, with which the export is refused."""
    teacher_folder = MAKERS[family](tmp_path / "teacher")
    root = result(tmp_path / "job", teacher_folder, {"one": "0-1"})
    teacher = Teacher(teacher_folder)
    run = RunContext(root / "students", tmp_path / "checkpoints")
    settings = SETTINGS.model_copy(update={"steps": 2, "fade": 1.0})
    with torch.enable_grad():
        distil(teacher, FamilySamples(teacher.transformer()), [Interval(0, 1)], settings, run)
    Artifacts(root).commit("students", "0")
    export_file(Result(root), "one", tmp_path / "m.safetensors", torch.float32)
    student = load_file(root / "students" / "00-01.safetensors")
    assert student and all(name.startswith("block.") for name in student)
    stored = [t for t in load_file(tmp_path / "m.safetensors").values() if t.ndim == 2]
    # A weight that the original release holds as it is, or as a part of a joined one.
    wanted = next(t for name, t in student.items() if name.endswith("to_out.0.weight"))
    assert any(t.shape == wanted.shape and torch.equal(t, wanted) for t in stored)
