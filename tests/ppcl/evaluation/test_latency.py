"""What replacements save of a step's time, by a clock that counts the products of linear maps."""

import pytest
import torch
from torch import nn

from ppcl.evaluation import latency as timing
from ppcl.models.teacher import Teacher
from ppcl.replacements import Interval, LinearFfn
from ppcl.replacements.linear_ffn import LinearFfnMaps
from ppcl.replacements.switcher import VariantSwitcher
from tests import made_result
from tests.samples import MemorySamples


@pytest.fixture
def products(monkeypatch):
    """A clock of one millionth of a second a product."""
    now = [0]

    def count(module, given, made):
        if isinstance(module, nn.Linear):
            now[0] += module.weight.numel() * (made.numel() // made.shape[-1])

    monkeypatch.setattr(timing, "_synchronized", lambda: 1e-6 * now[0])
    handle = nn.modules.module.register_module_forward_hook(count)
    yield now
    handle.remove()


@pytest.fixture
def switch(teacher_folder):
    teacher = Teacher(teacher_folder)
    modules = {i: made_result.student(teacher, i, affine=False) for i in (Interval(0, 1), Interval(2, 4))}
    block = teacher.adapter.blocks(teacher.transformer())[5]
    parts = teacher.adapter.parts_of(teacher.transformer(), 5, block)
    modules |= {LinearFfn(number): LinearFfnMaps.new(parts, 32) for number in (2, 5)}
    switch = VariantSwitcher(teacher, dict.fromkeys(modules))
    switch._loaded.update({(entry, False, "cpu", torch.float32): module for entry, module in modules.items()})
    return switch


def test_an_interval_saves_its_blocks_but_one_and_an_ffn_what_its_maps_do_not_take(products, switch):
    model, inputs = switch.teacher.transformer(), MemorySamples(4).batch(range(4))
    times = timing.measure_latencies(model, switch, inputs)
    before = products[0]
    model(**inputs)
    assert times.total == pytest.approx(products[0] - before, abs=2)
    tokens, width = {"img": 4 * 16, "txt": 4 * 7}, 32
    ffn = sum(8 * width * width * n for n in tokens.values())
    # Queries, keys, values and outputs of both streams, the FFNs, and two modulations a sample.
    block = sum(4 * width * width * n for n in tokens.values()) + ffn + 2 * 4 * 6 * width * width
    assert times.alone[Interval(0, 1)] == pytest.approx(block, abs=2)
    assert times.alone[Interval(2, 4)] == pytest.approx(2 * block, abs=2)
    # Its modulation is three chunks of six, its FFNs one map each.
    saved = ffn * 7 / 8 + 2 * 4 * 3 * width * width
    assert times.alone[LinearFfn(2)] == times.alone[LinearFfn(5)] == pytest.approx(saved, abs=2)
    assert times.speedup([Interval(0, 1), LinearFfn(5)]) == pytest.approx(
        times.total / (times.total - block - saved), rel=1e-6
    )


def test_whole_plans_are_timed_and_the_teacher_is_left(products, switch):
    model, inputs = switch.teacher.transformer(), MemorySamples(4).batch(range(4))
    blocks = list(model.transformer_blocks)
    times = timing.measure_latencies(model, switch, inputs)
    plan = [Interval(2, 4), LinearFfn(5)]
    alone, on = map(min, timing.forward_seconds(model, switch, [[], plan], inputs))
    assert alone / on == pytest.approx(times.speedup(plan), rel=1e-6)
    assert all(a is b for a, b in zip(model.transformer_blocks, blocks, strict=True))


def test_switching_is_not_timed(products, switch):
    """A switch that takes long, such as one that builds a plan's blocks anew, makes no plan slower."""
    model, inputs = switch.teacher.transformer(), MemorySamples(4).batch(range(4))
    plan = [Interval(2, 4)]
    quick = timing.forward_seconds(model, switch, [[], plan], inputs)

    def slow(transformer, entries):
        products[0] += 10**9
        switch(transformer, entries)

    slowly = timing.forward_seconds(model, slow, [[], plan], inputs)
    assert [x for one in slowly for x in one] == pytest.approx([x for one in quick for x in one])
