"""What helps students to recover, after equal steps: initialisations, maps that fade out, cheap changes of training.

    python benchmarks/recovery.py runs/demo --json benchmarks/results/recovery.json

Distillation: all ways read the teacher's streams of the same batches, so one pass of the teacher per step trains the
students of all. `map stays` is the default; every other way differs from it in one thing:

- first: starts as block `u` alone (the paper).
- fade 0.3, 0.6, 0.9: the map is `x + s (W x + b)`, with `s` in a line from 1 to 0 over that share of the steps, and is
  dropped then; the student ends as a stock block, as it does with `first`.
- warm-up 30 %: three times as long a warm-up of the learning rate, which is a cosine to zero in all ways.
- noisy: a sample's loss weighs by its share of noise, 2 t.

The error of a student is that of its image stream against the teacher's behind the interval, over the energy of what
the interval adds, on the teacher's own streams of held-out samples; `velocity` is the error with all students on.

Fine-tuning: the job's variant `half` from its distilled students, plain; with the longer warm-up; noisy; and with
features (`finetuning.feature_loss`), whose loss has beside the velocity's error that of the streams behind the blocks.

Takes the calibration set, and for fine-tuning the students, of a finished job; nothing of the job is changed.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.table import Table

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from ppcl.calibration.dataset import CalibrationSet
from ppcl.config.schema import Config, Distillation, Finetuning
from ppcl.evaluation.velocity_error import ErrorSums, variant_errors
from ppcl.models.teacher import Teacher
from ppcl.replacements import Interval, Replacement
from ppcl.replacements.io import files_in, save_replacement
from ppcl.replacements.switcher import VariantSwitcher
from ppcl.search.variants import read_catalog
from ppcl.storage.manifest import CONFIG
from ppcl.training.captured import CapturedActivations, CaptureSpec
from ppcl.training.data import batch_of
from ppcl.training.distillation.closed_form import ClosedForm
from ppcl.training.distillation.objectives import StudentObjective, TeacherBlocks
from ppcl.training.distillation.trainee import Trainee
from ppcl.training.finetuning.plan_sampler import trainable
from ppcl.training.finetuning.trainer import feature_error
from ppcl.training.finetuning.variant_model import VariantModel
from ppcl.training.losses import LossTerm, relative
from ppcl.training.parallel_dims import ParallelDims
from ppcl.training.pipeline import PipelineStage
from ppcl.training.run_context import RunContext
from ppcl.training.teacher_segment import Consumer, TeacherSegment
from ppcl.training.train_state import TrainState

_HELD_OUT_BATCH = 48


class Fading(StudentObjective):
    """A student whose map counts by a scale `s`: 1 at the first step, 0 from the last of `share` of the steps on."""

    def __init__(self, teacher: TeacherBlocks, replacement: Interval, settings: Distillation, share: float):
        super().__init__(teacher, replacement, settings)
        self.last, self.step = max(1, round(share * settings.steps) - 1), 0
        for linear in self.linears().values():
            linear.register_forward_hook(lambda module, given, made: self.scale * made)

    @property
    def scale(self) -> float:
        return max(0.0, 1 - self.step / self.last)

    def losses(self, captured: CapturedActivations, loss_of: Any) -> dict[str, LossTerm]:
        terms = super().losses(captured, loss_of)
        self.step += 1
        return terms


class Noisy(StudentObjective):
    """A sample's loss weighs by its share of noise; `noise` has those of the batch."""

    noise = torch.zeros(0)

    def losses(self, captured: CapturedActivations, loss_of: Any) -> dict[str, LossTerm]:
        def weighted(student: torch.Tensor, teacher: torch.Tensor, mask: torch.Tensor | None) -> LossTerm:
            root = (2 * Noisy.noise).sqrt().view(-1, 1, 1).to(teacher)
            return relative(student * root, teacher * root, mask)

        return super().losses(captured, weighted)


@dataclass(frozen=True)
class Way:
    """One way to train a student: changed keys of the section `distillation`, and the objective."""

    changes: Mapping[str, Any] = field(default_factory=dict)
    objective: Callable[[TeacherBlocks, Interval, Distillation], StudentObjective] = StudentObjective


def ways(steps: int) -> dict[str, Way]:
    return {
        "map stays": Way(),
        "first": Way({"init": "first"}),
        **{f"fade {share}": Way(objective=partial(Fading, share=share)) for share in (0.3, 0.6, 0.9)},
        "warm-up 30 %": Way({"warmup": round(0.3 * steps)}),
        "noisy": Way(objective=Noisy),
    }


class Bench:
    """The teacher as one segment, its samples, and the students' closed-form maps, which are the same for all seeds."""

    def __init__(self, job: Path, intervals: Sequence[Interval], settings: Distillation, held_out: int):
        config = Config.model_validate_json((job / CONFIG).read_text())
        self.intervals, self.settings = intervals, settings
        self.teacher, self.samples = Teacher(config.teacher), CalibrationSet(job / "calibration")
        self.count = self.teacher.adapter.block_ranges(self.teacher.empty_transformer())[-1].stop
        blocks = range(max(interval.last for interval in intervals) + 1)
        self.segment = TeacherSegment(self.teacher, blocks, list(intervals), "cpu", torch.float32)
        self.stage = PipelineStage(0, 1, 0)
        self.blocks = TeacherBlocks(self.teacher.adapter, self.segment.transformer, self.segment.blocks, self.count)
        self.held_out = self.samples.ids("validation")[:held_out]
        self.fitted = self._fit()

    def _fit(self) -> dict[Interval, dict[str, torch.Tensor]]:
        objectives = [StudentObjective(self.blocks, interval, self.settings) for interval in self.intervals]

        def stream(ids: np.ndarray, consumers: Sequence[Consumer]) -> None:
            self.segment.stream(self.samples.batch(ids, "cpu", torch.float32), self.stage, consumers)

        fit = ClosedForm(objectives, self.settings, RunContext(Path(), Path()))
        fit.fit(stream, self.samples.ids("train"), lambda objective: None)
        return {one.replacement: one.module.state_dict() for one in objectives}

    def capture(self, ids: np.ndarray) -> CapturedActivations:
        spec = CaptureSpec(frozenset(b for i in self.intervals for b in (i.first, i.last + 1)))
        inputs = self.samples.batch(ids, "cpu", torch.float32)
        Noisy.noise = inputs[self.teacher.adapter.timestep] / self.teacher.adapter.timestep_scale
        return self.segment.run(inputs, self.stage, spec)

    def trainees(self, way: Way) -> dict[Interval, Trainee]:
        settings, trainees = self.settings.model_copy(update=dict(way.changes)), {}
        for interval in self.intervals:
            objective = way.objective(self.blocks, interval, settings)
            if objective.module.affine:
                objective.module.load_state_dict(self.fitted[interval])
            trainees[interval] = Trainee(objective, settings, ParallelDims())
        return trainees

    def train(self, seed: int, chosen: Mapping[str, Way]) -> dict[str, dict[Interval, Trainee]]:
        """The students of all ways after all steps, on the same batches."""
        trainees = {name: self.trainees(way) for name, way in chosen.items()}
        ids, settings = self.samples.ids("train"), self.settings
        started_at = time.monotonic()
        for step in range(settings.steps):
            captured = self.capture(batch_of(step, ids, settings.batch_size, seed))
            for trainee in (each for students in trainees.values() for each in students.values()):
                trainee.train_step(captured, False)
            if (step + 1) % 20 == 0:
                print(f"seed {seed}, step {step + 1}, {time.monotonic() - started_at:.0f} s", flush=True)
        return trainees

    @torch.no_grad()
    def errors(self, trainees: Mapping[Interval, Trainee]) -> dict[str, float]:
        """By interval, the error of the student alone on the teacher's streams; `velocity`: with all students on."""
        with tempfile.TemporaryDirectory() as folder:
            for interval, trainee in trainees.items():
                path, objective = Path(folder) / f"{interval.name}.safetensors", trainee.objective
                if isinstance(objective, Fading):
                    objective.module.affine.clear()
                save_replacement(trainee.export(), interval, self.teacher.adapter, path)
            switch, model = VariantSwitcher(self.teacher, files_in(Path(folder))), self.teacher.transformer()
            plans = {"velocity": list(self.intervals)}
            parts = [
                variant_errors(model, switch, plans, self.samples.batch(ids, "cpu", torch.float32))["velocity"]
                for ids in self._batches()
            ]
        sums = {interval: np.zeros(2) for interval in self.intervals}
        for ids in self._batches():
            captured = self.capture(ids)
            for interval, trainee in trainees.items():
                sums[interval] += _error_and_energy(trainee.objective, captured)
        alone = {str(interval): float(error / energy) for interval, (error, energy) in sums.items()}
        return {"velocity": ErrorSums.joined(parts).overall(), **alone}

    def _batches(self) -> Iterator[np.ndarray]:
        for start in range(0, len(self.held_out), _HELD_OUT_BATCH):
            yield self.held_out[start : start + _HELD_OUT_BATCH]


def _error_and_energy(objective: Any, captured: CapturedActivations) -> np.ndarray:
    """`Σ ‖S(X) - Y‖²` and `Σ ‖Y - X‖²` over the image tokens of a batch."""
    interval = objective.replacement
    before, after = captured.boundaries[interval.first], captured.boundaries[interval.last + 1]
    made = objective.module.streams(before, captured.context)
    return np.array([float((x - after.img).double().square().sum()) for x in (made.img, before.img)])


class FinetuningBench:
    """The variant `half` of a job, fine-tuned in several ways on the teacher's own states; see the module."""

    ways = ("plain", "warm-up 30 %", "noisy", "features")

    def __init__(self, job: Path, settings: Finetuning, held_out: int):
        config = Config.model_validate_json((job / CONFIG).read_text())
        self.settings, self.teacher = settings, Teacher(config.teacher)
        self.samples = CalibrationSet(job / "calibration")
        self.plan = read_catalog(job / "variants").variants["half"].plan
        files = files_in(job / "students")
        self.files = {replacement: files[replacement] for replacement in self.plan}
        self.held_out = self.samples.ids("validation")[:held_out]

    def run(self, seed: int) -> dict[str, dict[str, float]]:
        """By way, the variant's velocity error on held-out samples, before and after."""
        models = {way: VariantModel(self.teacher, self.files, "cpu", torch.float32, False) for way in self.ways}
        states = {way: self._state(way, model) for way, model in models.items()}
        before = self._error(models["plain"])
        ids, settings = self.samples.ids("train"), self.settings
        for step in range(settings.steps):
            inputs = self.samples.batch(batch_of(step, ids, settings.batch_size, seed), "cpu", torch.float32)
            with torch.no_grad():
                target, features = self._forward(models["plain"], (), inputs)
            for way, model in models.items():
                terms = self._terms(way, inputs, self._forward(model, self.plan, inputs), (target, features))
                states[way].train_step(terms, logarithm=True)
            if (step + 1) % 20 == 0:
                print(f"fine-tuning, seed {seed}, step {step + 1}", flush=True)
        return {way: {"before": before, "after": self._error(model)} for way, model in models.items()}

    def _state(self, way: str, model: VariantModel) -> TrainState:
        changes = {"warmup": round(0.3 * self.settings.steps)} if way == "warm-up 30 %" else {}
        parameters = model.trained_parameters(trainable(self.plan))
        return TrainState(parameters, self.settings.model_copy(update=changes), ParallelDims())

    def _forward(
        self, model: VariantModel, plan: Sequence[Replacement], inputs: dict[str, Any]
    ) -> tuple[torch.Tensor, list[torch.Tensor]]:
        """The velocity, and the image stream behind every block."""
        made: list[torch.Tensor] = []
        return model.velocity(plan, inputs, training=bool(plan), features=made), made

    def _terms(self, way: str, inputs: dict[str, Any], made: Any, teachers: Any) -> dict[str, LossTerm]:
        (velocity, features), (target, wanted) = made, teachers
        noise = inputs[self.teacher.adapter.timestep] / self.teacher.adapter.timestep_scale
        weight = 2 * noise.view(-1, 1, 1) if way == "noisy" else torch.ones(1)
        error, energy = ((x.square() * weight).sum() for x in (velocity - target, target))
        terms = {"velocity": (error, energy)}
        if way == "features":
            terms["features"] = feature_error(features, wanted, self.plan, ParallelDims())
        return terms

    @torch.no_grad()
    def _error(self, model: VariantModel) -> float:
        sums = np.zeros(2)
        for start in range(0, len(self.held_out), _HELD_OUT_BATCH):
            inputs = self.samples.batch(self.held_out[start : start + _HELD_OUT_BATCH], "cpu", torch.float32)
            target = model.velocity((), inputs)
            error = model.velocity(self.plan, inputs) - target
            sums += [float(x.double().square().sum()) for x in (error, target)]
        return float(sums[0] / sums[1])


def spread(values: Sequence[float]) -> float:
    """The standard deviation over the seeds."""
    return float(np.std(values, ddof=1)) if len(values) > 1 else 0.0


def table(rows: Sequence[dict[str, Any]], judged: str, title: str) -> Table:
    """Means over the seeds; brackets: the standard deviation. The last column: against the first way, seed by seed."""
    made, columns = Table(title=title), [key for key in rows[0] if key not in ("way", "seed")]
    for heading in ("way", *columns, f"{judged} over that of {rows[0]['way']}"):
        made.add_column(heading)
    base = [row[judged] for row in rows if row["way"] == rows[0]["way"]]
    for name in dict.fromkeys(row["way"] for row in rows):
        found = [row for row in rows if row["way"] == name]
        values = ([row[column] for row in found] for column in columns)
        ratios = [row[judged] / plain for row, plain in zip(found, base, strict=True)]
        cells = (f"{np.mean(each):.5f} ({spread(each):.5f})" for each in values)
        made.add_row(name, *cells, " ".join(f"{ratio:.3f}" for ratio in ratios))
    return made


def distillation(options: argparse.Namespace) -> list[dict[str, Any]]:
    """A row a way and seed; prints the table."""
    intervals = [Interval(*map(int, text.split("-"))) for text in options.intervals]
    settings = Distillation(
        steps=options.steps, batch_size=options.batch, warmup=options.steps // 10, learning_rate=1e-3
    )
    bench = Bench(options.job, intervals, settings, options.held_out)
    chosen = {name: way for name, way in ways(options.steps).items() if not options.only or name in options.only}
    rows = []
    for seed in range(options.seeds):
        for name, trainees in bench.train(seed, chosen).items():
            rows.append({"way": name, "seed": seed, **bench.errors(trainees)})
            print(rows[-1], flush=True)
    title = (
        f"students of {', '.join(options.intervals)}, {options.steps} steps of {options.batch}, {options.seeds} seeds"
    )
    Console(width=160).print(table(rows, "velocity", title))
    return rows


def finetuning(options: argparse.Namespace) -> list[dict[str, Any]]:
    """A row a way and seed; prints the table."""
    steps = options.finetuning_steps
    settings = Finetuning(steps=steps, batch_size=options.batch, warmup=steps // 10, learning_rate=5e-4)
    bench = FinetuningBench(options.job, settings, options.held_out)
    rows = []
    for seed in range(options.seeds):
        rows += [{"way": name, "seed": seed, **found} for name, found in bench.run(seed).items()]
    title = f"half, {steps} fine-tuning steps of {options.batch}, {options.seeds} seeds"
    Console(width=160).print(table(rows, "after", title))
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("job", type=Path, help="folder of a finished job")
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--intervals", nargs="+", default=["0-1", "4-7", "10-12"])
    parser.add_argument("--steps", type=int, default=120)
    parser.add_argument("--finetuning-steps", type=int, default=100)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--held-out", type=int, default=96, help="validation samples to measure on")
    parser.add_argument("--only", nargs="+", help="names of ways of distillation; default: all")
    parser.add_argument("--json", type=Path, help="write the figures there; those of other parts stay")
    options = parser.parse_args()
    record = json.loads(options.json.read_text()) if options.json and options.json.exists() else {}
    for part in options.parts:
        rows = PARTS[part](options)
        if options.json:
            given = {name: value for name, value in vars(options).items() if name not in ("job", "json", "parts")}
            record[part] = {"settings": given, "rows": rows}
            options.json.write_text(json.dumps(record, indent=1) + "\n")


PARTS = {"distillation": distillation, "finetuning": finetuning}

if __name__ == "__main__":
    torch.set_num_threads(1)
    torch.set_grad_enabled(True)
    main()
