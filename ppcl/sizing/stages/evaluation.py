"""Evaluation: evaluators measure velocity errors, time steps and generate the images of every variant."""

from __future__ import annotations

from ppcl.evaluation.images import TIMED_ROUNDS
from ppcl.evaluation.samples import REPORT_SAMPLES
from ppcl.sizing.job import JobSize, WorkerSize
from ppcl.sizing.stages.variants import evaluator_memory

_CHANNELS = 3


def workers(job: JobSize) -> list[WorkerSize]:
    config = job.config
    settings, sampling = config.evaluation, config.sampling
    # The teacher and the one of all replacements among them.
    variants = job.variants + 2
    prompts = settings.max_prompts or job.prompts
    steps = sampling.steps * job.sides
    forwards = variants * (min(REPORT_SAMPLES, job.test) + prompts * steps + TIMED_ROUNDS * settings.batch_size * steps)
    device, host = evaluator_memory(job, draws_images=True)
    pixels = sampling.height * sampling.width * _CHANNELS
    return [
        WorkerSize(
            stage="evaluation",
            worker="evaluator",
            count=settings.workers,
            device=device,
            host=host,
            written=variants * prompts * pixels,
            seconds=None if job.cpu else job.compute_seconds(forwards * job.forward_flops / settings.workers),
        ),
        WorkerSize(
            stage="evaluation",
            worker="coordinator",
            count=1,
            device={},
            # The teacher's images beside a variant's, as numbers.
            host={"images": 2 * prompts * pixels},
        ),
    ]
