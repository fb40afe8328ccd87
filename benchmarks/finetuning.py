"""What fine-tuning is worth: the quality of one variant, by steps, share of states of its own, and what is trained.

    python benchmarks/finetuning.py runs/demo --variant half --steps 300,1000 --own 0,0.5
    python benchmarks/finetuning.py runs/demo --variant half --steps 300 --own 0.5 --train replacements,all

Every run starts from the students of a finished job; nothing of the job is changed. Velocity errors are on samples of
the split test. R is the mean relative drop of the checker score against the teacher, over images from the same seeds.
"""

from __future__ import annotations

import argparse
import itertools
import json
import sys
import tempfile
import time
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
from ppcl.evaluation.samples import REPORT_SAMPLES
from ppcl.evaluation.scoring import relative_drop
from ppcl.evaluation.velocity_error import ErrorSums, variant_errors
from ppcl.models.teacher import Teacher
from ppcl.replacements import Replacement
from ppcl.replacements.io import files_in
from ppcl.replacements.switcher import VariantSwitcher
from ppcl.search.variants import read_catalog
from ppcl.storage.manifest import CONFIG
from ppcl.training.data import spread_samples
from ppcl.training.finetuning.trainer import DistilledReplacements, finetune
from ppcl.training.run_context import RunContext


class Judge:
    """The velocity error of a variant, given by its files, and the checker's score of its images."""

    def __init__(self, config: Config, teacher: Teacher, samples: CalibrationSet, pictures: int):
        self.config, self.teacher, self.samples = config, teacher, samples
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

    def figures(self, files: dict[Replacement, Path]) -> dict[str, float]:
        """With all of these on."""
        switch, plan = VariantSwitcher(self.teacher, files), tuple(files)
        ids, size = spread_samples(self.samples.ids("test"), REPORT_SAMPLES), self.config.evaluation.batch_size
        batches = [self.samples.batch(ids[start : start + size]) for start in range(0, len(ids), size)]
        transformer = self.pipeline.transformer
        errors = [variant_errors(transformer, switch, {"it": plan}, batch)["it"] for batch in batches]
        right = self.right(switch, plan)
        drop = relative_drop(right, self.teachers, self.config.evaluation.confidence, self.config.seed)
        score = 100 * float(np.concatenate(list(right.values())).mean())
        return {"velocity_error": ErrorSums.joined(errors).overall(), "score": score} | drop


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("job", type=Path, help="folder of a finished job")
    parser.add_argument("--variant", default="half")
    parser.add_argument("--steps", default="300,1000", help="numbers of steps")
    parser.add_argument("--own", default="0,0.5", help="shares of a batch from the variant's own trajectories")
    parser.add_argument("--train", default="replacements", help="what is trained: replacements, all")
    parser.add_argument("--pictures", type=int, default=768)
    parser.add_argument("--json", type=Path, help="write the figures there")
    options = parser.parse_args()
    diffusers.utils.logging.set_verbosity_error()
    config = Config.model_validate_json((options.job / CONFIG).read_text())
    family = read_catalog(options.job / "variants")
    plan, teacher = family.variants[options.variant].plan, Teacher(config.teacher)
    samples = CalibrationSet(options.job / "calibration")
    judge = Judge(config, teacher, samples, options.pictures)
    files = {entry: path for entry, path in files_in(options.job / "students").items() if entry in plan}
    rows: list[dict[str, Any]] = [{"steps": 0} | judge.figures(files)]
    runs = itertools.product(
        map(int, options.steps.split(",")), map(float, options.own.split(",")), options.train.split(",")
    )
    for steps, own, train in runs:
        settings = config.finetuning.model_copy(
            update={
                "steps": steps,
                "rollout_share": own,
                "plan": options.variant,
                "train": train,
                "variants": [],
                "data_parallel": 1,
                "measured_plans": 0,
            }
        )
        with tempfile.TemporaryDirectory() as out:
            started_at = time.process_time()
            with torch.enable_grad():
                finetune(
                    teacher,
                    samples,
                    DistilledReplacements(files, {options.variant: plan}, {}),
                    settings,
                    RunContext(Path(out), Path(out) / "checkpoints", config.seed),
                    config.sampling,
                )
            seconds = time.process_time() - started_at
            row = {"steps": steps, "rollout_share": own, "train": train, "cpu_seconds": seconds}
            rows.append(row | judge.figures(files | files_in(Path(out))))
        print(rows[-1], flush=True)
    table = Table(title=f"{options.variant}: {', '.join(map(str, plan))}; {options.pictures} pictures")
    for heading in ("steps", "own states", "trained", "CPU seconds", "velocity error", "score, %", "R, %"):
        table.add_column(heading)
    for row in rows:
        shown = [f"{row['steps']}", f"{row.get('rollout_share', '')}", row.get("train", "")]
        shown += [f"{row['cpu_seconds']:.0f}" if "cpu_seconds" in row else "", f"{row['velocity_error']:.5f}"]
        drop = f"{row['R']:.1f} ({row['R_low']:.1f} to {row['R_high']:.1f})"
        table.add_row(*shown, f"{row['score']:.1f}", drop)
    Console(width=120).print(table)
    if options.json:
        options.json.write_text(
            json.dumps({"variant": options.variant, "plan": list(map(str, plan)), "rows": rows}, indent=1)
        )


if __name__ == "__main__":
    main()
