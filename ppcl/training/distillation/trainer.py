"""Distillation on one rank, which holds its segment of the teacher and its replacements, and nothing else.

    receive X from the rank before → run the segment's blocks → send X on at once → train the segment's replacements

Depth and width are trained in one phase, on one pass over the teacher: an objective reads the teacher's own streams
alone, which its rank has just computed, so it does not matter which objectives there are beside it (PPCL, arXiv
2511.16156, Stage 1.3).
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterable, Mapping, Sequence
from functools import reduce
from operator import or_
from pathlib import Path
from typing import TypeGuard

import numpy as np
import torch

from ppcl.config.schema import Distillation
from ppcl.models.teacher import Teacher
from ppcl.replacements import Interval, LowRankModulation, Replacement
from ppcl.replacements.io import load_replacement, save_replacement
from ppcl.replacements.low_rank_modulation import fit_basis
from ppcl.storage.manifest import write_atomically
from ppcl.training.captured import CapturedActivations, CaptureSpec
from ppcl.training.data import Samples, batch_of
from ppcl.training.distillation.closed_form import ClosedForm
from ppcl.training.distillation.objectives import (
    DistillationObjective,
    Gradient,
    GradientObjective,
    TeacherBlocks,
    new_objective,
)
from ppcl.training.distillation.segments import segment_of
from ppcl.training.distillation.trainee import Trainee
from ppcl.training.pipeline import PipelineStage
from ppcl.training.run_context import RunContext
from ppcl.training.teacher_segment import Consumer, TeacherSegment
from ppcl.training.train_state import TrainState

# Steps of which the losses are kept, at most about so many.
_HISTORY_POINTS = 200


def distil(
    teacher: Teacher,
    samples: Samples,
    plan: Sequence[Replacement],
    settings: Distillation,
    run: RunContext,
    modulation_error: float = 0.0,
    start: Mapping[Replacement, Path] | None = None,
) -> None:
    """Train this rank's replacements of `plan`; write each to `<name>.safetensors`, its losses to `<name>.json`.

    `modulation_error`: see `ppcl.config.schema.Width`. `start`: files of replacements, made before, to begin with: they
    are trained on, and those that are not trained are taken as they are. A stopped run resumes from its checkpoints: a
    replacement that is further on than others waits for them and is not trained again.
    """
    start = start or {}
    rank = _Rank(teacher, samples, plan, settings, run, start)
    rank.initialize()
    rank.train()
    rank.write()
    low_rank = next((r for r in plan if isinstance(r, LowRankModulation)), None)
    if low_rank and run.dims.rank == 0:
        if low_rank in start:
            write_atomically(_file(run.folder, low_rank), start[low_rank].read_bytes())
        else:
            basis = fit_basis(rank.segment.transformer, samples, rank.ids, settings.batch_size, modulation_error)
            save_replacement(basis, low_rank, teacher.adapter, _file(run.folder, low_rank))
        _write_record(run.folder, low_rank)
    run.dims.barrier()


class _Rank:
    """One rank's segment of the teacher, with an objective for each of the segment's replacements."""

    def __init__(
        self,
        teacher: Teacher,
        samples: Samples,
        plan: Sequence[Replacement],
        settings: Distillation,
        run: RunContext,
        start: Mapping[Replacement, Path],
    ):
        self.start = start
        self.samples, self.settings, self.run, self.dims = samples, settings, run, run.dims
        self.teacher, self.adapter = teacher, teacher.adapter
        self.ids = samples.ids("train")
        self.plan: list[Replacement] = [r for r in plan if not isinstance(r, LowRankModulation)]
        count = self.adapter.block_ranges(teacher.empty_transformer())[-1].stop
        blocks = segment_of(self.dims.pp_rank, self.dims.pp, count, self.plan, settings.train)
        dtype = run.dtype(settings.precision)
        self.bfloat16 = dtype is torch.bfloat16
        self.segment = TeacherSegment(teacher, blocks, self.plan, run.device, dtype)
        self.pipeline_stage = PipelineStage(self.dims.pp_rank, self.dims.pp, self.dims.rank)
        # Nodes may see different files, and every rank looks before any rank writes: what all have counts.
        kept = self.dims.agreed([_file(run.checkpoints, r).exists() for r in self.plan])
        self.has_checkpoint = dict(zip(self.plan, kept, strict=True))
        transformer = self.segment.transformer
        blocks_here = TeacherBlocks(self.adapter, transformer, self.segment.blocks, count)
        self.objectives = {r: new_objective(blocks_here, r, settings) for r in self.segment.plan}
        for objective in self.objectives.values():
            objective.module.to(run.device)
        self.closed_form = {r: o for r, o in self.objectives.items() if not is_trained(o, settings)}
        self.trainees: dict[Replacement, Trainee] = {}
        self.seconds = 0.0

    def capture(self, ids: np.ndarray, spec: CaptureSpec) -> CapturedActivations:
        """Run the segment on some samples; gives what the spec names of the teacher's activations."""
        inputs = self.samples.batch(ids, self.run.device, self.segment.dtype)
        return self.segment.run(inputs, self.pipeline_stage, spec)

    def initialize(self) -> None:
        """Initialise in closed form what has no checkpoint and no file to start from; load those of the others."""
        if self._has_closed_form() and any(self._is_fresh(replacement) for replacement in self.plan):
            self._fit_closed_form()
        for replacement, objective in self.objectives.items():
            if is_trained(objective, self.settings) and replacement not in self.trainees:
                if replacement in self.start and not self.has_checkpoint[replacement]:
                    made = load_replacement(self.start[replacement], self.teacher, self.run.device, torch.float32)
                    objective.module.load_state_dict(made.state_dict())
                self.trainees[replacement] = Trainee(objective, self.settings, self.dims)
                if self.has_checkpoint[replacement]:
                    self.trainees[replacement].load(_file(self.run.checkpoints, replacement))
        self.trainees = {r: self.trainees[r] for r in self.objectives if r in self.trainees}

    def _is_fresh(self, replacement: Replacement) -> bool:
        return not self.has_checkpoint[replacement] and replacement not in self.start

    def _has_closed_form(self) -> bool:
        """Whether any objective of any rank starts in closed form: then all take part in that pass."""
        settings = self.settings
        only_intervals = all(isinstance(replacement, Interval) for replacement in self.plan)
        return settings.init == "affine" or settings.student_keep_percent < 100 or not only_intervals

    def _fit_closed_form(self) -> None:
        """Fit this rank's share of what has no checkpoint; each is saved as soon as it is fitted."""
        fresh = [objective for r, objective in self.objectives.items() if self._is_fresh(r)]
        ClosedForm(fresh, self.settings, self.run).fit(self._stream, self.ids, self._save_fitted)
        self.pipeline_stage.flush()

    def _stream(self, ids: np.ndarray, consumers: Sequence[Consumer]) -> None:
        """Run the segment on some samples; hands what consumers need to them, block by block."""
        inputs = self.samples.batch(ids, self.run.device, self.segment.dtype)
        self.segment.stream(inputs, self.pipeline_stage, consumers)

    def _save_fitted(self, objective: DistillationObjective) -> None:
        """Save a closed-form initialisation, which took a pass over all samples."""
        path = _file(self.run.checkpoints, objective.replacement)
        if is_trained(objective, self.settings):
            trainee = self.trainees[objective.replacement] = Trainee(objective, self.settings, self.dims)
            if self.dims.dp_rank == 0 and objective.moments():
                trainee.save(path)
        elif self.dims.dp_rank == 0:
            save_replacement(objective.module, objective.replacement, self.adapter, path)

    def train(self) -> None:
        """Train to the last step, from the step of the replacement that is least advanced on any rank."""
        steps = self.settings.steps
        spec = _union(trainee.objective.capture for trainee in self.trainees.values())
        # The least advanced one's, over all ranks.
        first = self.dims.minimum(min((trainee.state.step for trainee in self.trainees.values()), default=steps))
        started_at = time.monotonic()
        for step in range(first, steps):
            batch = batch_of(step, self.ids, self.settings.batch_size, self.run.seed)
            captured = self.capture(batch[self.dims.dp_rank :: self.dims.dp], spec)
            self.run.report(step + 1, steps, self._train_step(step, captured))
        self.pipeline_stage.flush()
        self.seconds = time.monotonic() - started_at

    def _train_step(self, step: int, captured: CapturedActivations) -> dict[str, float]:
        """Train every replacement that is not further on, one after another; gives their losses by name."""
        settings, losses = self.settings, {}
        every = max(1, settings.steps // _HISTORY_POINTS)
        saves = (step + 1) % settings.checkpoint_every == 0 or step + 1 == settings.steps
        for replacement, trainee in self.trainees.items():
            if trainee.state.step > step:
                continue
            terms = trainee.train_step(captured, self.bfloat16)
            losses[replacement.name] = terms["loss"]
            trainee.state.record(terms, every)
            if saves and self.dims.dp_rank == 0:
                trainee.save(_file(self.run.checkpoints, replacement))
        return losses

    def write(self) -> None:
        """Write the finished replacements, and a record of each one's training."""
        folder = self.run.folder
        if self.dims.dp_rank != 0:
            return
        for replacement, trainee in self.trainees.items():
            save_replacement(trainee.export(), replacement, self.adapter, _file(folder, replacement))
            _write_record(folder, replacement, trainee.state, self.seconds)
        for replacement in self.closed_form:
            folder.mkdir(parents=True, exist_ok=True)
            made = self.start.get(replacement) or _file(self.run.checkpoints, replacement)
            write_atomically(_file(folder, replacement), made.read_bytes())
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


def _write_record(
    folder: Path, replacement: Replacement, state: TrainState | None = None, seconds: float = 0.0
) -> None:
    record = {
        "curve": state.loss_history if state else [],
        "skipped_steps": state.skipped_steps if state else 0,
        "seconds": round(seconds, 2),
    }
    write_atomically(folder / f"{replacement.name}.json", json.dumps(record))
