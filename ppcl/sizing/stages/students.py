"""Students: the closed-form pass over the samples, then the distillation steps."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import NamedTuple

from ppcl.linalg.moments import CHUNK
from ppcl.replacements import Interval
from ppcl.sizing import simulation
from ppcl.sizing.job import JobSize, ReplacementSizes, WorkerSize
from ppcl.sizing.memory import GRADIENT_BYTES, STUDENT_BYTES, longest_pipeline
from ppcl.sizing.model import AttentionSize
from ppcl.training.distillation.segments import segment_of
from ppcl.training.pipeline import IN_FLIGHT

_SINGLE, _DOUBLE = 4, 8
# Arrays of the size of a Gram matrix that eliminating units holds beside it; an affine fit likewise.
_ELIMINATION = 5.6
# The same of heads, for each of the streams that they leave together.
_HEADS_ELIMINATION = 6.5


def workers(job: JobSize) -> list[WorkerSize]:
    """The ranks of the stage; where intervals are screened, all closed forms are made before it."""
    return [rank_size(job, "students", closed_form=not job.config.detection.screens)]


def rank_size(job: JobSize, stage: str, closed_form: bool) -> WorkerSize:
    """The fullest rank, at its fullest moment: the closed-form pass, its solving, or a training step."""
    settings, model, all_sizes = job.config.distillation, job.model, job.replacements
    plan = list(all_sizes.students)
    # The intervals that are assumed may leave fewer places to cut than those that detection finds.
    pp, dp = min(settings.pipeline_parallel, longest_pipeline(model, plan)), settings.data_parallel
    segments = [segment_of(rank, pp, len(model.blocks), plan, settings.train) for rank in range(pp)]
    fullest = max(
        (moment for part in segments for moment in rank_moments(job, part, closed_form)),
        key=lambda moment: sum(moment.values()),
    )
    trained = sum(all_sizes.students.values()) + (all_sizes.maps if settings.train == "all" else 0)
    step = None
    if not job.cpu and settings.train == "students":
        step = simulation.distillation_on(model, plan, settings.batch_size, pp, dp, job.device).step
    fitting = _closed_form_seconds(job, pp, dp) if closed_form else 0.0
    return WorkerSize(
        stage=stage,
        worker="rank",
        count=settings.pipeline_parallel * dp,
        device=fullest,
        written=_SINGLE * trained + _DOUBLE * trained + job.number * all_sizes.maps,
        sent=settings.steps * settings.batch_size * (pp - 1) * job.stream
        + round(2 * (dp - 1) * GRADIENT_BYTES * trained * settings.steps),
        seconds=None if step is None else step * settings.steps + fitting,
    )


def rank_moments(job: JobSize, part: range, closed_form: bool = True) -> Iterator[dict[str, int]]:
    """What a rank with these blocks holds at each moment that can be its fullest, the training step last.

    `closed_form`: whether it fits closed forms before it trains.
    """
    settings, model = job.config.distillation, job.model
    own = job.replacements.within(part)
    samples = -(-settings.batch_size // settings.data_parallel)
    trained = sum(own.students.values()) + (own.maps if settings.train == "all" else 0)
    base = {
        "teacher": job.number * (model.rest + sum(model.blocks[b] for b in part)),
        "closed-form maps": _closed_form_bytes(job, own, settings.train),
    }
    if closed_form:
        yield from _closed_form_moments(job, part, base | {"students": _SINGLE * trained}, samples)
    saved = max((model.memory[i.first].saved.of(samples) for i in own.students), default=0)
    yield base | {
        "students": STUDENT_BYTES * trained,
        "streams": samples * job.stream * len(_boundaries(own.students)) + _in_flight(job, part, samples),
        "activations": max(saved, job.forward_bytes(samples)),
    }


def _closed_form_moments(job: JobSize, part: range, base: dict[str, int], samples: int) -> Iterator[dict[str, int]]:
    """While the samples pass, and while maps are solved for; `base`: what is there all the time."""
    settings = job.config.distillation
    moments = [one.bytes for one in _grams(job, part)]
    held = min(sum(moments), max(round(settings.moments_gb * 1e9), max(moments, default=0)))
    # What heads give is kept while the rest of the block runs.
    attended = samples * job.stream if _attentions(job, part) else 0
    forward = job.forward_bytes(samples) + attended
    yield base | {
        "moments": held,
        "activations": 2 * samples * job.stream + max(forward, _counting(job, part, samples)),
    }
    largest = max((one.inputs for one in _grams(job, part)), default=0)
    heads = max((a.streams * a.width**2 for a in _attentions(job, part)), default=0)
    yield base | {
        "moments": held,
        # The last ones may still be on their way to the next rank.
        "streams": _in_flight(job, part, samples),
        "solving": round(_DOUBLE * max(_ELIMINATION * largest**2, _HEADS_ELIMINATION * heads)),
    }


def _in_flight(job: JobSize, part: range, samples: int) -> int:
    """Bytes of the streams that were sent to the next rank and may not have arrived."""
    return samples * job.stream * (IN_FLIGHT if part.stop < len(job.model.blocks) else 0)


def _boundaries(students: Iterable[Interval]) -> set[int]:
    return {b for interval in students for b in (interval.first, interval.last + 1)}


def _closed_form_bytes(job: JobSize, own: ReplacementSizes, train: str) -> int:
    """Of the maps that are not trained: pruned FFNs and heads in the teacher's precision, linear maps in float32."""
    linear = 0 if train == "all" else sum(own.text.values()) + sum(own.linear.values())
    return job.number * (sum(own.pruned.values()) + sum(own.heads.values())) + _SINGLE * linear


class _Gram(NamedTuple):
    """The moments of a map `p → q`: `inputs` p, their `bytes`, and the `tokens` of a sample that they count."""

    inputs: int
    bytes: int
    tokens: float


def _grams(job: JobSize, part: range) -> Iterator[_Gram]:
    """The moments of every map that a rank fits."""
    model, config = job.model, job.config
    # A stream has half of the tokens, on average; a single-stream block has all of them.
    d, everything, half = model.width, model.tokens, model.tokens / 2
    for block in part:
        for ffn in model.ffns[block].values():
            if config.width.ffn_keep_percents or config.distillation.student_keep_percent < 100:
                yield _Gram(ffn.units, _DOUBLE * ffn.units**2, everything if ffn.fused else half)
            if config.width.linear_ffns != 0 and not ffn.fused:
                yield _Gram(d, 2 * _DOUBLE * d**2, half)
    for attention in _attentions(job, part):
        tokens = everything / attention.streams
        yield from [_Gram(attention.width, _DOUBLE * attention.width**2, tokens)] * attention.streams
    own = job.replacements.within(part)
    if config.distillation.init == "affine":
        yield from (_Gram(d, 2 * _DOUBLE * d**2, half) for _ in own.students for _ in ("img", "txt"))
    yield from (_Gram(d, 2 * _DOUBLE * d**2, half) for run in own.text for _ in run.blocks)


def _attentions(job: JobSize, part: range) -> list[AttentionSize]:
    """The joint attentions of some blocks, where heads are replaced."""
    wanted = bool(job.config.width.head_keep_percents)
    return [attention for block in part if wanted and (attention := job.model.attentions[block])]


def _counting(job: JobSize, part: range, samples: int) -> int:
    """Adding the widest inputs to their moments: the tokens in float32, and a chunk of them centred."""
    model = job.model
    units = max((one.inputs for one in _grams(job, part)), default=model.width)
    joint = any(ffn.fused for block in part for ffn in model.ffns[block].values())
    tokens = samples * (model.tokens if joint else model.longest_tokens)
    chunk = min(CHUNK, tokens) * units * (_SINGLE + 2 * (_DOUBLE if job.cpu else _SINGLE))
    hidden = tokens * units * (job.number + (0 if job.cpu else _SINGLE))
    return hidden + chunk + 3 * _DOUBLE * units**2


def _closed_form_seconds(job: JobSize, pp: int, dp: int) -> float:
    """One forward of the teacher over the samples a pass, the Gram matrices, and an elimination a stream and block."""
    model, settings = job.model, job.config.distillation
    grams = list(_grams(job, range(len(model.blocks))))
    passes = max(1, -(-sum(one.bytes for one in grams) // round(settings.moments_gb * 1e9 * pp)))
    forward = job.compute_seconds(passes * job.train * job.forward_flops / (pp * dp))
    rate = job.device.sums * job.device.utilisation
    counting = sum(2 * one.bytes / _DOUBLE * one.tokens for one in grams) * job.train
    solving = sum(4.0 * one.inputs**3 for one in grams)
    return forward + counting / (rate * pp * dp) + solving / (rate * pp)
