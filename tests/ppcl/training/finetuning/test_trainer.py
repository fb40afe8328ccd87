"""Fine-tuning over drawn plans: what improves, what is left alone, and that neither a stop nor the ranks change it."""

import json

import numpy as np
import pytest
import torch

from ppcl.config.schema import Distillation, Finetuning, Sampling
from ppcl.evaluation.velocity_error import variant_errors
from ppcl.models import adapter_of, embed, run_blocks
from ppcl.models.teacher import Teacher
from ppcl.replacements import Interval, LinearFfn, LowRankModulation, PrunedFfn, TextRun
from ppcl.replacements.io import files_in, load_replacement
from ppcl.replacements.switcher import VariantSwitcher
from ppcl.training.data import batch_of
from ppcl.training.distillation.trainer import distil
from ppcl.training.finetuning.trainer import DistilledReplacements, _Trainer, feature_error, finetune
from ppcl.training.finetuning.variant_model import VariantModel
from ppcl.training.parallel_dims import ParallelDims
from ppcl.training.run_context import RunContext
from ppcl.training.sharding import local
from tests import ranks, tiny
from tests.samples import MemorySamples

PLAN = [Interval(0, 1), Interval(3, 5), TextRun(1, 3), LinearFfn(0), LinearFfn(2), PrunedFfn(2, 50)]
VARIANTS = {
    "teacher": [],
    "small": [Interval(0, 1), LinearFfn(2)],
    "half": [Interval(3, 5), LinearFfn(0), PrunedFfn(2, 50)],
}
SENSITIVITY = {
    Interval(0, 1): 0.2,
    Interval(3, 5): 0.3,
    TextRun(1, 3): 0.05,
    LinearFfn(0): 0.02,
    LinearFfn(2): 0.01,
    PrunedFfn(2, 50): 0.002,
}
SETTINGS = Finetuning(
    steps=120,
    batch_size=16,
    learning_rate=1e-3,
    warmup=2,
    rollout_share=0.25,
    measured_plans=12,
    checkpoint_every=10,
    plan="any",
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tiny.qwen_pipeline(tmp_path_factory.mktemp("teacher") / "pipeline")


@pytest.fixture(scope="module")
def students(folder, tmp_path_factory):
    out = tmp_path_factory.mktemp("students")
    # Poor starts, so that there is something to improve.
    settings = Distillation(steps=1, batch_size=8, learning_rate=1e-12, init="first", ridge=1.0, train="all")
    with torch.enable_grad():
        distil(Teacher(folder), MemorySamples(256), PLAN, settings, RunContext(out, out / "c"))
    return out


def tune(folder, students, out, settings=SETTINGS, stop_after=None, variants=VARIANTS):
    def report(done, total, losses, phase=None):
        if done == stop_after and phase is None:
            raise KeyboardInterrupt

    out.mkdir(exist_ok=True)
    dims = ParallelDims.join(1, settings.data_parallel)
    with torch.enable_grad():
        finetune(
            Teacher(folder),
            MemorySamples(256),
            DistilledReplacements(files_in(students), variants, SENSITIVITY),
            settings,
            RunContext(out, out / "checkpoints", dims=dims, report=report),
            Sampling(steps=8),
        )
    return json.loads((out / "finetuning.json").read_text()) if dims.dp_rank == 0 else None


@pytest.fixture(scope="module")
def tuned(folder, students, tmp_path_factory):
    out = tmp_path_factory.mktemp("tuned")
    tune(folder, students, out)
    return out


def states(folder, out):
    return {entry: load_replacement(path, Teacher(folder)).state_dict() for entry, path in files_in(out).items()}


def assert_same(one, two, tolerance):
    assert one.keys() == two.keys()
    for entry in one:
        for name in one[entry]:
            difference = (one[entry][name] - two[entry][name]).norm() / one[entry][name].norm().clamp_min(1e-6)
            assert difference <= tolerance, f"{entry} {name}: {difference:.2e}"


def test_plans_improve_and_the_files_say_so(folder, students, tuned):
    rows = json.loads((tuned / "finetuning.json").read_text())["plans"]
    assert [row["variant"] for row in rows[:2]] == ["small", "half"] and len(rows) >= 12
    ratios = [row["after"] / row["before"] for row in rows]
    assert np.median(ratios) < 0.9 and np.mean([r < 1 for r in ratios]) > 0.8
    assert files_in(tuned).keys() == files_in(students).keys() == set(PLAN)


def test_a_stopped_run_continues_to_the_same(folder, students, tmp_path):
    settings = SETTINGS.model_copy(update={"steps": 40, "measured_plans": 2})
    tune(folder, students, tmp_path / "whole", settings)
    with pytest.raises(KeyboardInterrupt):
        tune(folder, students, tmp_path / "stopped", settings, stop_after=25)
    assert not files_in(tmp_path / "stopped")
    tune(folder, students, tmp_path / "stopped", settings)
    assert_same(states(folder, tmp_path / "whole"), states(folder, tmp_path / "stopped"), 1e-5)


@pytest.mark.parametrize("feature_loss", [True, False])
@pytest.mark.parametrize("shard", [True, False])
def test_replicas_do_not_change_the_result(folder, students, tmp_path, shard, feature_loss):
    # Each replica has trajectories of its own, so the result can be the same only without them.
    changes = {"steps": 6, "rollout_share": 0.0, "shard": shard, "feature_loss": feature_loss}
    settings = SETTINGS.model_copy(update=changes)
    tune(folder, students, tmp_path / "one", settings)
    ranks.run(2, tune, folder, students, tmp_path / "two", settings.model_copy(update={"data_parallel": 2}))
    assert_same(states(folder, tmp_path / "one"), states(folder, tmp_path / "two"), 2e-5)


def losses(out):
    return [point["loss"] for point in json.loads((out / "finetuning.json").read_text())["curve"]]


def test_sharded_ranks_have_the_losses_of_one_process(folder, tmp_path):
    """Low-rank modulations among the rest: their products are made while a block is whole."""
    plan = [*PLAN, LowRankModulation()]
    settings = Distillation(steps=1, batch_size=8, learning_rate=1e-12, init="first", ridge=1.0, train="all")
    with torch.enable_grad():
        distil(Teacher(folder), MemorySamples(256), plan, settings, RunContext(tmp_path / "s", tmp_path / "c"), 1e-2)
    variants = {
        "students": [Interval(0, 1), PrunedFfn(2, 50), LowRankModulation()],
        "text": [TextRun(1, 3), LinearFfn(2), LowRankModulation()],
        "plain": [LinearFfn(0), Interval(3, 5)],
    }
    settings = SETTINGS.model_copy(
        update={"steps": 6, "rollout_share": 0.0, "plan": "variants", "measured_plans": 0, "ema": 0.9}
    )
    tune(folder, tmp_path / "s", tmp_path / "one", settings, variants=variants)
    ranks.run(2, tune, folder, tmp_path / "s", tmp_path / "two", replicas(settings, 2), None, variants)
    assert losses(tmp_path / "two") == pytest.approx(losses(tmp_path / "one"), rel=1e-5)
    rows = [json.loads((tmp_path / name / "finetuning.json").read_text())["plans"] for name in ("one", "two")]
    for one, two in zip(*rows, strict=True):
        assert (two["before"], two["after"]) == pytest.approx((one["before"], one["after"]), rel=1e-4)


def replicas(settings, count):
    return settings.model_copy(update={"data_parallel": count})


def stopped(folder, students, out, settings, stop_after):
    with pytest.raises(KeyboardInterrupt):
        tune(folder, students, out, settings, stop_after)


@pytest.mark.parametrize("next_ranks", [1, 3])
def test_another_number_of_ranks_goes_on_from_a_checkpoint(folder, students, tmp_path, next_ranks):
    settings = SETTINGS.model_copy(
        update={"steps": 8, "rollout_share": 0.0, "measured_plans": 0, "checkpoint_every": 4, "ema": 0.9}
    )
    tune(folder, students, tmp_path / "one", settings)
    ranks.run(2, stopped, folder, students, tmp_path / "more", replicas(settings, 2), 5)
    ranks.run(next_ranks, tune, folder, students, tmp_path / "more", replicas(settings, next_ranks))
    assert_same(states(folder, tmp_path / "one"), states(folder, tmp_path / "more"), 5e-5)


def test_every_replica_finds_its_own_rollouts_again(folder, students, tmp_path):
    settings = replicas(SETTINGS.model_copy(update={"steps": 8, "measured_plans": 0, "checkpoint_every": 4}), 2)
    ranks.run(2, tune, folder, students, tmp_path / "whole", settings)
    ranks.run(2, stopped, folder, students, tmp_path / "stopped", settings, 5)
    ranks.run(2, tune, folder, students, tmp_path / "stopped", settings)
    assert_same(states(folder, tmp_path / "whole"), states(folder, tmp_path / "stopped"), 1e-5)


def bytes_held(folder, students, out, world):
    """What a rank holds after a step: weights, gradients, optimizer state, each as this rank has it."""
    settings = replicas(SETTINGS.model_copy(update={"rollout_share": 0.0}), world)
    dims = ParallelDims.join(1, world)
    with torch.enable_grad():
        trainer = _Trainer(
            Teacher(folder),
            MemorySamples(256),
            DistilledReplacements(files_in(students), VARIANTS, SENSITIVITY),
            settings,
            RunContext(out, out / "checkpoints", dims=dims),
            Sampling(steps=8),
        )
        trainer.train_step()
    tensors = {id(p): p for p in trainer.model.transformer.parameters()}
    tensors |= {id(p): p for r in trainer.model.switch.files for p in trainer.model.module(r).parameters()}
    tensors |= {id(p.grad): p.grad for p in trainer.state.parameters.values() if p.grad is not None}
    tensors |= {id(t): t for s in trainer.state.optimizer.state.values() for t in s.values()}
    held = sum(local(t).numel() * t.element_size() for t in tensors.values())
    (out / f"{world}-{dims.dp_rank}").write_text(str(held))


def test_what_a_rank_holds_falls_with_the_number_of_ranks(folder, students, tmp_path):
    bytes_held(folder, students, tmp_path, 1)
    ranks.run(2, bytes_held, folder, students, tmp_path, 2)
    alone, *halves = (int((tmp_path / name).read_text()) for name in ("1-0", "2-0", "2-1"))
    whole = Teacher(folder).transformer()
    blocks = sum(p.numel() for block in adapter_of(whole).blocks(whole) for p in block.parameters())
    small = 4 * (sum(p.numel() for p in whole.parameters()) - blocks)
    for half in halves:
        assert half - small == pytest.approx((alone - small) / 2, rel=0.02)


@pytest.mark.parametrize("feature_loss", [True, False])
def test_recomputed_activations_give_the_same(folder, students, tmp_path, feature_loss):
    settings = SETTINGS.model_copy(update={"steps": 4, "feature_loss": feature_loss, "activation_checkpointing": False})
    tune(folder, students, tmp_path / "kept", settings)
    tune(folder, students, tmp_path / "again", settings.model_copy(update={"activation_checkpointing": True}))
    assert_same(states(folder, tmp_path / "kept"), states(folder, tmp_path / "again"), 1e-5)


def test_a_fixed_plan_trains_its_entries_alone(folder, students, tmp_path):
    record = tune(folder, students, tmp_path, SETTINGS.model_copy(update={"plan": "0-1,3-5"}))
    row = record["plans"][2]
    assert record["fixed"] and row["plan"] == ["0-1", "3-5"] and row["after"] < 0.9 * row["before"]
    before, after = states(folder, students), states(folder, tmp_path)
    assert after.keys() == {Interval(0, 1), Interval(3, 5)}
    for entry in after:
        assert not all(torch.equal(before[entry][name], after[entry][name]) for name in before[entry])
    # Its parts, one each here, are measured too: what is trained for the whole need not be better for them.
    assert {tuple(row["plan"]) for row in record["plans"]} >= {("0-1",), ("3-5",)}


def test_what_is_measured_in_training_is_what_the_files_do(folder, tmp_path):
    """With low-rank modulations too: a student is trained with and without them, and must not use an old product."""
    plan, samples, teacher = (
        [Interval(3, 5), PrunedFfn(2, 50), LowRankModulation()],
        MemorySamples(256),
        Teacher(folder),
    )
    settings = Distillation(steps=1, batch_size=8, learning_rate=1e-12, init="first", ridge=1.0, train="all")
    with torch.enable_grad():
        distil(teacher, samples, plan, settings, RunContext(tmp_path / "s", tmp_path / "c"), 1e-2)
    tuning = SETTINGS.model_copy(update={"steps": 60, "plan": "variants", "measured_plans": 0})
    variants = {"one": plan, "bare": plan[:1]}
    row = tune(folder, tmp_path / "s", tmp_path / "tuned", tuning, variants=variants)["plans"][0]
    switch = VariantSwitcher(teacher, files_in(tmp_path / "s") | files_in(tmp_path / "tuned"))
    inputs = samples.batch(samples.ids("validation"))
    errors = variant_errors(teacher.transformer(), switch, {"one": plan}, inputs)
    assert row["after"] < 0.9 * row["before"]
    assert row["after"] == pytest.approx(errors["one"].overall(), rel=1e-3)


def test_the_loss_is_the_velocitys_relative_squared_error(folder, students, tmp_path):
    settings = SETTINGS.model_copy(update={"steps": 1, "plan": "0-1,3-5", "rollout_share": 0.0})
    told = tune(folder, students, tmp_path, settings)["curve"][0]["loss"]
    samples, plan = MemorySamples(256), [Interval(0, 1), Interval(3, 5)]
    inputs = samples.batch(batch_of(0, samples.ids("train"), settings.batch_size, 0))
    teacher = Teacher(folder)
    model = teacher.transformer()
    with torch.no_grad():
        target = model(**inputs)[0]
        VariantSwitcher(teacher, files_in(students))(model, plan)
        expected = (model(**inputs)[0] - target).square().sum() / target.square().sum()
    assert told == pytest.approx(expected.item(), rel=1e-3)


def test_features_are_the_image_streams_behind_every_block(folder, students):
    teacher, plan = Teacher(folder), [Interval(3, 5), LinearFfn(0)]
    model = VariantModel(teacher, files_in(students), {}, "cpu", torch.float32, activation_checkpointing=True)
    inputs, adapter = MemorySamples().batch([0, 1]), teacher.adapter
    made = []
    with torch.no_grad():
        model.velocity(plan, inputs, training=True, features=made)
        blocks = adapter.blocks(model.transformer)
        streams, context = embed(model.transformer, inputs)
        expected = [run_blocks(adapter, blocks[: number + 1], streams, context).img for number in range(6)]
        model.velocity(plan, inputs)
    assert len(made) == 6
    assert all(torch.allclose(x, y, atol=1e-5) for x, y in zip(made, expected, strict=True))


def test_the_error_of_features_is_the_mean_of_shares_outside_intervals():
    g = torch.Generator().manual_seed(0)
    wanted = [10.0**block * torch.randn(2, 3, 4, generator=g) for block in range(5)]
    features = [x + 0.1 * torch.randn(2, 3, 4, generator=g) for x in wanted]
    total, divisor = feature_error(features, wanted, [Interval(1, 3), LinearFfn(0)], ParallelDims())
    shares = [float((x - y).square().sum() / y.square().sum()) for x, y in zip(features, wanted, strict=True)]
    assert float(total / divisor) == pytest.approx((shares[0] + shares[3] + shares[4]) / 3, rel=1e-5)


def test_features_are_trained_beside_the_velocity(folder, students, tmp_path):
    """The streams within the model come nearer to the teacher's than those that the velocity alone asks for."""
    settings = SETTINGS.model_copy(update={"steps": 60, "plan": "0-1,3-5", "measured_plans": 0})
    samples, plan, errors = MemorySamples(256), [Interval(0, 1), Interval(3, 5)], {}
    inputs = samples.batch(samples.ids("validation"))
    for feature_loss in (False, True):
        out = tmp_path / str(feature_loss)
        tune(folder, students, out, settings.model_copy(update={"feature_loss": feature_loss}))
        model = VariantModel(Teacher(folder), files_in(students) | files_in(out), {}, "cpu", torch.float32, False)
        made, wanted = [], []
        with torch.no_grad():
            model.velocity((), inputs, features=wanted)
            model.velocity(plan, inputs, features=made)
        errors[feature_loss] = float(feature_error(made, wanted, plan, ParallelDims())[0])
    assert errors[True] < 0.9 * errors[False]
