"""Calibration: one pool encodes prompts, then one samples trajectories."""

from __future__ import annotations

from dataclasses import replace

from ppcl.sizing.job import JobSize, WorkerSize
from ppcl.sizing.pipeline import Loaded, pipeline_memory

# A text encoder keeps the hidden states of all its layers, and works on a few of an FFN's width.
_TEXT_STATES = 48


def workers(job: JobSize) -> list[WorkerSize]:
    settings, model = job.config.calibration, job.model
    count, batch = settings.workers, settings.batch_size
    text = model.text_bytes
    latents = model.latent_bytes
    device, host = pipeline_memory(job, Loaded(batch * text * _TEXT_STATES if job.encoders else 0, encoders=True))
    encoder = WorkerSize(
        stage="calibration",
        worker="encoder",
        count=count,
        device=device,
        host=host,
        written=job.prompts * text,
        seconds=job.compute_seconds(2 * job.encoders / job.number * model.text_tokens * job.prompts / count),
    )
    if settings.source == "images":
        device, host = pipeline_memory(job, Loaded(0, job.vae.encoding.of(batch), encoders=True))
        return [
            encoder,
            replace(encoder, worker="sampler", device=device, host=host, written=job.samples * latents, seconds=None),
        ]
    device, host = pipeline_memory(job, Loaded(job.forward_bytes(batch * job.sides_at_once), transformer=True))
    forwards = job.prompts * job.config.sampling.steps * job.sides
    sampler = WorkerSize(
        stage="calibration",
        worker="sampler",
        count=count,
        device=device,
        host={"states": batch * settings.states_per_prompt * job.sides * latents} | host,
        written=job.samples * latents,
        seconds=job.compute_seconds(forwards * job.forward_flops / count),
    )
    return [encoder, sampler]
