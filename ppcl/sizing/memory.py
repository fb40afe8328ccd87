"""The memory estimate: bytes that each rank of a distillation of depth holds and sends, for a number of GPUs."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

from ppcl.errors import UserError
from ppcl.replacements import Interval
from ppcl.sizing.model import Model
from ppcl.training.distillation.segments import segment_of
from ppcl.training.pipeline import IN_FLIGHT

# A parameter of the frozen teacher in bfloat16; of a student its float32 weight and gradient, and AdamW's two moments.
TEACHER_BYTES, STUDENT_BYTES = 2, 16
# A gradient on its way between replicas is float32.
GRADIENT_BYTES = 4

FORMULAS = """\
b = samples of a replica per step; stream = bytes of both streams of one sample between two blocks, in bfloat16
teacher     = 2 × (parameters of embedders and head + of the rank's blocks)
students    = 16 × parameters of the rank's students, each a block and its affine maps \
(float32 weight, gradient, two moments of AdamW)
streams     = b × stream × (boundaries that its students read + 2 pending sends, \
on all ranks of a pipeline but the last)
activations = b × activations that the backward pass of its largest student keeps + its weights in bfloat16 \
(students train one after another)
sent        = b × stream per step, to the next rank; nothing comes back
reduced     = 2 (dp − 1) / dp × 4 × parameters of the rank's students per step, between dp replicas
FSDP        = 2 (n − 1) / n × parameters of the teacher per step: what n ranks would gather for its forward instead"""


@dataclass(frozen=True)
class Rank:
    """Estimate of the fullest rank of `pp × dp`: bytes held, and bytes sent per step."""

    gpus: int
    pp: int
    dp: int
    samples: int
    teacher: int
    students: int
    streams: int
    activations: int
    sent: int
    reduced: int
    fsdp: int

    @property
    def memory(self) -> int:
        return self.teacher + self.students + self.streams + self.activations


def intervals(model: Model, length: int) -> list[Interval]:
    """Intervals of `length` over all blocks, shorter ones at the ends of block lists; a single block stays as it is."""
    found = []
    for span in model.block_ranges:
        for first in range(span.start, span.stop, length):
            last = min(first + length, span.stop) - 1
            if last > first:
                found.append(Interval(first, last))
    return found


def layouts(model: Model, plan: Sequence[Interval], batch: int, gpus: Sequence[int]) -> Iterator[Rank]:
    """Estimate the fullest rank, for every number of GPUs, of the longest pipeline that divides it and the batch.

    A pipeline holds the teacher once; data-parallel replicas hold it once each.
    """
    for count in gpus:
        pp, dp = meshes(model, plan, batch, count)[-1]
        samples = -(-batch // dp)
        ranks = [rank_of(model, plan, samples, stage, pp, dp) for stage in range(pp)]
        # The last rank of a pipeline sends nothing, and may be the fullest.
        yield replace(max(ranks, key=lambda rank: rank.memory), sent=ranks[0].sent)


def longest_pipeline(model: Model, plan: Sequence[Interval]) -> int:
    """The largest number of segments: no cut falls inside an interval. Intervals may overlap."""
    return len(model.blocks) - len({block for interval in plan for block in interval.blocks[1:]})


def longest_dividing(model: Model, plan: Sequence[Interval], gpus: int) -> int:
    """The longest pipeline whose length divides the number of GPUs."""
    return max(n for n in range(1, min(gpus, longest_pipeline(model, plan)) + 1) if gpus % n == 0)


def meshes(model: Model, plan: Sequence[Interval], batch: int, gpus: int) -> list[tuple[int, int]]:
    """All `(pp, dp)` of a number of GPUs, the longest pipeline last.

    Raises `UserError` where a replica would have no sample.
    """
    found = [
        (n, gpus // n)
        for n in range(1, longest_dividing(model, plan, gpus) + 1)
        if gpus % n == 0 and gpus // n <= batch
    ]
    if not found:
        pp = longest_dividing(model, plan, gpus)
        raise UserError(
            f"{gpus} GPUs: the longest pipeline of which a whole number fits has {pp} ranks, and each of its "
            f"{gpus // pp} replicas needs a sample of a step, which has {batch}; use larger batches or fewer GPUs"
        )
    return found


def segment(model: Model, plan: Sequence[Interval], stage: int, pp: int) -> range:
    """The blocks of one rank, dealt out as in a job. Intervals are trained whatever `distillation.train` says."""
    return segment_of(stage, pp, len(model.blocks), list(plan), "students")


def rank_of(model: Model, plan: Sequence[Interval], samples: int, stage: int, pp: int, dp: int) -> Rank:
    """Estimate what one rank holds and sends; `samples`: of its replica in a step."""
    part = segment(model, plan, stage, pp)
    mine = [interval for interval in plan if interval.first in part]
    students = sum(model.blocks[interval.first] + model.affine for interval in mine)
    boundaries = {b for interval in mine for b in (interval.first, interval.last + 1)}
    last = stage == pp - 1
    stream = samples * model.stream_bytes
    return Rank(
        gpus=pp * dp,
        pp=pp,
        dp=dp,
        samples=samples,
        teacher=TEACHER_BYTES * (model.rest + sum(model.blocks[b] for b in part)),
        students=STUDENT_BYTES * students,
        streams=stream * (len(boundaries) + (0 if last else IN_FLIGHT)),
        activations=max((model.memory[i.first].saved.of(samples) for i in mine), default=0),
        sent=0 if last else stream,
        reduced=round(2 * (dp - 1) / dp * GRADIENT_BYTES * students),
        fsdp=round(TEACHER_BYTES * (pp * dp - 1) / (pp * dp) * model.parameters),
    )
