"""What a rank of distillation holds at each moment that can be its fullest, computed and counted.

With intervals side by side, as they are chosen, and with overlapping ones, as they are screened.
"""

import json
from collections import defaultdict

import pytest
import torch

from ppcl.models.teacher import Teacher
from ppcl.replacements import Interval, LinearFfn, PrunedFfn, PrunedHeads, TextRun
from ppcl.sizing.peak_memory import PeakMemory
from ppcl.sizing.stages import screening, students
from ppcl.training.distillation.segments import segment_of
from ppcl.training.distillation.trainer import distil
from ppcl.training.parallel_dims import ParallelDims
from ppcl.training.run_context import RunContext
from tests import ranks, sized

BLOCKS = range(6)
FFNS = [
    *(LinearFfn(b) for b in BLOCKS),
    *(PrunedFfn(b, percent) for b in BLOCKS for percent in (50, 25, 12)),
]
PLANS = {
    "students": [*(kind(b, b + 1) for kind in (Interval, TextRun) for b in (0, 2, 4)), *FFNS],
    "screening": [*(kind(b, b + 1) for kind in (Interval, TextRun) for b in (0, 1, 3, 4)), *FFNS],
    "heads": [*(Interval(b, b + 1) for b in (0, 2, 4)), *(PrunedHeads(b, p) for b in BLOCKS for p in (75, 50))],
}
STEPS = 2
NO_WIDTH = {"text": False, "low_rank_modulations": False, "linear_ffns": 0, "ffn_keep_percents": []}
DISTILLATION = {"steps": STEPS, "batch_size": 8, "warmup": 1, "pipeline_parallel": 2}
SECTIONS = {
    "students": {"distillation": DISTILLATION, "detection": {"method": "first_difference"}},
    # By this the same four intervals are assumed, in two chains of three blocks.
    "screening": {
        "distillation": DISTILLATION | {"steps": 1000},
        "detection": {"screening_steps": STEPS, "max_length": 2, "max_candidates": 4},
    },
    "heads": {
        "distillation": DISTILLATION,
        "detection": {"method": "first_difference"},
        "width": NO_WIDTH | {"head_keep_percents": [75, 50]},
    },
}
MOMENTS = ("closed form: moments", "closed form: solving", "steps")


def _measure(folder, stage, out):
    """The most bytes alive in each phase."""
    dims, most = ParallelDims.join(2, 1), defaultdict(int)
    plan = PLANS[stage]
    settings = sized.job_of(folder, plan, **SECTIONS["students"]).config.distillation
    with torch.enable_grad(), PeakMemory() as memory:

        def report(done, total, values, phase=None):
            most[phase or "steps"] = max(most[phase or "steps"], memory.peak)
            memory.restart()

        run = RunContext(out, out / "checkpoints", dims=dims, report=report)
        distil(Teacher(folder), sized.SizedSamples(), plan, settings, run)
    (out / f"{dims.rank}.json").write_text(json.dumps(most))


@pytest.fixture(scope="module", params=PLANS)
def measured(request, tmp_path_factory):
    out = tmp_path_factory.mktemp("ranks")
    folder = sized.pipeline(out / "teacher")
    ranks.run(2, _measure, folder, request.param, out)
    return request.param, folder, [json.loads((out / f"{rank}.json").read_text()) for rank in (0, 1)]


@pytest.mark.parametrize("rank", [0, 1])
def test_two_real_ranks_hold_what_is_computed_at_every_moment(measured, rank):
    stage, folder, counted = measured
    job = sized.job_of(folder, PLANS[stage], **SECTIONS[stage])
    part = segment_of(rank, 2, len(BLOCKS), list(job.replacements.students), "students")
    for name, moment in zip(MOMENTS, students.rank_moments(job, part), strict=True):
        assert 0.9 < sum(moment.values()) / counted[rank][name] < 1.1, (name, moment)


def test_the_worker_that_is_told_is_the_fullest_rank_at_its_fullest_moment(measured):
    stage, folder, counted = measured
    job = sized.job_of(folder, PLANS[stage], **SECTIONS[stage])
    (rank,) = {"screening": screening}.get(stage, students).workers(job)
    assert rank.count == 2
    assert 0.9 < rank.device_bytes / max(max(phases.values()) for phases in counted) < 1.1
