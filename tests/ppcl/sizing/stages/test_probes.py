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


def test_the_files_are_as_large_as_is_computed(tmp_path):
    """With as many tokens to fit on as the default method keeps, of 12 of the 24 samples that are fitted on."""
    sections = {
        "calibration": {"held_out": 0.25},
        "probes": {"batch_size": 8, "tokens_per_sample": 8},
        "detection": {"fit_tokens": 96, "tokens": 64},
    }
    folder, out = sized.pipeline(tmp_path / "teacher"), tmp_path / "out"
    out.mkdir()
    job = sized.job_of(folder, [], **sections)
    settings = job.config.detection
    fit_probes(
        Teacher(folder),
        sized.SizedSamples(job.samples),
        job.config.probes,
        RunContext(out, out),
        settings.tokens,
        settings.fit_tokens,
    )
    written = sum(path.stat().st_size for path in out.iterdir())
    (rank,) = probes.workers(job)
    assert 0.9 < rank.written / written < 1.1
