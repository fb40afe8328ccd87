"""What an evaluator of detection holds and computes: fitting surrogates, and running the teacher behind them."""

from dataclasses import replace

import pytest
import torch
from safetensors.torch import save_file
from torch.utils.flop_counter import FlopCounterMode

from jobs.cli.plan import default_config
from ppcl.detection.fit_probes import fit_tokens_file
from ppcl.detection.surrogates import by_start, candidate_intervals, fit_surrogates
from ppcl.evaluation.velocity_error import surrogate_errors
from ppcl.models.teacher import Teacher
from ppcl.sizing.device import Device
from ppcl.sizing.job import job_size
from ppcl.sizing.model import TeacherSize
from ppcl.sizing.peak_memory import PeakMemory
from ppcl.sizing.simulation import distillation_work
from ppcl.sizing.stages import detection
from tests import sized

WIDTH, LASTS, BATCH, SAMPLES = 96, (2, 3, 4), 8, 8
SECTIONS = {
    "detection": {"max_length": 4, "fit_tokens": 256, "samples": SAMPLES},
    "probes": {"tokens_per_sample": 16},
    "evaluation": {"batch_size": BATCH},
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = sized.pipeline(tmp_path_factory.mktemp("teacher"))
    generator = torch.Generator().manual_seed(0)
    for boundary in range(7):
        tokens = {name: torch.randn(256, WIDTH, generator=generator) for name in ("img", "txt")}
        save_file(tokens, fit_tokens_file(folder, boundary))
    return folder


def _job(folder):
    return replace(sized.job_of(folder, [], **SECTIONS), prompts=32)


def _fit(folder, intervals):
    found = {}
    for first in sorted({interval.first for interval in intervals}):
        lasts = [interval.last for interval in intervals if interval.first == first]
        found |= fit_surrogates(folder, first, lasts, 1e-4, "cpu", torch.float32)
    return found


def test_fitting_the_maps_of_a_first_block_takes_what_is_computed(folder):
    with PeakMemory() as memory:
        fit_surrogates(folder, 1, LASTS, 1e-4, "cpu", torch.float32)
    # Those of the first stream are there while the second one's are solved for.
    maps = len(LASTS) * 4 * WIDTH**2
    assert 0.9 < (detection.fit_bytes(_job(folder)) + maps) / memory.peak < 1.1


def test_an_evaluator_holds_and_computes_what_is_said(folder):
    job, teacher = _job(folder), Teacher(folder)
    _, evaluator = detection.workers(job)
    transformer = teacher.transformer()
    groups = by_start(candidate_intervals(job.model.block_ranges, 4))
    inputs = sized.SizedSamples().batch(range(SAMPLES))
    peaks, operations = [], 0
    for group in groups:
        with PeakMemory() as memory, FlopCounterMode(display=False) as counter:
            surrogates = _fit(folder, group)
            memory.hold(transformer)
            memory.restart()
            surrogate_errors(transformer, surrogates, inputs)
        peaks.append(memory.peak)
        operations += counter.get_total_flops()
    assert 0.9 < evaluator.device_bytes / max(peaks) < 1.1, dict(evaluator.device)
    assert 0.9 < detection.measuring_operations(job) / operations < 1.1


def test_an_interval_is_measured_by_the_blocks_behind_it_alone(folder):
    job = _job(folder)
    model, samples = job.model, min(SAMPLES, job.validation)
    assert samples == SAMPLES
    five = job.config.detection.model_copy(update={"max_length": 5})
    longer = replace(job, config=job.config.model_copy(update={"detection": five}))
    # Two more: 0-4, behind which one block runs, and 1-5, behind which none does.
    added = 2 * (2 * model.tokens * WIDTH**2 + model.rest_flops) + model.flops[5]
    assert detection.measuring_operations(longer) - detection.measuring_operations(job) == samples * added


def test_measuring_intervals_of_qwen_image_takes_less_than_a_twentieth_of_distilling_them():
    teacher = TeacherSize.named("qwen-image", 1024, 1024)
    job = job_size(default_config([], (1024, 1024)), teacher, 1000, 4, Device())
    rate = job.device.flops * job.device.utilisation

    def distillation(job, steps):
        plan, batch = list(job.replacements.students), job.config.distillation.batch_size
        return steps * rate * distillation_work(job.model, plan, batch, 0, 1, 1, job.device).compute

    steps = job.config.distillation.steps, job.config.detection.screening_steps
    distilled = distillation(job, steps[0]) + distillation(job.screened, steps[1])
    assert 0.04 < detection.measuring_operations(job) / distilled < 0.05
