"""What a rank of the probes holds at most, computed and counted."""

import json

from ppcl.detection.fit_probes import fit_probes
from ppcl.models.teacher import Teacher
from ppcl.sizing.peak_memory import PeakMemory
from ppcl.sizing.stages import probes
from ppcl.training.parallel_dims import ParallelDims
from ppcl.training.run_context import RunContext
from tests import ranks, sized

SECTIONS = {"probes": {"workers": 2, "batch_size": 8}}


def _measure(folder, out):
    dims = ParallelDims.join(2, 1)
    settings = sized.job_of(folder, [], **SECTIONS).config.probes
    with PeakMemory() as memory:
        fit_probes(Teacher(folder), sized.SizedSamples(), settings, RunContext(out, out, dims=dims), tokens=4096)
    (out / f"{dims.rank}.json").write_text(json.dumps(memory.peak))


def test_two_real_ranks_hold_what_is_computed(tmp_path):
    folder = sized.pipeline(tmp_path / "teacher")
    ranks.run(2, _measure, folder, tmp_path)
    counted = max(json.loads((tmp_path / f"{rank}.json").read_text()) for rank in (0, 1))
    (rank,) = probes.workers(sized.job_of(folder, [], **SECTIONS))
    assert 0.9 < rank.device_bytes / counted < 1.1
