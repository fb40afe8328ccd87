"""Distillation on one rank, which holds its segment of the teacher and its replacements, and nothing else.

    receive X from the rank before → run the segment's blocks → send X on at once → train the segment's replacements

Depth and width are trained in one phase, on one pass over the teacher: an objective reads the teacher's own streams
alone, which its rank has just computed, so it does not matter which objectives there are beside it (PPCL, arXiv
2511.16156, Stage 1.3).
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterable, Sequence
from functools import reduce
from operator import or_
from pathlib import Path
from typing import TypeGuard

import numpy as np
import torch

from ppcl.config.schema import Distillation
from ppcl.models.teacher import Teacher
from ppcl.replacements import Interval, LowRankModulation, PrunedFfn, Replacement
from ppcl.replacements.ffn import Ffn
from ppcl.replacements.io import save_replacement
from ppcl.replacements.low_rank_modulation import fit_basis
from ppcl.storage.manifest import write_atomically
from ppcl.training.captured import CapturedActivations, CaptureSpec
from ppcl.training.data import Samples, batch_of
from ppcl.training.distillation.closed_form import fit_closed_form
from ppcl.training.distillation.objectives import (
    DistillationObjective,
    Gradient,
    GradientObjective,
    TeacherBlocks,
    new_objective,
)
from ppcl.training.distillation.trainee import Trainee
from ppcl.training.parallel_dims import ParallelDims
from ppcl.training.pipeline import PipelineStage, balanced_segments
from ppcl.training.progress import ProgressReport
from ppcl.training.teacher_segment import TeacherSegment
from ppcl.training.train_state import TrainState

# What training costs beside a teacher block's forward: a student its own forward and a backward of twice that, a block
# of a text run the same; an FFN's maps are two products.
STUDENT_COST = 3.0
FFN_COST = 0.25
# Steps of which the losses are kept, at most about so many.
_HISTORY_POINTS = 200


def segment_of(stage: int, pp: int, blocks: int, plan: Sequence[Replacement]) -> range:
    """The blocks of one stage, balanced by cost, cut between the replacements of the plan."""
    costs = [1.0] * blocks
    for replacement in plan:
        if isinstance(replacement, Ffn):
            costs[replacement.block] += 0.0 if isinstance(replacement, PrunedFfn) else FFN_COST
        elif isinstance(replacement, Interval):
            costs[replacement.last] += STUDENT_COST
        else:
            for block in replacement.blocks[1:]:
                costs[block] += STUDENT_COST
    return balanced_segments(costs, pp, plan)[stage]


def distil(
    teacher: Teacher,
    samples: Samples,
    plan: Sequence[Replacement],
    settings: Distillation,
    dims: ParallelDims,
    folder: Path,
    checkpoints: Path,
    seed: int,
    device: str,
    report: ProgressReport,
    modulation_error: float = 0.0,
) -> None:
    """Train the replacements of this rank and write them to `folder/<replacement>.safetensors`, their losses beside them.

    `report(step, steps, losses)` is called after every step. `modulation_error`: see `ppcl.config.schema.Width`. Goes on
    from what lies in `checkpoints`; a replacement that is further on than others waits for them and is not trained again.
    """
    rank = _Rank(teacher, samples, plan, settings, dims, checkpoints, seed, device)
    rank.initialize()
    rank.train(report)
    rank.write(folder)
    low_rank = next((r for r in plan if isinstance(r, LowRankModulation)), None)
    if low_rank and dims.rank == 0:
        basis = fit_basis(rank.segment.transformer, samples, rank.ids, settings.batch_size, modulation_error)
        save_replacement(basis, low_rank, rank.adapter, _file(folder, low_rank))
        _write_record(folder, low_rank)
    dims.barrier()


class _Rank:
    """One rank's segment of the teacher, with an objective for each of the segment's replacements."""

    def __init__(
        self,
        teacher: Teacher,
        samples: Samples,
        plan: Sequence[Replacement],
        settings: Distillation,
        dims: ParallelDims,
        checkpoints: Path,
        seed: int,
        device: str,
    ):
        self.samples, self.settings, self.dims = samples, settings, dims
        self.checkpoints, self.seed, self.device = checkpoints, seed, device
        self.adapter = teacher.adapter
        self.bfloat16 = settings.precision == "bfloat16" or (settings.precision == "auto" and device.startswith("cuda"))
        self.ids = samples.ids(held_out=False)
        self.plan = [replacement for replacement in plan if not isinstance(replacement, LowRankModulation)]
        count = self.adapter.block_ranges(teacher.empty_transformer())[-1].stop
        blocks = segment_of(dims.pp_rank, dims.pp, count, self.plan)
        dtype = torch.bfloat16 if self.bfloat16 else torch.float32
        self.segment = TeacherSegment(teacher, blocks, self.plan, device, dtype)
        self.pipeline_stage = PipelineStage(dims.pp_rank, dims.pp, dims.rank)
        # Every rank looks before any rank writes, so all agree on where to go on.
        self.has_checkpoint = {r: _file(checkpoints, r).exists() for r in self.plan}
        dims.barrier()
        transformer = self.segment.transformer
        blocks_here = TeacherBlocks(self.adapter, transformer, self.segment.blocks, count)
        self.objectives = {r: new_objective(blocks_here, r, settings) for r in self.segment.plan}
        for objective in self.objectives.values():
            objective.module.to(device)
        self.closed_form = {r: o for r, o in self.objectives.items() if not is_trained(o, settings)}
        self.trainees: dict[Replacement, Trainee] = {}
        self.seconds = 0.0

    def capture(self, ids: np.ndarray, spec: CaptureSpec) -> CapturedActivations:
        """Run the segment on some samples; gives what the spec names of the teacher's activations."""
        inputs = self.samples.batch(ids, self.device, self.segment.dtype)
        return self.segment.run(inputs, self.pipeline_stage, spec)

    def initialize(self) -> None:
        """Initialise in closed form what has no checkpoint, and go on from the checkpoints of the others."""
        settings, writes = self.settings, self.dims.dp_rank == 0
        if self._has_closed_form() and not all(self.has_checkpoint.values()):
            fresh = [objective for r, objective in self.objectives.items() if not self.has_checkpoint[r]]
            spec = _union(objective.init_capture for objective in fresh)
            fit_closed_form(
                fresh, lambda ids: self.capture(ids, spec), self.ids, settings.batch_size, settings.ridge, self.dims
            )
            self.pipeline_stage.flush()
            for replacement, objective in self.closed_form.items():
                if writes and not self.has_checkpoint[replacement]:
                    path = _file(self.checkpoints, replacement)
                    save_replacement(objective.module, replacement, self.adapter, path)
        for replacement, objective in self.objectives.items():
            if replacement in self.closed_form:
                continue
            trainee = Trainee(objective, settings, self.dims)
            if self.has_checkpoint[replacement]:
                trainee.load(_file(self.checkpoints, replacement))
            elif writes and objective.moments():
                trainee.save(_file(self.checkpoints, replacement))  # its initialisation took a pass over all samples
            self.trainees[replacement] = trainee

    def _has_closed_form(self) -> bool:
        """Whether any objective of any rank starts in closed form: then all take part in that pass."""
        settings = self.settings
        only_intervals = all(isinstance(replacement, Interval) for replacement in self.plan)
        return settings.init == "affine" or settings.student_keep_percent < 100 or not only_intervals

    def train(self, report: ProgressReport) -> None:
        """Train to the last step, from the step of the replacement that is least advanced on any rank."""
        settings, dims = self.settings, self.dims
        spec = _union(trainee.objective.capture for trainee in self.trainees.values())
        first = _first_step(dims, [trainee.state.step for trainee in self.trainees.values()], settings.steps)
        every = max(1, settings.steps // _HISTORY_POINTS)
        started_at = time.monotonic()
        for step in range(first, settings.steps):
            batch = batch_of(step, self.ids, settings.batch_size, self.seed)[dims.dp_rank :: dims.dp]
            captured = self.capture(batch, spec)
            losses = {}
            for replacement, trainee in self.trainees.items():
                if trainee.state.step > step:
                    continue
                terms = trainee.train_step(captured, self.bfloat16)
                losses[replacement.name] = terms["loss"]
                trainee.state.record(terms, every)
                last = step + 1 == settings.steps
                if dims.dp_rank == 0 and ((step + 1) % settings.checkpoint_every == 0 or last):
                    trainee.save(_file(self.checkpoints, replacement))
            report(step + 1, settings.steps, losses)
        self.pipeline_stage.flush()
        self.seconds = time.monotonic() - started_at

    def write(self, folder: Path) -> None:
        """Write the finished replacements, and a record of each one's training."""
        if self.dims.dp_rank != 0:
            return
        for replacement, trainee in self.trainees.items():
            save_replacement(trainee.export(), replacement, self.adapter, _file(folder, replacement))
            _write_record(folder, replacement, trainee.state, self.seconds)
        for replacement in self.closed_form:
            folder.mkdir(parents=True, exist_ok=True)
            content = _file(self.checkpoints, replacement).read_bytes()
            write_atomically(_file(folder, replacement), content)
            _write_record(folder, replacement)


def is_trained(objective: DistillationObjective, settings: Distillation) -> TypeGuard[GradientObjective]:
    """Whether an objective is trained by gradient, or stays at its closed-form initialisation."""
    return objective.gradient is Gradient.NEEDED or (
        objective.gradient is Gradient.OPTIONAL and settings.train == "all"
    )


def _union(specs: Iterable[CaptureSpec]) -> CaptureSpec:
    return reduce(or_, specs, CaptureSpec())


def _file(folder: Path, replacement: Replacement) -> Path:
    return folder / f"{replacement.name}.safetensors"


def _first_step(dims: ParallelDims, steps: list[int], last: int) -> int:
    """The least advanced trainee's step, over all ranks."""
    least = torch.tensor([min(steps, default=last)])
    if dims.pp * dims.dp > 1:
        torch.distributed.all_reduce(least, op=torch.distributed.ReduceOp.MIN)
    return int(least)


def _write_record(
    folder: Path, replacement: Replacement, state: TrainState | None = None, seconds: float = 0.0
) -> None:
    record = {
        "curve": state.loss_history if state else [],
        "skipped_steps": state.skipped_steps if state else 0,
        "seconds": round(seconds, 2),
    }
    write_atomically(folder / f"{replacement.name}.json", json.dumps(record))
