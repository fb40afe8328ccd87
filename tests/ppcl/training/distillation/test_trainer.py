import json
import shutil

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from ppcl.config.schema import Distillation
from ppcl.models import adapter_of, embed, run_blocks
from ppcl.models.teacher import Teacher
from ppcl.replacements import Interval, PrunedFfn
from ppcl.replacements.io import files_in, load_replacement
from ppcl.replacements.switcher import VariantSwitcher
from ppcl.training.data import batch_of
from ppcl.training.distillation.closed_form import ClosedForm
from ppcl.training.distillation.trainer import distil
from ppcl.training.parallel_dims import ParallelDims
from ppcl.training.run_context import RunContext
from tests import ranks, tiny
from tests.samples import MemorySamples

INTERVALS = [Interval(0, 1), Interval(3, 5)]
SETTINGS = Distillation(steps=6, batch_size=8, learning_rate=1e-3, warmup=2, checkpoint_every=2)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tiny.qwen_pipeline(tmp_path_factory.mktemp("teacher") / "pipeline")


def train(folder, out, settings=SETTINGS, intervals=INTERVALS, stop_after=None):
    """One rank's part, in whatever process group this process is in."""

    def report(done, total, losses, phase=None):
        if phase is None and done == stop_after:
            raise KeyboardInterrupt

    dims = ParallelDims.join(settings.pipeline_parallel, settings.data_parallel)
    with torch.enable_grad():
        run = RunContext(out, out / "checkpoints", dims=dims, report=report)
        distil(Teacher(folder), MemorySamples(), intervals, settings, run)


def students(out):
    return {path.stem: load_file(path) for path in sorted(out.glob("*.safetensors"))}


def assert_same(a, b, tolerance=1e-5):
    assert a.keys() == b.keys() and len(a) == len(INTERVALS)
    for name in a:
        for key in a[name]:
            difference = (a[name][key] - b[name][key]).norm() / a[name][key].norm().clamp_min(1e-6)
            assert difference <= tolerance, f"{name} {key}: {difference:.2e}"


@pytest.fixture(scope="module")
def alone(folder, tmp_path_factory):
    out = tmp_path_factory.mktemp("alone")
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    train(folder, out)
    torch.set_num_threads(threads)
    return out


@pytest.mark.parametrize(("pp", "dp"), [(2, 1), (1, 2), (2, 2)])
def test_the_mesh_does_not_change_the_students(folder, alone, tmp_path, pp, dp):
    settings = SETTINGS.model_copy(update={"pipeline_parallel": pp, "data_parallel": dp})
    ranks.run(pp * dp, train, folder, tmp_path, settings)
    assert_same(students(alone), students(tmp_path))


@pytest.mark.parametrize("pp", [1, 2])
def test_several_passes_over_the_samples_give_the_same_students(folder, alone, tmp_path, pp):
    """No memory for more than one interval's sums; with two ranks one has nothing left in the second pass."""
    settings = SETTINGS.model_copy(update={"moments_gb": 1e-9, "pipeline_parallel": pp})
    ranks.run(pp, train, folder, tmp_path, settings)
    assert_same(students(alone), students(tmp_path))


def test_training_lowers_the_loss_and_changes_the_students(folder, tmp_path):
    train(folder, tmp_path, SETTINGS.model_copy(update={"steps": 40}))
    for interval in INTERVALS:
        curve = json.loads((tmp_path / f"{interval.name}.json").read_text())["curve"]
        assert curve[-1]["loss"] < 0.8 * curve[0]["loss"]


def test_a_stopped_run_continues_to_the_same_students(folder, alone, tmp_path):
    with pytest.raises(KeyboardInterrupt):
        train(folder, tmp_path, stop_after=5)
    assert len(list((tmp_path / "checkpoints").glob("*.safetensors"))) == 2
    assert not students(tmp_path)
    train(folder, tmp_path)
    assert_same(students(alone), students(tmp_path))


def test_a_closed_form_start_is_fitted_once(folder, alone, tmp_path, monkeypatch):
    fits = []
    monkeypatch.setattr(
        "ppcl.training.distillation.trainer.ClosedForm",
        lambda objectives, *given: fits.append(len(objectives)) or ClosedForm(objectives, *given),
    )
    with pytest.raises(KeyboardInterrupt):
        train(folder, tmp_path, stop_after=1)
    train(folder, tmp_path)
    assert fits == [2]
    assert_same(students(alone), students(tmp_path))


def test_a_student_whose_checkpoint_is_behind_catches_up_alone(folder, alone, tmp_path):
    with pytest.raises(KeyboardInterrupt):
        train(folder, tmp_path, stop_after=3)
    behind = (tmp_path / "checkpoints" / "00-01.safetensors").read_bytes()
    with pytest.raises(KeyboardInterrupt):
        train(folder, tmp_path, stop_after=5)
    (tmp_path / "checkpoints" / "00-01.safetensors").write_bytes(behind)
    train(folder, tmp_path)
    assert_same(students(alone), students(tmp_path))


def test_checkpoints_of_one_rank_are_continued_by_two(folder, alone, tmp_path):
    with pytest.raises(KeyboardInterrupt):
        train(folder, tmp_path, stop_after=5)
    ranks.run(2, train, folder, tmp_path, SETTINGS.model_copy(update={"pipeline_parallel": 2}))
    assert_same(students(alone), students(tmp_path))


@torch.no_grad()
@pytest.mark.parametrize(("start", "source"), [("first", 3), ("middle", 4)])
def test_an_untrained_student_is_the_teachers_block(folder, tmp_path, start, source):
    # A rate this small leaves the start as it is.
    train(folder, tmp_path, SETTINGS.model_copy(update={"steps": 1, "learning_rate": 1e-12, "init": start}))
    teacher = Teacher(folder)
    student = load_replacement(tmp_path / "03-05.safetensors", teacher)
    model = teacher.transformer()
    block = adapter_of(model).blocks(model)[source]
    streams, context = embed(model, MemorySamples().batch([0, 1]))
    expected = run_blocks(adapter_of(model), [block], streams, context)
    assert torch.allclose(student.streams(streams, context).img, expected.img, atol=1e-5)


@torch.no_grad()
def test_the_affine_start_is_the_least_squares_map_behind_the_first_block(folder, tmp_path):
    train(folder, tmp_path, SETTINGS.model_copy(update={"steps": 1, "learning_rate": 1e-12, "ridge": 1e-9}))
    teacher, samples = Teacher(folder), MemorySamples()
    student = load_replacement(tmp_path / "03-05.safetensors", teacher)
    model = teacher.transformer()
    adapter, blocks = adapter_of(model), adapter_of(model).blocks(model)
    inputs = samples.batch(samples.ids("train"))
    streams, context = embed(model, inputs)
    x = run_blocks(adapter, blocks[:4], streams, context).img.reshape(-1, 32).double().numpy()
    y = run_blocks(adapter, blocks[:6], streams, context).img.reshape(-1, 32).double().numpy()
    design = np.hstack([x, np.ones((len(x), 1))])
    solution = np.linalg.lstsq(design, y - x, rcond=None)[0]
    assert np.allclose(student.affine["img"].weight.numpy().T, solution[:-1], atol=2e-3)
    assert np.allclose(student.affine["img"].bias.numpy(), solution[-1], atol=2e-3)


@torch.no_grad()
@pytest.mark.parametrize("start", ["first", "middle", "affine"])
def test_a_narrow_student_starts_as_its_block_with_the_ffns_of_the_narrow_block(folder, tmp_path, start):
    settings = SETTINGS.model_copy(
        update={"steps": 1, "learning_rate": 1e-12, "init": start, "student_keep_percent": 50}
    )
    source = {"first": 3, "affine": 3, "middle": 4}[start]
    train(folder, tmp_path / "one", settings, [Interval(3, 5)])
    # What the block itself is with half of its hidden units, a replacement of its own.
    train(folder, tmp_path / "two", settings, [PrunedFfn(source, 50)])
    teacher = Teacher(folder)
    student = load_replacement(tmp_path / "one" / "03-05.safetensors", teacher)
    assert student.block.img_mlp.net[0].proj.out_features == 64 and (start == "affine") == bool(student.affine)
    student.affine.clear()
    model = teacher.transformer()
    adapter = adapter_of(model)
    streams, context = embed(model, MemorySamples().batch([0, 1]))
    VariantSwitcher(teacher, files_in(tmp_path / "two"))(model, [PrunedFfn(source, 50)])
    expected = run_blocks(adapter, [adapter.blocks(model)[source]], streams, context)
    made = student.streams(streams, context)
    assert torch.allclose(made.img, expected.img, atol=1e-5) and torch.allclose(made.txt, expected.txt, atol=1e-5)


def test_narrow_students_are_smaller_and_the_same_on_any_mesh_and_after_a_stop(folder, tmp_path):
    settings = SETTINGS.model_copy(update={"student_keep_percent": 25})
    with pytest.raises(KeyboardInterrupt):
        train(folder, tmp_path / "alone", settings, stop_after=3)
    train(folder, tmp_path / "alone", settings)
    ranks.run(2, train, folder, tmp_path / "shared", settings.model_copy(update={"pipeline_parallel": 2}))
    assert_same(students(tmp_path / "alone"), students(tmp_path / "shared"))
    train(folder, tmp_path / "whole")
    whole = students(tmp_path / "whole")
    for name, tensors in students(tmp_path / "alone").items():
        assert sum(t.numel() for t in tensors.values()) < sum(t.numel() for t in whole[name].values())


def test_a_batch_with_nan_is_left_out_and_counted(folder, tmp_path, monkeypatch):
    healthy = MemorySamples.batch
    poisoned = int(batch_of(3, MemorySamples().ids("train"), SETTINGS.batch_size, 0)[0])

    def batch(self, ids, device="cpu", dtype=torch.float32):
        made = healthy(self, ids, device, dtype)
        if poisoned == ids[0] and len(ids) == SETTINGS.batch_size:
            made["hidden_states"][0, 0, 0] = float("nan")
        return made

    monkeypatch.setattr(MemorySamples, "batch", batch)
    train(folder, tmp_path, SETTINGS.model_copy(update={"init": "first"}))
    record = json.loads((tmp_path / "03-05.json").read_text())
    assert record["skipped_steps"] >= 1
    assert all(t.isfinite().all() for s in students(tmp_path).values() for t in s.values())


@pytest.fixture(autouse=True)
def _clean(tmp_path):
    yield
    shutil.rmtree(tmp_path, ignore_errors=True)


def test_students_are_trained_on_from_files_and_others_taken_as_they_are(folder, alone, tmp_path):
    """Zero learning rate: what comes out is what was given."""
    start = files_in(alone)
    settings = SETTINGS.model_copy(update={"learning_rate": 1e-12, "steps": 1, "warmup": 0})
    with torch.enable_grad():
        distil(
            Teacher(folder), MemorySamples(), INTERVALS, settings, RunContext(tmp_path, tmp_path / "ck"), start=start
        )
    assert_same(students(alone), students(tmp_path))
    # A longer training from there starts where it was left: below where one without it starts.
    curves = {}
    for name, given in (("fresh", {}), ("continued", start)):
        out = tmp_path / name
        with torch.enable_grad():
            run = RunContext(out, out / "ck")
            distil(Teacher(folder), MemorySamples(), INTERVALS, SETTINGS, run, start=given)
        curves[name] = [
            json.loads((out / f"{interval.name}.json").read_text())["curve"][0]["loss"] for interval in INTERVALS
        ]
    assert all(b < a for a, b in zip(curves["fresh"], curves["continued"], strict=True))
