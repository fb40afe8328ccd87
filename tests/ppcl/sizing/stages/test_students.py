"""What a rank of distillation holds at each moment that can be its fullest, computed and counted."""

import json
from collections import defaultdict

import pytest
import torch

from ppcl.models.teacher import Teacher
from ppcl.replacements import Interval, LinearFfn, PrunedFfn, TextRun
from ppcl.sizing.peak_memory import PeakMemory
from ppcl.sizing.stages import students
from ppcl.training.distillation.segments import segment_of
from ppcl.training.distillation.trainer import distil
from ppcl.training.parallel_dims import ParallelDims
from ppcl.training.run_context import RunContext
from tests import ranks, sized

BLOCKS = range(6)
PLAN = [
    *(Interval(b, b + 1) for b in BLOCKS[::2]),
    *(TextRun(b, b + 1) for b in BLOCKS[::2]),
    *(LinearFfn(b) for b in BLOCKS),
    *(PrunedFfn(b, percent) for b in BLOCKS for percent in (50, 25, 12)),
]
SECTIONS = {"distillation": {"steps": 2, "batch_size": 8, "warmup": 1, "pipeline_parallel": 2}}
MOMENTS = ("closed form: moments", "closed form: solving", "steps")


def _measure(folder, out):
    """The most bytes alive in each phase."""
    dims, most = ParallelDims.join(2, 1), defaultdict(int)
    settings = sized.job_of(folder, PLAN, **SECTIONS).config.distillation
    with torch.enable_grad(), PeakMemory() as memory:

        def report(done, total, values, phase=None):
            most[phase or "steps"] = max(most[phase or "steps"], memory.peak)
            memory.restart()

        run = RunContext(out, out / "checkpoints", dims=dims, report=report)
        distil(Teacher(folder), sized.SizedSamples(), PLAN, settings, run)
    (out / f"{dims.rank}.json").write_text(json.dumps(most))


@pytest.fixture(scope="module")
def measured(tmp_path_factory):
    out = tmp_path_factory.mktemp("ranks")
    folder = sized.pipeline(out / "teacher")
    ranks.run(2, _measure, folder, out)
    return folder, [json.loads((out / f"{rank}.json").read_text()) for rank in (0, 1)]


@pytest.mark.parametrize("rank", [0, 1])
def test_two_real_ranks_hold_what_is_computed_at_every_moment(measured, rank):
    folder, counted = measured
    job = sized.job_of(folder, PLAN, **SECTIONS)
    part = segment_of(rank, 2, len(BLOCKS), list(job.replacements.students), "students")
    for name, moment in zip(MOMENTS, students.rank_moments(job, part), strict=True):
        assert 0.9 < sum(moment.values()) / counted[rank][name] < 1.1, (name, moment)


def test_the_worker_that_is_told_is_the_fullest_rank_at_its_fullest_moment(measured):
    folder, counted = measured
    (rank,) = students.workers(sized.job_of(folder, PLAN, **SECTIONS))
    assert rank.count == 2
    assert 0.9 < rank.device_bytes / max(max(phases.values()) for phases in counted) < 1.1
