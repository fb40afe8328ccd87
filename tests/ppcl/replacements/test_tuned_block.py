"""Tuned blocks in a switcher: names, the limit of memory, devices that do not hold all weights, and what is no plan."""

import pytest
import torch

from ppcl.config.schema import Memory
from ppcl.errors import UserError
from ppcl.models.placement import place
from ppcl.models.teacher import Teacher
from ppcl.replacements import Plan, TunedBlock, parse_name, parse_replacement
from ppcl.replacements.io import load_replacement, stored_sizes
from ppcl.replacements.parameter_counts import parameter_counts
from ppcl.replacements.switcher import VariantSwitcher
from tests import tiny
from tests.ppcl.export.replacements import replacements, trained_in_full

PLAN = Plan.parse("0-1,ffn:2,modulations")


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    teacher = Teacher(tiny.qwen_pipeline(tmp_path_factory.mktemp("teacher") / "pipeline"))
    files = replacements(teacher, tmp_path_factory.mktemp("replacements"))
    return teacher, files, trained_in_full(teacher, files, PLAN, tmp_path_factory.mktemp("tuned"))


@torch.no_grad()
def velocity(transformer):
    return transformer(**tiny.inputs(transformer), return_dict=False)[0]


def test_a_file_names_it_and_no_plan_does(made):
    _, files, tuned = made
    assert {parse_name(path.stem) for path in tuned.files.values()} == {TunedBlock(n) for n in (2, 3, 4, 5)}
    assert not any(isinstance(one, TunedBlock) for one in files)
    with pytest.raises(UserError, match="'3-5,block:7' is not a plan"):
        Plan.parse("3-5,block:7")
    with pytest.raises(UserError, match="'block:7' is not a replacement"):
        parse_replacement("block:7")


def test_its_file_holds_what_the_plan_runs_and_a_plan_keeps_its_size(made):
    teacher, files, tuned = made
    names = {n: stored_sizes(tuned.files[TunedBlock(n)]) for n in (2, 3)}
    assert not any("mlp" in name for name in names[2]) and any("mlp" in name for name in names[3])
    assert load_replacement(tuned.files[TunedBlock(2)], teacher).state_dict().keys() == names[2].keys()
    counts = parameter_counts(teacher, files | tuned.files)
    assert counts.parameters([*PLAN, *tuned.files]) == counts.parameters(PLAN)


def test_a_limit_of_memory_counts_it_and_it_is_read_again(made):
    teacher, files, tuned = made
    transformer, free = teacher.transformer(), VariantSwitcher(teacher, files, tuned)
    free(transformer, PLAN)
    expected, size = velocity(transformer), free.bytes_in_memory
    assert size > sum(4 * n for path in tuned.files.values() for n in stored_sizes(path).values())
    with pytest.raises(UserError, match="the plan 0-1,modulations,ffn:2 needs .* GB of replacements, more than"):
        VariantSwitcher(teacher, files, tuned, size - 1)(teacher.transformer(), PLAN)
    switch, transformer = VariantSwitcher(teacher, files, tuned, size), teacher.transformer()
    for plan in (PLAN, Plan.parse("2-3"), PLAN):
        assert not switch.in_memory(transformer, plan)
        switch(transformer, plan)
        assert switch.bytes_in_memory <= size
    torch.testing.assert_close(velocity(transformer), expected)


@pytest.mark.parametrize("mode", ["model", "group"])
def test_it_comes_and_goes_with_the_other_weights(made, mode):
    teacher, files, tuned = made
    switch, transformer = VariantSwitcher(teacher, files, tuned), teacher.transformer()
    switch(transformer, PLAN)
    expected = velocity(transformer)
    pipeline = teacher.pipeline()
    place(pipeline, "cpu", Memory(offload=mode))
    VariantSwitcher(teacher, files, tuned)(pipeline.transformer, PLAN)
    torch.testing.assert_close(velocity(pipeline.transformer), expected)
