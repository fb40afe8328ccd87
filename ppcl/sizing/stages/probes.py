"""Probes: each rank fits the affine maps of its own blocks, from moments in float64."""

from __future__ import annotations

from ppcl.detection.fit_probes import tokens_per_sample
from ppcl.linalg.moments import CHUNK
from ppcl.sizing import simulation
from ppcl.sizing.job import JobSize, WorkerSize
from ppcl.training.pipeline import IN_FLIGHT, balanced_segments

_DOUBLE, _SINGLE = 8, 4
# Moments hold X^T X and X^T Y; adding a chunk makes both again, and the outer products that centre them.
_HELD, _ADDING = 2, 4


def workers(job: JobSize) -> list[WorkerSize]:
    settings, model = job.config.probes, job.model
    count = settings.workers
    parts = balanced_segments([1.0] * len(model.blocks), min(count, len(model.blocks)))
    square = _DOUBLE * model.width**2
    batch = settings.batch_size
    # The larger stream, of a batch, as float32 tokens: X, the new stream, and their difference.
    stream = _SINGLE * batch * model.longest_tokens * model.width
    chunk = min(CHUNK, batch * model.longest_tokens) * model.width * (3 * (_DOUBLE if job.cpu else _SINGLE) + _SINGLE)

    def rank(part: range) -> dict[str, int]:
        return {
            "teacher": job.number * (model.rest + sum(model.blocks[b] for b in part)),
            "moments": _HELD * square * sum(fits(job, b) for b in part),
            "streams": (IN_FLIGHT if part.stop < len(model.blocks) else 0) * batch * job.stream,
            "activations": max(
                job.forward_bytes(batch), 3 * batch * job.stream + 3 * stream + chunk + _ADDING * square
            ),
        }

    fullest = max((rank(part) for part in parts), key=lambda one: sum(one.values()))
    tokens = tokens_per_sample(settings, job.validation, job.config.detection.tokens) * job.validation
    # Both streams, before the first block and behind each.
    numbers = 2 * (len(model.blocks) + 1) * model.width
    kept, to_fit = numbers * tokens * _SINGLE, numbers * fit_tokens(job) * job.number
    samples = job.train + job.validation
    steps = -(-samples // batch)
    return [
        WorkerSize(
            stage="probes",
            worker="rank",
            count=count,
            device=fullest,
            host={"validation tokens": kept // len(parts), "tokens to fit on": to_fit // len(parts)},
            written=kept + to_fit + len(model.blocks) * 2 * _SINGLE * model.width**2,
            sent=(len(parts) - 1) * samples * job.stream,
            seconds=None if job.cpu else simulation.probes(model, batch, count, job.device).step * steps,
        )
    ]


def fit_tokens(job: JobSize) -> int:
    """Tokens of each stream and boundary that are kept to fit the closed forms of intervals on."""
    if job.config.detection.method != "measured":
        return 0
    per_sample = job.config.probes.tokens_per_sample
    return per_sample * min(job.train, -(-job.config.detection.fit_tokens // per_sample))


def fits(job: JobSize, block: int) -> int:
    """The affine maps that are fitted for a block: of each stream, and of each FFN that stands alone."""
    return 2 + sum(not ffn.fused for ffn in job.model.ffns[block].values())
