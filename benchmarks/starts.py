"""What a student starts from, and its training loss: the velocity error of all students on, after equal steps.

    python benchmarks/starts.py runs/demo --steps 200 --seeds 3

Takes the calibration set and the intervals of a finished job; nothing of the job is changed.
"""

from __future__ import annotations

import argparse
import itertools
import json
import sys
import tempfile
from pathlib import Path

import numpy as np
import torch
from rich.console import Console
from rich.table import Table

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from ppcl.calibration.dataset import CalibrationSet
from ppcl.config.schema import Config
from ppcl.evaluation.velocity_error import ErrorSums, variant_errors
from ppcl.models.teacher import Teacher
from ppcl.replacements import Interval
from ppcl.replacements.io import files_in
from ppcl.replacements.switcher import VariantSwitcher
from ppcl.storage.manifest import CONFIG
from ppcl.training.distillation.trainer import distil
from ppcl.training.run_context import RunContext


def velocity_error(teacher: Teacher, students: Path, intervals: list[Interval], samples: CalibrationSet) -> float:
    model, switch = teacher.transformer(), VariantSwitcher(teacher, files_in(students))
    ids = samples.ids("validation")
    parts = [
        variant_errors(model, switch, {"all": intervals}, samples.batch(ids[i : i + 32]))["all"]
        for i in range(0, len(ids), 32)
    ]
    return ErrorSums.joined(parts).overall()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("job", type=Path, help="folder of a finished job")
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--starts", default="affine,first,middle")
    parser.add_argument("--losses", default="normalized")
    parser.add_argument("--rates", help="learning rates; default: the job's")
    parser.add_argument("--json", type=Path, help="write the figures there")
    options = parser.parse_args()
    config = Config.model_validate_json((options.job / CONFIG).read_text())
    teacher, samples = Teacher(config.teacher), CalibrationSet(options.job / "calibration")
    found = json.loads((options.job / "detection" / "detection.json").read_text())["intervals"]
    intervals = [Interval(*pair) for pair in found]
    rows = []
    rates = [float(r) for r in options.rates.split(",")] if options.rates else [config.distillation.learning_rate]
    table = Table(
        title=f"{sum(i.removed for i in intervals)} blocks removed, {options.steps} steps, {options.seeds} seeds"
    )
    for heading in ("start", "loss", "rate", "velocity error, mean", "by seed"):
        table.add_column(heading)
    for start, loss, rate in itertools.product(options.starts.split(","), options.losses.split(","), rates):
        errors = []
        for seed in range(options.seeds):
            settings = config.distillation.model_copy(
                update={
                    "steps": options.steps,
                    "init": start,
                    "loss": loss,
                    "learning_rate": rate,
                    "pipeline_parallel": 1,
                    "data_parallel": 1,
                }
            )
            with tempfile.TemporaryDirectory() as out:
                distil(teacher, samples, intervals, settings, RunContext(Path(out), Path(out) / "c", seed))
                errors.append(velocity_error(teacher, Path(out), intervals, samples))
            print(f"{start}, {loss}, {rate:g}, seed {seed}: {errors[-1]:.5f}", flush=True)
        rows.append({"start": start, "loss": loss, "learning_rate": rate, "velocity_errors": errors})
        table.add_row(start, loss, f"{rate:g}", f"{np.mean(errors):.5f}", " ".join(f"{e:.5f}" for e in errors))
    Console(width=120).print(table)
    if options.json:
        options.json.write_text(json.dumps({"steps": options.steps, "intervals": found, "rows": rows}, indent=1))


if __name__ == "__main__":
    torch.set_grad_enabled(True)
    main()
