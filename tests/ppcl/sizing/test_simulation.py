"""The simulation of many GPUs: counts against real runs, times against recursion, layouts against the estimate."""

import json
import re
import warnings
from functools import cache

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from ppcl.config.schema import Probes
from ppcl.detection import fit_probes as probes_run
from ppcl.errors import UserError
from ppcl.linalg import Moments
from ppcl.models import adapter_of, embed, run_blocks
from ppcl.models.teacher import Teacher
from ppcl.sizing import Device, Model
from ppcl.sizing.memory import intervals, longest_dividing
from ppcl.sizing.model import model_of
from ppcl.sizing.simulation import Work, distillation, distillation_on, distillation_work, play, probes
from ppcl.sizing.table import DISTILLATION, PROBES, step_rows
from ppcl.training.pipeline import IN_FLIGHT
from ppcl.training.run_context import RunContext
from tests import tiny
from tests.conftest import REPOSITORY
from tests.samples import MemorySamples

DEVICE = Device()
GPUS = (8, 16, 32, 64, 128, 256, 512)


@pytest.fixture(scope="module")
def qwen():
    with warnings.catch_warnings(action="ignore"):
        return model_of("qwen-image", 1024, 1024)


@pytest.fixture(scope="module")
def small(teacher_folder):
    """The tiny teacher with 16 image tokens and 7 of text, as `MemorySamples` has them."""
    teacher = Teacher(teacher_folder)
    return Model.of("tiny", teacher.adapter.transformer, teacher.config(), 7, 64, 64)


def _products(block, call):
    """Of all linear maps, and of one attention over all tokens, of one forward."""
    found = []
    handles = [
        m.register_forward_hook(lambda m, args, made: found.append(2 * made.numel() * m.in_features))
        for m in block.modules()
        if isinstance(m, nn.Linear)
    ]
    call()
    for handle in handles:
        handle.remove()
    return sum(found)


@torch.no_grad()
def test_operations_of_a_block_are_its_products_and_its_attention(small):
    model = tiny.qwen_transformer()
    adapter, samples = adapter_of(model), MemorySamples()
    inputs = samples.batch([0]) | {"encoder_hidden_states_mask": None}
    streams, context = embed(model, inputs)
    block = adapter.blocks(model)[2]
    linear = _products(block, lambda: run_blocks(adapter, [block], streams, context))
    assert small.width == 32 and small.tokens == 23
    assert small.flops == (linear + 2 * 2 * 23**2 * 32,) * 6
    # Two products for one in the backward pass, but for the gradients of a block's input; attention counts 5 for 2.
    least, most = (linear * n + 2 * 23**2 * 32 * 7 for n in (2, 3))
    assert all(least < flops <= most for flops in small.trained_flops)


def test_operations_of_sums_are_those_of_a_real_fit(teacher_folder, small, tmp_path, monkeypatch):
    class Whole(MemorySamples):
        def batch(self, *args, **named):
            return super().batch(*args, **named) | {"encoder_hidden_states_mask": None}

    counted, stock = [], Moments._add

    def add(self, *tokens):
        with FlopCounterMode(display=False) as counter:
            stock(self, *tokens)
        counted.append(counter.get_total_flops())

    monkeypatch.setattr(Moments, "_add", add)
    samples = Whole()
    probes_run.fit_probes(
        Teacher(teacher_folder),
        samples,
        Probes(batch_size=8),
        RunContext(tmp_path, tmp_path),
        4096,
    )
    assert sum(counted) == len(samples.ids("train")) * sum(small.sums_flops)


def _recursive(works, send, steps):
    """The same course told by what each event waits for."""

    @cache
    def asked(step, rank):
        return (done(step - 1, rank) if step else 0.0) + works[rank].before

    @cache
    def sent(step, rank):
        return max(asked(step, rank), taken(step, rank - 1) if rank else 0.0) + works[rank].blocks

    @cache
    def taken(step, rank):
        return max(sent(step, rank), asked(step, rank + 1), taken(step - 1, rank) if step else 0.0) + send[rank]

    @cache
    def done(step, rank):
        behind = taken(step - IN_FLIGHT, rank) if step >= IN_FLIGHT and rank < len(works) - 1 else 0.0
        return max(sent(step, rank), behind) + works[rank].after

    return [[done(step, rank) for rank in range(len(works))] for step in range(steps)]


def test_a_pipeline_is_played_as_its_events_wait_for_each_other():
    rng = np.random.default_rng(0)
    for ranks in (1, 2, 3, 5):
        works = [Work(*rng.uniform(0, 1, 3), compute=0.0) for _ in range(ranks)]
        send = rng.uniform(0, 2, ranks - 1).tolist()
        assert np.allclose(play(works, send, 12), _recursive(works, send, 12))


@pytest.mark.parametrize("slow", [0, 1, 2])
def test_a_pipeline_is_as_fast_as_its_slowest_rank_or_link(slow):
    works = [Work(0.0, 1.0, 2.0 + (rank == slow), compute=0.0) for rank in range(3)]
    done = play(works, [0.0, 0.0], 40)
    assert np.isclose(done[39][2] - done[20][2], 19 * 4.0)
    assert np.isclose(done[0][2], 3 * 1.0 + works[2].after)
    done = play(works, [0.0, 9.0], 40)
    assert done[39][2] - done[20][2] >= 19 * 9.0
    # One whose receiver is slow is ahead of it by the sends it may have under way, and no more.
    done = play([works[0], Work(0.0, 9.0, 0.0, compute=0.0)], [0.0], 40)
    assert all(done[k - IN_FLIGHT - 1][1] <= done[k][0] < done[k][1] for k in range(IN_FLIGHT + 1, 40))


def test_ranks_share_the_work_of_one_and_nothing_else(qwen):
    plan = intervals(qwen, 4)
    alone = distillation_work(qwen, plan, 16, 0, 1, 1, DEVICE)
    parts = [distillation_work(qwen, plan, 16, stage, 8, 1, DEVICE) for stage in range(8)]
    assert np.isclose(sum(p.compute - p.before for p in parts), alone.compute - alone.before)
    assert np.isclose(sum(p.weights for p in parts), alone.weights)
    assert alone.reduce == 0 and all(p.reduce == 0 for p in parts)
    # By hand: 60 blocks forward, 15 students forward and backward with two affine maps each.
    rate = 0.4 * 989e12
    students = 15 * (qwen.trained_flops[0] + 6 * 4608 * 3072**2)
    assert np.isclose(alone.compute * rate, 16 * (qwen.rest_flops + sum(qwen.flops) + students))


def test_more_ranks_than_the_plan_has_segments_become_replicas(qwen):
    plan = intervals(qwen, 4)
    for gpus in GPUS:
        step = distillation(qwen, plan, 64, gpus, DEVICE)
        assert step.pp * step.dp == gpus and step.pp <= 15 and 0 < step.efficiency < 1
    # Of the meshes that 64 GPUs can be, those that fit into their memory.
    others = [distillation_on(qwen, plan, 64, pp, 64 // pp, DEVICE) for pp in (2, 4, 8)]
    assert distillation(qwen, plan, 64, 64, DEVICE).step == min(other.step for other in others)
    assert probes(qwen, 32, 512, DEVICE).pp == 60 and probes(qwen, 32, 512, DEVICE).binds == "number of blocks"
    with pytest.raises(
        UserError,
        match="1024 GPUs: .* has 8 ranks, and each of its 128 replicas needs a sample of a step, which has 16",
    ):
        distillation(qwen, plan, 16, 1024, DEVICE)
    with pytest.raises(UserError, match="1 GPUs: a rank needs .* GB, a device has 80 GB"):
        distillation(qwen, plan, 16, 1, DEVICE)


def test_what_binds_is_what_was_made_slow(qwen):
    plan = intervals(qwen, 4)

    def binds(batch=64, gpus=64, **rates):
        return distillation(qwen, plan, batch, gpus, Device(**rates)).binds

    assert binds(network=1e15, latency=0.0) == "compute"
    assert binds(network=1e10) == "all-reduce"
    assert binds(gpus=8, batch=16, network=1e15, memory=1e11) == "memory"
    assert binds(gpus=8, batch=16, link=1e8) == "streams"


def test_the_sizing_page_holds_what_the_simulation_computes(qwen):
    page = (REPOSITORY / "cluster" / "README.md").read_text()
    found = [re.sub(r" *\| *", "|", line.strip()) for line in page.splitlines()]
    plan = intervals(qwen, 4)
    fixed = [distillation(qwen, plan, 64, gpus, DEVICE) for gpus in GPUS]
    grown = [distillation(qwen, plan, 16 * (gpus // longest_dividing(qwen, plan, gpus)), gpus, DEVICE) for gpus in GPUS]
    fits = [probes(qwen, Probes().batch_size, gpus, DEVICE) for gpus in GPUS]
    for row in step_rows(fixed, DISTILLATION) + step_rows(grown, DISTILLATION) + step_rows(fits, PROBES):
        assert "|" + "|".join(row) + "|" in found, row


def test_the_simulation_tells_what_was_measured():
    """`benchmarks/scaling.py` left its machine's rates, and what real ranks did with them."""
    from benchmarks.scaling import device_of, predicted

    scaling = json.loads((REPOSITORY / "benchmarks" / "results" / "scaling.json").read_text())
    settings = scaling["settings"]
    model = Model.of(
        "random",
        "QwenImageTransformer2DModel",
        settings["config"],
        settings["text_tokens"],
        *[16 * settings["side"]] * 2,
    )
    device = device_of(scaling["rates"], model, settings["blocks"])
    held = 0
    for key, run in scaling["runs"].items():
        told = predicted(key, model, device, settings["batch"], settings["blocks"], settings["cores"])
        if told is not None:
            held += 1
            assert abs(told / run["times_one"] - 1) < 0.15, (key, told, run["times_one"])
    assert held >= 8
