"""Replacements of every kind in a transformer whose blocks come and go, and a bound on those in memory."""

import gc
from weakref import ref

import numpy as np
import pytest
import torch

from ppcl.config.schema import Memory
from ppcl.errors import UserError
from ppcl.evaluation.latency import forward_seconds
from ppcl.evaluation.velocity_error import sensitivities, variant_errors
from ppcl.models.placement import place
from ppcl.models.teacher import Teacher
from ppcl.models.weight_cache import tensor_bytes
from ppcl.replacements import Interval, LinearFfn, LowRankModulation, PrunedFfn, TextRun, switcher
from ppcl.replacements.io import files_in, save_replacement
from ppcl.replacements.linear_ffn import LinearFfnMaps
from ppcl.replacements.low_rank_modulation import fit_basis
from ppcl.replacements.pruned_ffn import PrunedFfnMaps
from ppcl.replacements.switcher import VariantSwitcher
from ppcl.replacements.text_projectors import TextProjectors
from tests import made_result, tiny
from tests.ppcl.replacements.test_modulation import WIDTH, randomised
from tests.samples import MemorySamples

PLANS = [
    (),
    (Interval(0, 1),),
    (TextRun(2, 4), LinearFfn(3)),
    (Interval(0, 1), TextRun(2, 4), PrunedFfn(5, 50), LowRankModulation()),
    (LowRankModulation(),),
    (LinearFfn(3), PrunedFfn(5, 50)),
]


@pytest.fixture(scope="module")
def teacher(teacher_folder):
    return Teacher(teacher_folder)


@pytest.fixture(scope="module")
def files(teacher, tmp_path_factory):
    """One replacement of every kind."""
    folder = tmp_path_factory.mktemp("replacements")
    model, adapter, samples = teacher.transformer(), teacher.adapter, MemorySamples()
    blocks = adapter.blocks(model)
    parts = {number: adapter.parts_of(model, number, blocks[number]) for number in range(6)}
    modules = {
        Interval(0, 1): made_result.student(teacher, Interval(0, 1), affine=True),
        TextRun(2, 4): randomised(TextProjectors(TextRun(2, 4), WIDTH, True)),
        LinearFfn(3): randomised(LinearFfnMaps.new(parts[3], WIDTH)),
        PrunedFfn(5, 50): PrunedFfnMaps.new(adapter, blocks[5], parts[5], 50),
        LowRankModulation(): fit_basis(model, samples, np.arange(4), 64, 1e-4),
    }
    for replacement, module in modules.items():
        save_replacement(module, replacement, adapter, folder / f"{replacement.name}.safetensors")
    return files_in(folder)


@pytest.fixture(autouse=True)
def _aligned(monkeypatch):
    """Replacements, too, are where PyTorch puts them; see `tiny.aligned`."""
    load = switcher.load_replacement
    monkeypatch.setattr(switcher, "load_replacement", lambda *arguments: tiny.aligned(load(*arguments)))


@torch.no_grad()
def velocity(switch, model, plan):
    switch(model, plan)
    return model(**tiny.inputs(model), return_dict=False)[0]


def on_the_device_while_they_run(cache, modules):
    """Have leaf modules check that the weights which they use are copies on the device."""

    def check(module, _):
        assert all(cache.holds(tensor) for tensor in module._parameters.values() if tensor is not None)

    for module in modules:
        for below in module.modules():
            below.register_forward_pre_hook(check)


@pytest.mark.parametrize("mode", ["model", "group"])
def test_every_plan_gives_the_same_bits_in_any_order(teacher, files, mode):
    plain, model = VariantSwitcher(teacher, files), tiny.aligned(teacher.transformer())
    expected = {plan: velocity(plain, model, plan) for plan in PLANS}
    assert len({made.numpy().tobytes() for made in expected.values()}) == len(PLANS)

    pipeline, switch = tiny.aligned(teacher.pipeline()), VariantSwitcher(teacher, files)
    cache = place(pipeline, "cpu", Memory(offload=mode)).cache
    on_the_device_while_they_run(cache, switch.blocks(pipeline.transformer))
    limit = max(cache.limit, max(tensor_bytes(switch.module(r, "cpu", torch.float32)) for r in files))
    for plan in [*PLANS, *reversed(PLANS), *PLANS]:
        assert torch.equal(velocity(switch, pipeline.transformer, plan), expected[plan]), plan
        assert cache.held <= limit
    cache.clear()
    # What the host has is in one storage still: a modulation of which some chunks are computed is a part of the whole.
    (view,) = switch.replacements(pipeline.transformer, [LinearFfn(3)]).values()
    assert view.img_mod[1].kept[0].weight.untyped_storage().data_ptr() == (
        switch.blocks(pipeline.transformer)[3].img_mod[1].weight.untyped_storage().data_ptr()
    )


@pytest.mark.parametrize("mode", ["model", "group"])
def test_measurements_that_run_blocks_one_by_one_give_the_same(teacher, files, mode):
    inputs = MemorySamples(4).batch(range(4))
    plain = VariantSwitcher(teacher, files)
    pipeline, switch = tiny.aligned(teacher.pipeline()), VariantSwitcher(teacher, files)
    cache = place(pipeline, "cpu", Memory(offload=mode)).cache
    plans = {str(index): plan for index, plan in enumerate(PLANS)}
    expected = sensitivities(tiny.aligned(teacher.transformer()), plain, inputs)
    made = sensitivities(pipeline.transformer, switch, inputs)
    assert all(torch.equal(made[r].error, expected[r].error) for r in files) and cache.copied
    expected = variant_errors(tiny.aligned(teacher.transformer()), plain, plans, inputs)
    made = variant_errors(pipeline.transformer, switch, plans, inputs)
    assert all(torch.equal(made[name].error, expected[name].error) for name in plans)
    assert all(min(seconds) > 0 for seconds in forward_seconds(pipeline.transformer, switch, PLANS, inputs))


@pytest.mark.parametrize("mode", ["none", "model", "group"])
def test_replacements_in_memory_stay_within_the_limit(teacher, files, mode):
    plain, model = VariantSwitcher(teacher, files), tiny.aligned(teacher.transformer())
    expected = {plan: velocity(plain, model, plan) for plan in PLANS}
    limit = max(sum(tensor_bytes(plain.module(r, "cpu", torch.float32)) for r in plan) for plan in PLANS)
    assert limit < plain.bytes_in_memory
    pipeline, switch = tiny.aligned(teacher.pipeline()), VariantSwitcher(teacher, files, limit=limit)
    place(pipeline, "cpu", Memory(offload=mode))
    for plan in [*PLANS, *reversed(PLANS)]:
        assert torch.equal(velocity(switch, pipeline.transformer, plan), expected[plan])
        assert switch.bytes_in_memory <= limit


def test_what_is_forgotten_is_gone_and_what_was_used_last_stays(teacher, files):
    model, plain = teacher.transformer(), VariantSwitcher(teacher, files)
    sizes = {r: tensor_bytes(plain.module(r, "cpu", torch.float32)) for r in files}
    small, smaller, large = LinearFfn(3), TextRun(2, 4), Interval(0, 1)
    switch = VariantSwitcher(teacher, files, limit=sizes[large] + max(sizes[small], sizes[smaller]))
    switch(model, [smaller])
    gone = ref(switch.module(smaller, "cpu", torch.float32))
    for plan in ([small], [small, large]):
        switch(model, plan)
    stays = switch.module(small, "cpu", torch.float32)
    gc.collect()
    assert gone() is None and not switch.in_memory(model, [smaller]) and switch.in_memory(model, [small, large])
    switch(model, [small])
    assert switch.module(small, "cpu", torch.float32) is stays


def test_a_plan_larger_than_the_limit_is_refused_and_nothing_is_changed(teacher, files):
    model = teacher.transformer()
    switch = VariantSwitcher(teacher, files, limit=30_000)
    before = velocity(switch, model, [LinearFfn(3)])
    with pytest.raises(UserError, match=r"the plan 0-1 needs .* GB of replacements, more than memory.replacements_gb"):
        switch(model, [Interval(0, 1)])
    assert torch.equal(model(**tiny.inputs(model), return_dict=False)[0], before)
