"""What one rank does in depth distillation: its segment of the teacher, its students, and nothing else in memory.

    receive X from the rank before → run the segment's blocks → send X on at once → train the segment's students

A student of `[u, v]` is trained on the teacher's `X_{u-1}` and `X_v`, both of which its own rank has just computed.
"""

from __future__ import annotations

import copy
import json
import os
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch

from ppcl.architecture import Architecture, Streams, embed, run_blocks
from ppcl.config import Distillation
from ppcl.distillation.mesh import Mesh
from ppcl.distillation.pupil import Pupil
from ppcl.distillation.start import fit_affine_starts
from ppcl.plan import Interval
from ppcl.segments import Chain, segments
from ppcl.students import Student, affine_map, save_student
from ppcl.teacher import Teacher

# What training a student costs beside a teacher block's forward: its own forward and a backward of twice that.
STUDENT_COST = 3.0
_CURVE_POINTS = 200
# Of the closed-form start: enough to be solvable, too little to be felt.
_RIDGE = 1e-6


class Samples(Protocol):
    """The calibration set, as far as it is needed here."""

    def ids(self, held_out: bool) -> np.ndarray: ...

    def batch(self, ids: Sequence[int], device: str, dtype: torch.dtype) -> dict[str, Any]: ...


def batch_of(step: int, ids: np.ndarray, size: int, seed: int) -> np.ndarray:
    """The sample ids of a step: consecutive pieces of one endless run of seeded shuffles, whatever ranks there are."""
    wanted = range(step * size, (step + 1) * size)
    orders = {
        epoch: np.random.default_rng([seed, epoch]).permutation(ids)
        for epoch in {position // len(ids) for position in wanted}
    }
    return np.array([orders[position // len(ids)][position % len(ids)] for position in wanted])


def segment_of(stage: int, pp: int, blocks: int, intervals: Sequence[Interval]) -> range:
    """The blocks of one stage, balanced by cost, cut between intervals."""
    costs = [1.0] * blocks
    for interval in intervals:
        costs[interval.last] += STUDENT_COST
    return segments(costs, pp, intervals)[stage]


def text_mask(architecture: Architecture, context: dict[str, Any]) -> torch.Tensor | None:
    """`(B, T)`, true where a text token is no padding; None where all count."""
    mask = context.get(architecture.text_mask) if architecture.text_mask else None
    return None if mask is None else mask.bool()


class Segment:
    """One rank's blocks and the boundaries its students need."""

    def __init__(self, teacher: Teacher, blocks: range, intervals: Sequence[Interval], device: str, dtype: torch.dtype):
        self.architecture = teacher.architecture
        self.range = blocks
        self.intervals = [i for i in intervals if i.first in blocks]
        self.device, self.dtype = device, dtype
        self.transformer = teacher.transformer(keep=blocks, device=device, dtype=dtype)
        self.blocks = {b: self.architecture.blocks(self.transformer)[b] for b in blocks}

    @torch.no_grad()
    def run(
        self, inputs: dict[str, Any], chain: Chain, boundaries: set[int]
    ) -> tuple[dict[int, Streams], dict[str, Any]]:
        """One batch through the segment: the streams at the asked boundaries, and the context of the blocks.

        Boundary `b` is the input of block `b`; the last block's output is boundary `stop`.
        """
        start, context = embed(self.transformer, inputs)
        streams = chain.receive(start)
        kept = {self.range.start: streams} if self.range.start in boundaries else {}
        for number, block in self.blocks.items():
            streams = run_blocks(self.architecture, [block], streams, context)
            if number + 1 in boundaries:
                kept[number + 1] = streams
        chain.send(streams)
        return kept, context


def new_student(segment: Segment, interval: Interval, start: str) -> Student:
    """A student before training: a copy of the first or middle block, with maps that change nothing yet where asked."""
    source = sum(interval) // 2 if start == "middle" else interval.first
    block = copy.deepcopy(segment.blocks[source]).float()
    affine = {}
    if start == "affine":
        width = next(p.shape[-1] for p in block.parameters() if p.ndim == 2)
        names = [n for n in Streams._fields if n == "img" or not getattr(segment.blocks[interval.last], "context_pre_only", False)]
        affine = {name: affine_map(width).to(segment.device) for name in names}
    return Student(segment.architecture, interval, source, block, affine)


def distil(
    teacher: Teacher,
    samples: Samples,
    intervals: Sequence[Interval],
    settings: Distillation,
    mesh: Mesh,
    folder: Path,
    checkpoints: Path,
    seed: int,
    device: str,
    report: Callable[[int, int, dict[str, float]], None],
) -> None:
    """Train every student of this rank and write it to `folder/<interval>.safetensors`, its curve beside it.

    `report(step, steps, losses)` is called after every step. Continues from what lies in `checkpoints`; a student that
    is further on than others waits for them without being trained again.
    """
    architecture = teacher.architecture
    count = architecture.spans(teacher.empty_transformer())[-1].stop
    bfloat16 = settings.precision == "bfloat16" or (settings.precision == "auto" and device.startswith("cuda"))
    part = segment_of(mesh.stage, mesh.pp, count, intervals)
    segment = Segment(teacher, part, intervals, device, torch.bfloat16 if bfloat16 else torch.float32)
    chain = Chain(mesh.stage, mesh.pp, mesh.rank)
    ids = samples.ids(held_out=False)

    # Every rank looks before any rank writes, so all agree on where to go on.
    found = {i: (checkpoints / f"{i.name}.safetensors").exists() for i in intervals}
    mesh.barrier()
    students = {i: new_student(segment, i, settings.start) for i in segment.intervals}
    if settings.start == "affine" and not all(found.values()):
        fresh = [s for i, s in students.items() if not found[i]]
        fit_affine_starts(segment, fresh, samples, ids, settings.batch_size, _RIDGE, mesh, chain)
    pupils = {i: Pupil(s, settings, mesh) for i, s in students.items()}
    for interval, pupil in pupils.items():
        if found[interval]:
            pupil.load(checkpoints / f"{interval.name}.safetensors")

    first = _first_step(mesh, [p.step for p in pupils.values()], settings.steps)
    boundaries = {i.first for i in pupils} | {i.last + 1 for i in pupils}
    every = max(1, settings.steps // _CURVE_POINTS)
    begun = time.monotonic()
    for step in range(first, settings.steps):
        mine = batch_of(step, ids, settings.batch_size, seed)[mesh.replica :: mesh.dp]
        inputs = samples.batch(mine, device, segment.dtype)
        kept, context = segment.run(inputs, chain, boundaries)
        mask = text_mask(architecture, context)
        losses = {}
        for interval, pupil in pupils.items():
            if pupil.step > step:
                continue
            parts = pupil.learn(kept[interval.first], kept[interval.last + 1], context, mask, bfloat16)
            losses[interval.name] = parts["loss"]
            if step % every == 0 or step == settings.steps - 1:
                pupil.curve.append({"step": step, **{k: round(v, 6) for k, v in parts.items()}})
            if (step + 1) % settings.checkpoint_every == 0 and mesh.replica == 0:
                pupil.save(checkpoints / f"{interval.name}.safetensors")
        report(step + 1, settings.steps, losses)
    chain.flush()
    seconds = time.monotonic() - begun
    if mesh.replica == 0:
        for interval, pupil in pupils.items():
            if pupil.step == settings.steps and first < settings.steps:
                pupil.save(checkpoints / f"{interval.name}.safetensors")
            save_student(pupil.trained(), folder / f"{interval.name}.safetensors")
            record = {"curve": pupil.curve, "skipped_steps": pupil.skipped, "seconds": round(seconds, 2)}
            _write(folder / f"{interval.name}.json", record)
    mesh.barrier()


def _first_step(mesh: Mesh, steps: list[int], last: int) -> int:
    """The least advanced student's step, over all ranks."""
    least = torch.tensor([min(steps, default=last)])
    if mesh.pp * mesh.dp > 1:
        torch.distributed.all_reduce(least, op=torch.distributed.ReduceOp.MIN)
    return int(least)


def _write(path: Path, record: dict[str, Any]) -> None:
    partial = path.with_name(path.name + ".partial")
    partial.write_text(json.dumps(record))
    os.replace(partial, path)
