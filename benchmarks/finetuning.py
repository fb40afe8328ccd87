"""What fine-tuning is worth: the quality of one variant, by numbers of steps and by the share of states of its own.

    python benchmarks/finetuning.py runs/demo --variant half --steps 300,1000 --own 0,0.5

Every run starts from the students of a finished job; nothing of the job is changed. R is the mean relative drop of the
world score against the teacher, over images from the same seeds.
"""

from __future__ import annotations

import argparse
import itertools
import json
import sys
import tempfile
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import torch
from rich.console import Console
from rich.table import Table

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from ppcl.calibration.dataset import CalibrationSet
from ppcl.config.schema import Config
from ppcl.evaluation.images import generate_images
from ppcl.evaluation.prompt_checker import checker_prompts, correctness, load_checker
from ppcl.evaluation.scoring import relative_drop
from ppcl.models.teacher import Teacher
from ppcl.replacements import Replacement
from ppcl.replacements.io import files_in
from ppcl.replacements.switcher import VariantSwitcher
from ppcl.search.variants import read_catalog
from ppcl.storage.manifest import CONFIG
from ppcl.training.finetuning.trainer import DistilledReplacements, finetune
from ppcl.training.run_context import RunContext


class Judge:
    """The world's score of a plan of the files in a folder."""

    def __init__(self, config: Config, teacher: Teacher, pictures: int):
        self.config, self.teacher = config, teacher
        self.pipeline = teacher.pipeline("cpu", torch.float32)
        self.world = load_checker(config.evaluation.checker)
        self.prompts = checker_prompts(self.world, pictures, config.seed)
        self.teachers = self.right(VariantSwitcher(teacher, {}), ())

    @torch.no_grad()
    def right(self, switch: VariantSwitcher, plan: tuple[Replacement, ...]) -> dict[str, np.ndarray]:
        switch(self.pipeline.transformer, plan)
        right: dict[str, list[bool]] = {}
        size = self.config.evaluation.batch_size
        for start in range(0, len(self.prompts), size):
            some = self.prompts[start : start + size]
            seeds = [1_000_000 + self.config.seed + start + index for index in range(len(some))]
            made = generate_images(self.pipeline, [p.text for p in some], seeds, self.config.sampling)
            for category, found in correctness(self.world, made, some).items():
                right.setdefault(category, []).extend(found)
        switch(self.pipeline.transformer, ())
        return {category: np.asarray(found, np.float64) for category, found in right.items()}

    def drop(self, files: dict[Replacement, Path], plan: tuple[Replacement, ...]) -> dict[str, float]:
        right = self.right(VariantSwitcher(self.teacher, files), plan)
        return relative_drop(right, self.teachers, self.config.evaluation.confidence, self.config.seed)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("job", type=Path, help="folder of a finished job")
    parser.add_argument("--variant", default="half")
    parser.add_argument("--steps", default="300,1000", help="numbers of steps")
    parser.add_argument("--own", default="0,0.5", help="shares of a batch from the variant's own trajectories")
    parser.add_argument("--pictures", type=int, default=768)
    parser.add_argument("--json", type=Path, help="write the figures there")
    options = parser.parse_args()
    diffusers.utils.logging.set_verbosity_error()
    config = Config.model_validate_json((options.job / CONFIG).read_text())
    family = read_catalog(options.job / "variants")
    plan, teacher = family.variants[options.variant].plan, Teacher(config.teacher)
    samples, judge = CalibrationSet(options.job / "calibration"), Judge(config, teacher, options.pictures)
    files = {entry: path for entry, path in files_in(options.job / "students").items() if entry in plan}
    rows: list[dict[str, Any]] = [{"steps": 0} | judge.drop(files, plan)]
    for steps, own in itertools.product(map(int, options.steps.split(",")), map(float, options.own.split(","))):
        settings = config.finetuning.model_copy(
            update={
                "steps": steps,
                "rollout_share": own,
                "plan": options.variant,
                "variants": [],
                "data_parallel": 1,
                "measured_plans": 0,
            }
        )
        with tempfile.TemporaryDirectory() as out:
            with torch.enable_grad():
                finetune(
                    teacher,
                    samples,
                    DistilledReplacements(files, {options.variant: plan}, {}),
                    settings,
                    RunContext(Path(out), Path(out) / "checkpoints", config.seed),
                    config.sampling,
                )
            (told,) = json.loads((Path(out) / "finetuning.json").read_text())["plans"]
            row = {"steps": steps, "rollout_share": own, "velocity_error": told["after"]}
            rows.append(row | judge.drop(files | files_in(Path(out)), plan))
        print(rows[-1], flush=True)
    table = Table(title=f"{options.variant}: {', '.join(map(str, plan))}; {options.pictures} pictures")
    for heading in ("steps", "own states", "velocity error", "R, %"):
        table.add_column(heading)
    for row in rows:
        shown = [row["steps"], row.get("rollout_share")]
        error = f"{row['velocity_error']:.5f}" if "velocity_error" in row else ""
        drop = f"{row['R']:.1f} ({row['R_low']:.1f} to {row['R_high']:.1f})"
        table.add_row(*("" if value is None else f"{value:g}" for value in shown), error, drop)
    Console(width=120).print(table)
    if options.json:
        options.json.write_text(
            json.dumps({"variant": options.variant, "plan": list(map(str, plan)), "rows": rows}, indent=1)
        )


if __name__ == "__main__":
    main()
