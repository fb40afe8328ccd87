"""What one rank does in distillation: its segment of the teacher, its replacements, and nothing else in memory.

    receive X from the rank before → run the segment's blocks → send X on at once → train the segment's replacements

Depth and width are trained in one phase, on one pass over the teacher: a lesson reads the teacher's own streams alone,
which its own rank has just computed, so it does not matter which lessons there are beside it.
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
from ppcl.replacements.io import save
from ppcl.replacements.low_rank_modulation import fit_basis
from ppcl.replacements.plan import Entry, Ffn, Fold, Interval
from ppcl.storage.manifest import write_atomically
from ppcl.training.captured import Seen, Wanted
from ppcl.training.data import Samples, batch_of
from ppcl.training.distillation.closed_form import fit_starts
from ppcl.training.distillation.objectives import new_lesson
from ppcl.training.parallel_dims import Mesh
from ppcl.training.pipeline import Chain, segments
from ppcl.training.teacher_segment import Segment
from ppcl.training.trainee import Pupil

# What training costs beside a teacher block's forward: a student its own forward and a backward of twice that, a block
# of a text run the same; an FFN's maps are two products.
STUDENT_COST = 3.0
FFN_COST = 0.25
_CURVE_POINTS = 200






def segment_of(stage: int, pp: int, blocks: int, plan: Sequence[Entry]) -> range:
    """The blocks of one stage, balanced by cost, cut between the entries of the plan."""
    costs = [1.0] * blocks
    for entry in plan:
        if isinstance(entry, Ffn):
            costs[entry.block] += 0.0 if entry.kept else FFN_COST
        elif isinstance(entry, Interval):
            costs[entry.last] += STUDENT_COST
        else:
            for block in entry.blocks[1:]:
                costs[block] += STUDENT_COST
    return segments(costs, pp, plan)[stage]






def distil(
    teacher: Teacher,
    samples: Samples,
    plan: Sequence[Entry],
    settings: Distillation,
    mesh: Mesh,
    folder: Path,
    checkpoints: Path,
    seed: int,
    device: str,
    report: Callable[[int, int, dict[str, float]], None],
    modulation_error: float = 0.0,
) -> None:
    """Train the replacements of this rank and write them to `folder/<entry>.safetensors`, their curves beside them.

    `report(step, steps, losses)` is called after every step. `modulation_error`: see `ppcl.config.schema.Width`. Continues from what lies in `checkpoints`; what is further
    on than others waits for them without being trained again.
    """
    architecture = teacher.architecture
    count = architecture.spans(teacher.empty_transformer())[-1].stop
    bfloat16 = settings.precision == "bfloat16" or (settings.precision == "auto" and device.startswith("cuda"))
    fold = next((entry for entry in plan if isinstance(entry, Fold)), None)
    plan = [entry for entry in plan if entry is not fold]
    part = segment_of(mesh.stage, mesh.pp, count, plan)
    segment = Segment(teacher, part, plan, device, torch.bfloat16 if bfloat16 else torch.float32)
    chain = Chain(mesh.stage, mesh.pp, mesh.rank)
    ids = samples.ids(held_out=False)

    # Every rank looks before any rank writes, so all agree on where to go on.
    found = {entry: _file(checkpoints, entry).exists() for entry in plan}
    mesh.barrier()
    lessons = {
        entry: new_lesson(architecture, segment.transformer, segment.blocks, entry, settings, count)
        for entry in segment.plan
    }
    for lesson in lessons.values():
        lesson.module.to(device)

    def seen(rows: np.ndarray, wanted: Wanted) -> Seen:
        return segment.run(samples.batch(rows, device, segment.dtype), chain, wanted)

    closed = {entry: lesson for entry, lesson in lessons.items() if not hasattr(lesson, "losses")}
    if _has_closed_start(plan, settings) and not all(found.values()):
        fresh = [lesson for entry, lesson in lessons.items() if not found[entry]]
        wanted = reduce(or_, (lesson.wanted_to_start for lesson in fresh), Wanted())
        fit_starts(fresh, lambda rows: seen(rows, wanted), ids, settings.batch_size, settings.ridge, mesh)
        chain.flush()
        for entry, lesson in closed.items():
            if mesh.replica == 0 and not found[entry]:
                save(lesson.module, entry, architecture, _file(checkpoints, entry))
    pupils = {entry: Pupil(lesson, settings, mesh) for entry, lesson in lessons.items() if entry not in closed}
    wanted = reduce(or_, (pupil.lesson.wanted for pupil in pupils.values()), Wanted())
    for entry, pupil in pupils.items():
        if found[entry]:
            pupil.load(_file(checkpoints, entry))
        elif mesh.replica == 0 and pupil.lesson.sums():
            pupil.save(_file(checkpoints, entry))  # its start took a pass over all samples

    first = _first_step(mesh, [p.step for p in pupils.values()], settings.steps)
    every = max(1, settings.steps // _CURVE_POINTS)
    begun = time.monotonic()
    for step in range(first, settings.steps):
        now = seen(batch_of(step, ids, settings.batch_size, seed)[mesh.replica :: mesh.dp], wanted)
        losses = {}
        for entry, pupil in pupils.items():
            if pupil.step > step:
                continue
            parts = pupil.learn(now, bfloat16)
            losses[entry.name] = parts["loss"]
            if step % every == 0 or step == settings.steps - 1:
                pupil.curve.append({"step": step, **{k: round(v, 6) for k, v in parts.items()}})
            if (step + 1) % settings.checkpoint_every == 0 and mesh.replica == 0:
                pupil.save(_file(checkpoints, entry))
        report(step + 1, settings.steps, losses)
    chain.flush()
    seconds = time.monotonic() - begun
    if fold and mesh.rank == 0:
        basis = fit_basis(segment.transformer, samples, ids, settings.batch_size, modulation_error)
        save(basis, fold, architecture, _file(folder, fold))
        _write(folder / f"{fold.name}.json", {"curve": [], "skipped_steps": 0, "seconds": 0.0})
    if mesh.replica == 0:
        for entry, pupil in pupils.items():
            if pupil.step == settings.steps and first < settings.steps:
                pupil.save(_file(checkpoints, entry))
            save(pupil.trained(), entry, architecture, _file(folder, entry))
            record = {"curve": pupil.curve, "skipped_steps": pupil.skipped, "seconds": round(seconds, 2)}
            _write(folder / f"{entry.name}.json", record)
        for entry in closed:
            folder.mkdir(parents=True, exist_ok=True)
            write_atomically(_file(folder, entry), _file(checkpoints, entry).read_bytes())
            _write(folder / f"{entry.name}.json", {"curve": [], "skipped_steps": 0, "seconds": 0.0})
    mesh.barrier()


def _has_closed_start(plan: Sequence[Entry], settings: Distillation) -> bool:
    """Whether any lesson of any rank starts in closed form: then all take part in that pass."""
    return settings.start == "affine" or settings.student_hidden < 100 or not all(isinstance(entry, Interval) for entry in plan)


def _file(folder: Path, entry: Entry) -> Path:
    return folder / f"{entry.name}.safetensors"


def _first_step(mesh: Mesh, steps: list[int], last: int) -> int:
    """The least advanced student's step, over all ranks."""
    least = torch.tensor([min(steps, default=last)])
    if mesh.pp * mesh.dp > 1:
        torch.distributed.all_reduce(least, op=torch.distributed.ReduceOp.MIN)
    return int(least)


def _write(path: Path, record: dict[str, Any]) -> None:
    write_atomically(path, json.dumps(record))
