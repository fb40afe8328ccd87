"""Variants: evaluators measure each replacement alone, then plans as a whole."""

from __future__ import annotations

from ppcl.evaluation.samples import SEARCH_SAMPLES
from ppcl.sizing.job import JobSize, WorkerSize
from ppcl.sizing.pipeline import Bytes, Loaded, pipeline_memory

# Plans that are measured as a whole for each budget or target, about.
_PLANS = 10


def workers(job: JobSize) -> list[WorkerSize]:
    return [evaluator_size(job, "variants")]


def evaluator_size(job: JobSize, stage: str) -> WorkerSize:
    """An evaluator of a stage that measures all replacements of the job, and plans of them."""
    samples, count = min(SEARCH_SAMPLES, job.validation), job.config.evaluation.workers
    sizes, blocks = job.replacements, len(job.model.blocks)
    # By its first block: from there on, the teacher's blocks run again.
    tails = sum(blocks - one.first for one in sizes.students) + sum(blocks - one.first for one in sizes.text)
    percents = len(set(job.config.width.ffn_keep_percents))
    tails += sum((percents + 1) * (blocks - block) for block in sizes.pruned)
    percents = len(set(job.config.width.head_keep_percents))
    tails += sum(percents * (blocks - block) for block in sizes.heads)
    plans = _PLANS * job.variants
    device, host = evaluator_memory(job, draws_images=False)
    forwards = samples * (tails / blocks + plans + 1)
    return WorkerSize(
        stage=stage,
        worker="evaluator",
        count=count,
        device=device,
        host=host,
        seconds=None if job.cpu else job.compute_seconds(forwards * job.forward_flops / count),
    )


def evaluator_memory(job: JobSize, draws_images: bool) -> tuple[Bytes, Bytes]:
    """What an evaluator holds on its device, and on its host."""
    activations, draws = evaluator_activations(job), draws_images
    # After a batch's last step, one image after the other.
    decoding = job.vae.decoding.of(1) if draws else 0
    loaded = Loaded(activations, decoding, encoders=draws, vae=draws, transformer=True, replacements=True)
    return pipeline_memory(job, loaded)


def evaluator_activations(job: JobSize) -> int:
    """Bytes of the activations of a batch of evaluation."""
    return job.forward_bytes(job.config.evaluation.batch_size * job.sides_at_once)
