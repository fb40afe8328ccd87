"""A plan with blocks that were trained with it: exported, plugged in, and with a LoRA, for every family."""

import diffusers
import pytest
import torch

from ppcl.export.variant_blocks import VariantBlocks
from ppcl.lora import AppliedLora, read_lora
from ppcl.replacements import Plan, TunedBlock
from ppcl.replacements.io import load_replacement
from ppcl.replacements.switcher import VariantSwitcher
from tests import tiny
from tests.ppcl.export.replacements import MAKERS, trained_in_full
from tests.ppcl.lora.loras import written

STOCK = "2-3"
PLANS = [STOCK, "0-1,ffn:2,modulations", "text:1-3,ffn:2/50,4-5,modulations", "ffn:0,ffn:2/50"]


@pytest.fixture(params=PLANS)
def in_full(every_kind, request, tmp_path):
    """A teacher, a plan, and a switcher by which that plan takes tuned blocks."""
    (teacher, files), plan = every_kind, Plan.parse(request.param)
    tuned = trained_in_full(teacher, files, plan, tmp_path)
    return teacher, plan, VariantSwitcher(teacher, files, tuned), VariantSwitcher(teacher, files)


@torch.no_grad()
def velocity(model):
    return model(**tiny.inputs(model), return_dict=False)[0]


def exported(blocks):
    model = blocks.empty_model()
    tensors = [blocks.tensors(group, torch.float32) for group in blocks.groups()]
    state = {name: tensor for group in tensors for name, tensor in group.items()}
    model.load_state_dict(state, strict=True, assign=True)
    return model, state


def test_an_export_is_the_tuned_variant_and_other_plans_never_see_its_blocks(in_full):
    teacher, plan, switch, plain = in_full
    inside, beside = teacher.transformer(), teacher.transformer()
    teachers = velocity(inside)
    switch(inside, plan)
    expected = velocity(inside)
    plain(beside, plan)
    assert (velocity(beside) - expected).abs().max() > 1e-3
    blocks = VariantBlocks(teacher, switch.plan_files(plan))
    torch.testing.assert_close(velocity(exported(blocks)[0]), expected, rtol=1e-5, atol=1e-6)
    for other in ("", "4-5", "modulations"):
        switch(inside, Plan.parse(other))
        plain(beside, Plan.parse(other))
        torch.testing.assert_close(velocity(inside), velocity(beside))
    switch(inside, ())
    torch.testing.assert_close(velocity(inside), teachers)


@pytest.mark.parametrize("in_full", [STOCK], indirect=True)
def test_a_stock_plan_stays_stock_and_has_the_trained_weights_bit_for_bit(in_full):
    teacher, plan, switch, _ = in_full
    files = switch.plan_files(plan)
    blocks = VariantBlocks(teacher, files)
    model, state = exported(blocks)
    assert type(model) is getattr(diffusers, teacher.adapter.transformer)
    tuned = {one.block: path for one, path in files.items() if isinstance(one, TunedBlock)}
    assert tuned.keys() == {place.number for place in blocks.places} - {2}
    for place in blocks.places:
        if place.number in tuned:
            for name, tensor in load_replacement(tuned[place.number], teacher).state_dict().items():
                assert torch.equal(state[place.prefix + name], tensor)


def test_a_lora_is_on_in_tuned_blocks_as_it_is_in_the_teachers(in_full, tmp_path):
    teacher, plan, switch, plain = in_full
    family = next(name for name in MAKERS if teacher.adapter.transformer.lower().startswith(name))
    lora = AppliedLora(read_lora(written(family, teacher, tmp_path), teacher), 0.7)
    inside = teacher.transformer()
    switch(inside, plan)
    without = velocity(inside)
    switch(inside, plan, lora)
    expected = velocity(inside)
    assert (expected - without).abs().max() > 1e-3
    assert str(switch.coverage(inside, plan, lora)) == str(plain.coverage(teacher.transformer(), plan, lora))
    made = velocity(exported(VariantBlocks(teacher, switch.plan_files(plan), lora))[0])
    torch.testing.assert_close(made, expected, rtol=1e-4, atol=1e-5)
