"""One plan trained in full: the teacher's own blocks learn with it, on any number of ranks, for this plan alone."""

import pytest
import torch

from ppcl.config.schema import Distillation, Finetuning
from ppcl.errors import UserError
from ppcl.evaluation.velocity_error import variant_errors
from ppcl.models.teacher import Teacher
from ppcl.replacements import LowRankModulation, Plan, PrunedHeads, TunedBlock
from ppcl.replacements.finetuned_selection import FinetunedSelection
from ppcl.replacements.io import files_in
from ppcl.replacements.switcher import VariantSwitcher
from ppcl.training.distillation.trainer import distil
from ppcl.training.finetuning.tuned_blocks import tuned_blocks
from ppcl.training.run_context import RunContext
from tests import ranks, tiny
from tests.ppcl.training.finetuning.test_trainer import (
    PLAN,
    SENSITIVITY,
    SETTINGS,
    assert_same,
    losses,
    replicas,
    states,
    stopped,
    tune,
)
from tests.samples import MemorySamples

DEEP, WIDE = "3-5,ffn:0,heads:1/50,ffn:2/50", "modulations,text:1-3,ffn:2,ffn:0"
VARIANTS = {"teacher": [], "deep": Plan.parse(DEEP), "wide": Plan.parse(WIDE), "folded": Plan.parse("modulations")}
FFNS = ["img_mlp.net.0.proj", "img_mlp.net.2", "txt_mlp.net.0.proj", "txt_mlp.net.2"]


def in_full(plan, **values):
    given = {"steps": 6, "rollout_share": 0.0, "measured_plans": 2, "train": "all", "plan": plan, "ema": 0.9}
    return SETTINGS.model_copy(update=given | values)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tiny.qwen_pipeline(tmp_path_factory.mktemp("teacher") / "pipeline")


@pytest.fixture(scope="module")
def students(folder, tmp_path_factory):
    out = tmp_path_factory.mktemp("students")
    settings = Distillation(steps=1, batch_size=8, learning_rate=1e-12, init="first", ridge=1.0, train="all")
    with torch.enable_grad():
        plan = [*PLAN, PrunedHeads(1, 50), LowRankModulation()]
        distil(Teacher(folder), MemorySamples(256), plan, settings, RunContext(out, out / "c"), 1e-2)
    return out


def test_what_a_plan_does_not_run_of_a_block_is_left_out(folder, students):
    def blocks(plan):
        files = {one: path for one, path in files_in(students).items() if one in Plan.parse(plan)}
        return {one.block: left_out for one, left_out in tuned_blocks(Teacher(folder), files).items()}

    assert blocks("0-1") == {2: [], 3: [], 4: [], 5: []}
    attention = {f"attn.{name}" for name in ("to_q", "to_k", "to_v", "to_out.0", "add_q_proj", "add_k_proj")}
    deep = blocks(DEEP)
    assert (deep[0], deep[2]) == (FFNS, FFNS) and set(deep[1]) == attention | {"attn.add_v_proj", "attn.to_add_out"}
    # Of the blocks inside of the run the text's output, FFN and modulation are gone.
    wide = blocks(WIDE)
    assert wide[0] == FFNS and wide[1] == [] == wide[4]
    assert set(wide[3]) == {"attn.to_add_out", "txt_mod.1", *FFNS[2:]} and set(wide[2]) == set(wide[3]) | set(FFNS)


@pytest.mark.parametrize("plan", ["deep", "wide", "folded"])
def test_two_ranks_have_the_losses_of_one_process(folder, students, tmp_path, plan):
    tune(folder, students, tmp_path / "one", in_full(plan), None, VARIANTS)
    ranks.run(2, tune, folder, students, tmp_path / "two", replicas(in_full(plan), 2), None, VARIANTS)
    assert losses(tmp_path / "two") == pytest.approx(losses(tmp_path / "one"), rel=1e-5)
    assert_same(states(folder, tmp_path / "one"), states(folder, tmp_path / "two"), 5e-5)


def test_a_checkpoint_of_two_ranks_is_gone_on_from_by_one(folder, students, tmp_path):
    settings = in_full(DEEP, checkpoint_every=2)
    tune(folder, students, tmp_path / "whole", settings)
    ranks.run(2, stopped, folder, students, tmp_path / "more", replicas(settings, 2), 3)
    tune(folder, students, tmp_path / "more", settings)
    assert_same(states(folder, tmp_path / "whole"), states(folder, tmp_path / "more"), 5e-5)


@pytest.mark.parametrize("name", ["deep", "wide"])
def test_the_result_is_what_training_ended_with_and_for_that_plan_alone(folder, students, tmp_path, name):
    teacher, samples, plan = Teacher(folder), MemorySamples(256), VARIANTS[name]
    before = teacher.sha256()
    record = tune(folder, students, tmp_path, in_full(name, steps=40, ema=0.0), None, VARIANTS)
    (row,) = record["plans"]
    assert record["fixed"] and record["train"] == "all"
    assert row["plan"] == list(map(str, plan)) and row["variant"] == name and row["taken"]
    assert row["after"] < 0.7 * row["before"]

    selection = FinetunedSelection.read(tmp_path, SENSITIVITY | {PrunedHeads(1, 50): 0.01})
    transformer = teacher.transformer()
    switch = VariantSwitcher(teacher, files_in(students), selection)
    inputs = samples.batch(samples.ids("validation"))
    error = variant_errors(transformer, switch, {"it": plan}, inputs)["it"].overall()
    assert error == pytest.approx(row["after"], rel=1e-4)
    own = teacher.adapter.blocks(teacher.transformer())
    for one, path in selection.files.items():
        if isinstance(one, TunedBlock):
            trained, given = states(folder, tmp_path)[one], own[one.block].state_dict()
            changed = [key for key, tensor in trained.items() if not torch.equal(tensor, given[key])]
            # What reads nothing of the text behind the last block has no gradient.
            assert len(changed) > 0.5 * len(trained), path
    assert all(not switch.finetuned(other) for other in VARIANTS.values() if other != plan)
    switch(transformer, ())
    assert Teacher(folder).sha256() == before
    assert all(torch.equal(a, b) for a, b in zip(transformer.parameters(), teacher.transformer().parameters()))


def test_recomputed_activations_and_less_precision_train_too(folder, students, tmp_path):
    tune(folder, students, tmp_path / "kept", in_full("wide"), None, VARIANTS)
    tune(folder, students, tmp_path / "again", in_full("wide", activation_checkpointing=True), None, VARIANTS)
    assert_same(states(folder, tmp_path / "kept"), states(folder, tmp_path / "again"), 1e-5)
    tune(folder, students, tmp_path / "short", in_full("wide", precision="bfloat16"), None, VARIANTS)
    assert losses(tmp_path / "short") == pytest.approx(losses(tmp_path / "kept"), rel=0.3)


def test_one_plan_must_be_named(folder, students, tmp_path):
    for plan in ("variants", "any"):
        with pytest.raises(ValueError, match=f"train is all, but plan is {plan}; name the one variant or plan"):
            Finetuning(train="all", plan=plan)
    with pytest.raises(UserError, match="'teacher' is neither variants nor any, no variant .deep, wide, folded."):
        tune(folder, students, tmp_path, in_full("teacher"), None, VARIANTS)
