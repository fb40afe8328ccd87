"""Protections that other work gives a student, each against the plain distillation: velocity errors after equal steps.

    python benchmarks/protections.py runs/demo --steps 200 --seeds 3

- mean start: a student's block is the mean of the blocks it stands for, its affine map fitted behind that.
- sensitivity: the learning rate of a student falls with the sensitivity that its interval does, as the fourth root.
- massive: values beyond 20 times the mean magnitude of a token count nowhere in the loss.
- noisy: a sample's loss weighs by its share of noise, 2 t.

Takes the calibration set, the intervals and their sensitivities from a finished job; nothing of the job is changed.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import torch
from rich.console import Console
from rich.table import Table

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from ppcl.calibration.dataset import CalibrationSet
from ppcl.calibration.splits import Split
from ppcl.config.schema import Config, Distillation
from ppcl.evaluation.velocity_error import ErrorSums, variant_errors
from ppcl.models.teacher import Teacher
from ppcl.replacements import Interval
from ppcl.replacements.io import files_in
from ppcl.replacements.switcher import VariantSwitcher
from ppcl.storage.manifest import CONFIG
from ppcl.training.captured import CapturedActivations, CaptureSpec
from ppcl.training.distillation import trainer as run
from ppcl.training.distillation.objectives import MomentUpdate, StudentObjective, TeacherBlocks
from ppcl.training.distillation.trainee import Trainee
from ppcl.training.losses import relative
from ppcl.training.parallel_dims import ParallelDims
from ppcl.training.run_context import RunContext

_MASSIVE = 20.0


class Watched:
    """Samples that remember the shares of noise of the batch last taken."""

    def __init__(self, samples: CalibrationSet, teacher: Teacher):
        self.samples, self.adapter = samples, teacher.adapter
        self.noise = torch.zeros(0)

    def ids(self, split: Split) -> np.ndarray:
        return self.samples.ids(split)

    def batch(self, ids: Sequence[int], device: str, dtype: torch.dtype) -> dict[str, Any]:
        inputs = self.samples.batch(ids, device, dtype)
        self.noise = inputs[self.adapter.timestep] / self.adapter.timestep_scale
        return inputs


class MeanStart(StudentObjective):
    def __init__(self, teacher: TeacherBlocks, replacement: Interval, settings: Distillation):
        super().__init__(teacher, replacement, settings)
        self.init_capture = CaptureSpec(frozenset({replacement.first, replacement.last + 1}))
        removed = [dict(teacher.blocks[number].named_parameters()) for number in replacement.blocks]
        with torch.no_grad():
            for name, parameter in self.module.block.named_parameters():
                parameter.copy_(torch.stack([block[name].float() for block in removed]).mean(0))

    @torch.no_grad()
    def pairs(self, captured: CapturedActivations) -> Iterator[MomentUpdate]:
        joined = self.module.adapter.join(captured.boundaries[self.replacement.first], captured.context)
        before = self.module.adapter.from_returned(self.module.block(**joined))
        after = captured.boundaries[self.replacement.last + 1]
        for name in self.module.affine:
            x = captured.tokens(getattr(before, name), name)
            yield name, x, captured.tokens(getattr(after, name), name) - x


def massive(
    student: torch.Tensor, teacher: torch.Tensor, mask: torch.Tensor | None = None
) -> tuple[torch.Tensor, float]:
    kept = teacher.abs() <= _MASSIVE * teacher.abs().mean(-1, keepdim=True)
    return relative(student * kept, teacher * kept, mask)


def noisy(watched: Watched) -> Callable[..., tuple[torch.Tensor, float]]:
    def loss(
        student: torch.Tensor, teacher: torch.Tensor, mask: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, float]:
        weight = (2 * watched.noise).sqrt().view(-1, 1, 1).to(teacher)
        return relative(student * weight, teacher * weight, mask)

    return loss


class Sensitive(Trainee):
    """`scales`: of the learning rate, by interval."""

    scales: dict[Interval, float] = {}

    def __init__(self, objective: Any, settings: Any, dims: ParallelDims):
        rate = settings.learning_rate * self.scales[objective.replacement]
        super().__init__(objective, settings.model_copy(update={"learning_rate": rate}), dims)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("job", type=Path, help="folder of a finished job")
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--json", type=Path, help="write the figures there")
    options = parser.parse_args()
    config = Config.model_validate_json((options.job / CONFIG).read_text())
    teacher = Teacher(config.teacher)
    watched = Watched(CalibrationSet(options.job / "calibration"), teacher)
    intervals = [
        Interval(*p) for p in json.loads((options.job / "detection" / "detection.json").read_text())["intervals"]
    ]
    sensitivity = json.loads((options.job / "variants" / "variants.json").read_text())["damage"]
    least = min(sensitivity[str(interval)] for interval in intervals)
    Sensitive.scales = {interval: (least / sensitivity[str(interval)]) ** 0.25 for interval in intervals}
    settings = config.distillation.model_copy(
        update={
            "steps": options.steps,
            "warmup": options.steps // 10,
            "pipeline_parallel": 1,
            "data_parallel": 1,
            "loss": "relative",
        }
    )
    ways = {
        "plain": {},
        "mean start": {"new_objective": MeanStart},
        "sensitivity": {"Trainee": Sensitive},
        "massive": {"loss": massive},
        "noisy": {"loss": noisy(watched)},
    }

    def errors(way: dict[str, Any], seed: int) -> tuple[float, float]:
        loss = way.get("loss", relative)
        with tempfile.TemporaryDirectory() as out, ExitStack() as patches:
            patches.enter_context(patch.dict("ppcl.training.distillation.trainee.LOSSES", {"relative": loss}))
            for name, value in way.items():
                if name != "loss":
                    patches.enter_context(patch.object(run, name, value))
            run.distil(teacher, watched, intervals, settings, RunContext(Path(out), Path(out) / "c", seed))
            return velocity_errors(teacher, Path(out), intervals, watched)

    table = Table(
        title=f"{sum(i.removed for i in intervals)} blocks removed, {options.steps} steps, {options.seeds} seeds"
    )
    for heading in ("protection", "velocity error", "of the noisier half", "against plain, by seed"):
        table.add_column(heading)
    rows: dict[str, list[tuple[float, float]]] = {name: [] for name in ways}
    for seed in range(options.seeds):
        for name, way in ways.items():
            rows[name].append(errors(way, seed))
            print(f"seed {seed}, {name}: {rows[name][-1][0]:.5f}, noisier half {rows[name][-1][1]:.5f}", flush=True)
    for name, found in rows.items():
        whole, half = np.mean(found, 0)
        ratios = " ".join(f"{a[0] / b[0]:.3f}" for a, b in zip(found, rows["plain"], strict=True))
        table.add_row(name, f"{whole:.5f}", f"{half:.5f}", ratios)
    Console(width=120).print(table)
    if options.json:
        names = [str(interval) for interval in intervals]
        options.json.write_text(json.dumps({"steps": options.steps, "intervals": names, "rows": rows}, indent=1))


def velocity_errors(
    teacher: Teacher, students: Path, intervals: list[Interval], samples: Watched
) -> tuple[float, float]:
    """The velocity error on held-out samples with all students on: of all, and of those with more noise than image."""
    model, switch = teacher.transformer(), VariantSwitcher(teacher, files_in(students))
    ids = samples.ids("validation")
    parts = [
        variant_errors(model, switch, {"all": intervals}, samples.batch(ids[i : i + 32], "cpu", torch.float32))["all"]
        for i in range(0, len(ids), 32)
    ]
    squares = ErrorSums.joined(parts)
    half = squares.timestep > 0.5
    return squares.overall(), ErrorSums(squares.timestep[half], squares.error[half], squares.norm[half]).overall()


if __name__ == "__main__":
    torch.set_grad_enabled(True)
    main()
