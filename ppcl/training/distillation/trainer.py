"""What one rank does in distillation: its segment of the teacher, its replacements, and nothing else in memory.

    receive X from the rank before → run the segment's blocks → send X on at once → train the segment's replacements

Depth and width are trained in one phase, on one pass over the teacher: a objective reads the teacher's own streams alone,
which its own rank has just computed, so it does not matter which objectives there are beside it.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Sequence
from functools import reduce
from operator import or_
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ppcl.config.schema import Distillation
from ppcl.models.teacher import Teacher
from ppcl.replacements.io import save_replacement
from ppcl.replacements.low_rank_modulation import fit_basis
from ppcl.replacements.plan import Ffn, Interval, LowRankModulation, Replacement
from ppcl.storage.manifest import write_atomically
from ppcl.training.captured import CapturedActivations, CaptureSpec
from ppcl.training.data import Samples, batch_of
from ppcl.training.distillation.closed_form import fit_closed_form
from ppcl.training.distillation.objectives import new_objective
from ppcl.training.parallel_dims import ParallelDims
from ppcl.training.pipeline import PipelineStage, balanced_segments
from ppcl.training.teacher_segment import TeacherSegment
from ppcl.training.trainee import Trainee

# What training costs beside a teacher block's forward: a student its own forward and a backward of twice that, a block
# of a text run the same; an FFN's maps are two products.
STUDENT_COST = 3.0
FFN_COST = 0.25
_CURVE_POINTS = 200


def segment_of(stage: int, pp: int, blocks: int, plan: Sequence[Replacement]) -> range:
    """The blocks of one stage, balanced by cost, cut between the replacements of the plan."""
    costs = [1.0] * blocks
    for replacement in plan:
        if isinstance(replacement, Ffn):
            costs[replacement.block] += 0.0 if replacement.keep_percent else FFN_COST
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
    report: Callable[[int, int, dict[str, float]], None],
    modulation_error: float = 0.0,
) -> None:
    """Train the replacements of this rank and write them to `folder/<replacement>.safetensors`, their curves beside them.

    `report(step, steps, losses)` is called after every step. `modulation_error`: see `ppcl.config.schema.Width`. Continues from what lies in `checkpoints`; what is further
    on than others waits for them without being trained again.
    """
    adapter = teacher.adapter
    count = adapter.block_ranges(teacher.empty_transformer())[-1].stop
    bfloat16 = settings.precision == "bfloat16" or (settings.precision == "auto" and device.startswith("cuda"))
    fold = next((replacement for replacement in plan if isinstance(replacement, LowRankModulation)), None)
    plan = [replacement for replacement in plan if replacement is not fold]
    part = segment_of(dims.pp_rank, dims.pp, count, plan)
    segment = TeacherSegment(teacher, part, plan, device, torch.bfloat16 if bfloat16 else torch.float32)
    pipeline_stage = PipelineStage(dims.pp_rank, dims.pp, dims.rank)
    ids = samples.ids(held_out=False)

    # Every rank looks before any rank writes, so all agree on where to go on.
    found = {replacement: _file(checkpoints, replacement).exists() for replacement in plan}
    dims.barrier()
    objectives = {
        replacement: new_objective(adapter, segment.transformer, segment.blocks, replacement, settings, count)
        for replacement in segment.plan
    }
    for objective in objectives.values():
        objective.module.to(device)

    def captured(rows: np.ndarray, wanted: CaptureSpec) -> CapturedActivations:
        return segment.run(samples.batch(rows, device, segment.dtype), pipeline_stage, wanted)

    closed = {
        replacement: objective for replacement, objective in objectives.items() if not hasattr(objective, "losses")
    }
    if _has_closed_start(plan, settings) and not all(found.values()):
        fresh = [objective for replacement, objective in objectives.items() if not found[replacement]]
        wanted = reduce(or_, (objective.init_capture for objective in fresh), CaptureSpec())
        fit_closed_form(fresh, lambda rows: captured(rows, wanted), ids, settings.batch_size, settings.ridge, dims)
        pipeline_stage.flush()
        for replacement, objective in closed.items():
            if dims.dp_rank == 0 and not found[replacement]:
                save_replacement(objective.module, replacement, adapter, _file(checkpoints, replacement))
    trainees = {
        replacement: Trainee(objective, settings, dims)
        for replacement, objective in objectives.items()
        if replacement not in closed
    }
    wanted = reduce(or_, (trainee.objective.capture for trainee in trainees.values()), CaptureSpec())
    for replacement, trainee in trainees.items():
        if found[replacement]:
            trainee.load(_file(checkpoints, replacement))
        elif dims.dp_rank == 0 and trainee.objective.sums():
            trainee.save(_file(checkpoints, replacement))  # its start took a pass over all samples

    first = _first_step(dims, [p.step for p in trainees.values()], settings.steps)
    every = max(1, settings.steps // _CURVE_POINTS)
    begun = time.monotonic()
    for step in range(first, settings.steps):
        now = captured(batch_of(step, ids, settings.batch_size, seed)[dims.dp_rank :: dims.dp], wanted)
        losses = {}
        for replacement, trainee in trainees.items():
            if trainee.step > step:
                continue
            parts = trainee.train_step(now, bfloat16)
            losses[replacement.name] = parts["loss"]
            if step % every == 0 or step == settings.steps - 1:
                trainee.loss_history.append({"step": step, **{k: round(v, 6) for k, v in parts.items()}})
            if (step + 1) % settings.checkpoint_every == 0 and dims.dp_rank == 0:
                trainee.save(_file(checkpoints, replacement))
        report(step + 1, settings.steps, losses)
    pipeline_stage.flush()
    seconds = time.monotonic() - begun
    if fold and dims.rank == 0:
        basis = fit_basis(segment.transformer, samples, ids, settings.batch_size, modulation_error)
        save_replacement(basis, fold, adapter, _file(folder, fold))
        _write(folder / f"{fold.name}.json", {"curve": [], "skipped_steps": 0, "seconds": 0.0})
    if dims.dp_rank == 0:
        for replacement, trainee in trainees.items():
            if trainee.step == settings.steps and first < settings.steps:
                trainee.save(_file(checkpoints, replacement))
            save_replacement(trainee.export(), replacement, adapter, _file(folder, replacement))
            record = {"curve": trainee.loss_history, "skipped_steps": trainee.skipped, "seconds": round(seconds, 2)}
            _write(folder / f"{replacement.name}.json", record)
        for replacement in closed:
            folder.mkdir(parents=True, exist_ok=True)
            write_atomically(_file(folder, replacement), _file(checkpoints, replacement).read_bytes())
            _write(folder / f"{replacement.name}.json", {"curve": [], "skipped_steps": 0, "seconds": 0.0})
    dims.barrier()


def _has_closed_start(plan: Sequence[Replacement], settings: Distillation) -> bool:
    """Whether any objective of any rank starts in closed form: then all take part in that pass."""
    return (
        settings.init == "affine"
        or settings.student_keep_percent < 100
        or not all(isinstance(replacement, Interval) for replacement in plan)
    )


def _file(folder: Path, replacement: Replacement) -> Path:
    return folder / f"{replacement.name}.safetensors"


def _first_step(dims: ParallelDims, steps: list[int], last: int) -> int:
    """The least advanced student's step, over all ranks."""
    least = torch.tensor([min(steps, default=last)])
    if dims.pp * dims.dp > 1:
        torch.distributed.all_reduce(least, op=torch.distributed.ReduceOp.MIN)
    return int(least)


def _write(path: Path, record: dict[str, Any]) -> None:
    write_atomically(path, json.dumps(record))
