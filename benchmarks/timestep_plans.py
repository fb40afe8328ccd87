"""A plan for noisy timesteps and another one for clean timesteps, against one plan for all, at equal mean time a step.

    python benchmarks/timestep_plans.py runs/demo --json benchmarks/results/timestep_plans.json

For each speed, the best plan and the best schedule: two plans and the timestep at which they change. Both are chosen
on the same validation samples, by the error predicted of many plans and then by the measured error of the best ones,
and by the same times: seconds of the CPU, which other programs do not take. Then: the velocity error on test samples,
the time of a step as measured again, and pictures from the same seeds as the teacher's. `--emphasis P` weighs the
error of a timestep `t` by `t**P` where plans are chosen: 0 is the velocity error, more asks for accuracy where
pictures are composed. `--finetune STEPS` does so again after end-to-end fine-tuning: of the single plan for that many
steps, and of the two plans of the schedule, each on its timesteps, for as many together. Nothing of the job is
changed.
"""

from __future__ import annotations

import argparse
import itertools
import json
import sys
import tempfile
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import diffusers
import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from ppcl.calibration.dataset import CalibrationSet
from ppcl.calibration.splits import Split
from ppcl.config.schema import Config
from ppcl.evaluation import latency
from ppcl.evaluation.image_metrics import psnr, ssim
from ppcl.evaluation.images import generate_images
from ppcl.evaluation.prompt_cache import keep_embeddings
from ppcl.evaluation.prompt_checker import checked, checker_prompts, load_checker
from ppcl.evaluation.velocity_error import ErrorSums, error_model, sensitivities, variant_errors
from ppcl.models.teacher import Teacher
from ppcl.replacements import Plan, Replacement
from ppcl.replacements.io import files_in, replacement_files
from ppcl.replacements.switcher import VariantSwitcher
from ppcl.search.error_model import ErrorModel
from ppcl.search.latency_table import LatencyTable, Speedup
from ppcl.search.pareto import pareto_front
from ppcl.storage.manifest import CONFIG, Artifacts
from ppcl.training.data import spread_samples
from ppcl.training.finetuning.trainer import DistilledReplacements, finetune
from ppcl.training.run_context import RunContext

BATCH = 48
RESAMPLES = 2000
# Plans, and schedules, that are measured as a whole, at each margin of a speed.
MEASURED = 6
# Shares of the time of a step that candidates are predicted to take: latencies add up only roughly.
MARGINS = (0.92, 1.0, 1.08)
# Each of some rounds.
TIMED_RUNS = 3


class Schedule(NamedTuple):
    """`noisy` where the timestep is at least `boundary`, `clean` below it. `share`: of the steps that are noisy."""

    boundary: float
    share: float
    noisy: Plan
    clean: Plan

    def is_noisy(self, timestep: float) -> bool:
        return timestep >= self.boundary - 1e-6

    def __str__(self) -> str:
        return f"from {self.boundary:.3f} up {self.noisy}; below {self.clean}"


def always(plan: Plan) -> Schedule:
    return Schedule(0.0, 1.0, plan, plan)


class Switchers(NamedTuple):
    """Those of the noisy and of the clean plan."""

    noisy: VariantSwitcher
    clean: VariantSwitcher


@dataclass(frozen=True)
class TimeSaved:
    """The time that replacements save, in 400ths of a step: few distinct sums."""

    times: LatencyTable
    total = 400

    @property
    def blocks(self) -> range:
        return self.times.blocks

    def saved(self, replacement: Replacement, within: Replacement | None = None, low_rank: bool = False) -> int:
        return round(self.total * self.times.saved(replacement, within, low_rank) / self.times.total)


class Pool:
    """Plans with the share of the teacher's time and the error that each has, the latter by timestep.

    `grid (T,)`: the sampler's timesteps, ascending. `time (P,)`: of a step, as a share of the teacher's. `error
    (P, T)`: what the samples of a timestep add to the relative squared error.
    """

    def __init__(self, plans: Sequence[Plan], grid: np.ndarray, time: Sequence[float], error: np.ndarray):
        self.plans, self.grid, self.time, self.error = list(plans), grid, np.array(time), error

    def best_plans(self, time: float, count: int) -> list[Plan]:
        """The plans of the least error that take at most so much time."""
        rows = np.flatnonzero(self.time <= time)
        return [self.plans[row] for row in rows[np.argsort(self.error[rows].sum(1))][:count]]

    def best_schedules(self, time: float, count: int) -> list[Schedule]:
        """The schedule of the least error of each boundary that takes at most so much time in the mean; best first."""
        found = []
        for first in range(1, len(self.grid)):
            share = 1 - first / len(self.grid)
            noisy, clean = self.error[:, first:].sum(1), self.error[:, :first].sum(1)
            # By time, the least error of a clean plan so far, and whose it is.
            order = np.argsort(self.time, kind="stable")
            least = np.minimum.accumulate(clean[order])
            whose = order[np.maximum.accumulate(np.where(clean[order] == least, np.arange(len(order)), 0))]
            left = (time - share * self.time) / (1 - share)
            place = np.searchsorted(self.time[order], left, side="right") - 1
            total = np.where(place >= 0, noisy + least[place], np.inf)
            if np.isfinite(total.min()):
                row = int(total.argmin())
                schedule = Schedule(float(self.grid[first]), share, self.plans[row], self.plans[whose[place[row]]])
                found.append((float(total[row]), schedule))
        return [schedule for _, schedule in sorted(found, key=lambda one: one[0])[:count]]


class Bench:
    """A finished job's students, with what is measured of them on its samples."""

    def __init__(self, result: str):
        artifacts = Artifacts(result)
        self.config = Config.model_validate_json(Path(result, CONFIG).read_text())
        self.teacher = Teacher(artifacts.manifest()["job"]["teacher"])
        self.files = replacement_files(artifacts.stage_files("students", "*.safetensors").paths())
        self.pipeline = self.teacher.pipeline("cpu", torch.float32)
        self.pipeline.set_progress_bar_config(disable=True)
        keep_embeddings(self.pipeline)
        self.transformer = self.pipeline.transformer
        self.switch = VariantSwitcher(self.teacher, self.files)
        self.samples = CalibrationSet.of(artifacts.stage_files("calibration"))

    def batches(self, split: Split, most: int) -> list[dict[str, Any]]:
        ids = spread_samples(self.samples.ids(split), most)
        return [self.samples.batch(ids[i : i + BATCH]) for i in range(0, len(ids), BATCH)]

    def errors(self, plans: Iterable[Plan], batches: Sequence[Mapping[str, Any]]) -> dict[Plan, ErrorSums]:
        return self.errors_with(self.switch, plans, batches)

    def errors_with(
        self, switch: VariantSwitcher, plans: Iterable[Plan], batches: Sequence[Mapping[str, Any]]
    ) -> dict[Plan, ErrorSums]:
        named = {str(plan): plan for plan in plans}
        parts = [variant_errors(self.transformer, switch, named, batch) for batch in batches]
        return {plan: ErrorSums.joined(part[name] for part in parts) for name, plan in named.items()}

    def speedups(self, plans: Sequence[Plan], inputs: Mapping[str, Any]) -> list[Speedup]:
        """How many times faster than the teacher each plan is, measured."""
        runs = [latency.forward_seconds(self.transformer, self.switch, [(), *plans], inputs) for _ in range(TIMED_RUNS)]
        own, *others = [list(itertools.chain(*seconds)) for seconds in zip(*runs, strict=True)]
        return [Speedup.of(own, seconds) for seconds in others]

    def plain(self) -> Switchers:
        return Switchers(self.switch, self.switch)


def by_timestep(sums: ErrorSums, grid: np.ndarray) -> np.ndarray:
    """What the samples of each timestep add to the relative squared error `(T,)`."""
    return np.bincount(rows_of(sums, grid), sums.error.numpy(), len(grid)) / float(sums.norm.sum())


def rows_of(sums: ErrorSums, grid: np.ndarray) -> np.ndarray:
    """By sample, the number of its timestep in the grid."""
    return np.abs(sums.timestep.numpy()[:, None] - grid).argmin(1)


def models_by_timestep(sums: Mapping[Replacement, ErrorSums], grid: np.ndarray) -> list[ErrorModel]:
    """The error model of each timestep's samples; their products add up to those of all samples."""
    first = next(iter(sums.values()))
    rows, total = rows_of(first, grid), float(first.norm.sum())
    models = []
    for number in range(len(grid)):
        part = {r: one.of_samples(torch.from_numpy(np.flatnonzero(rows == number))) for r, one in sums.items()}
        norm = float(next(iter(part.values())).norm.sum())
        model = error_model(part)
        models.append(ErrorModel(model.replacements, model.products * norm / total))
    return models


def candidate_plans(models: Sequence[ErrorModel], times: LatencyTable, speeds: Sequence[float]) -> list[Plan]:
    """Plans that are good on all timesteps, on the noisy ones above each timestep, or on the clean ones below it."""
    names, savings = models[0].replacements, TimeSaved(times)
    products = np.stack([model.products for model in models])
    parts = [products.sum(0)]
    for first in range(1, len(models)):
        parts += [products[first:].sum(0), products[:first].sum(0)]
    plans: dict[Plan, None] = {}
    for part in parts:
        model = ErrorModel(names, part)
        costs = model.sensitivity
        fronts = [pareto_front(savings, costs), pareto_front(savings, {r: c**0.5 for r, c in costs.items()})]
        for speed in speeds:
            saved, around = (1 - 1 / speed) * savings.total, costs
            front = fronts[0]
            for _ in range(2):
                row = min(int(np.searchsorted(front.saved[:, 0], saved)), len(front) - 1)
                around = model.corrected(around, front.plan(row), 0.5)
                front = pareto_front(savings, around)
                fronts.append(front)
        for front in fronts:
            plans |= dict.fromkeys(front.plan(row) for row in range(len(front)))
    return list(plans)


def predicted(plans: Sequence[Plan], models: Sequence[ErrorModel]) -> np.ndarray:
    """`(P, T)`: the error that the model of each timestep predicts."""
    rows = {replacement: row for row, replacement in enumerate(models[0].replacements)}
    on = np.zeros((len(plans), len(rows)))
    for number, plan in enumerate(plans):
        on[number, [rows[replacement] for replacement in plan]] = 1
    return np.stack([np.maximum(0, (on @ model.products * on).sum(1)) for model in models], axis=1)


def compared(single: torch.Tensor, scheduled: torch.Tensor, norm: torch.Tensor) -> dict[str, float]:
    """Both errors on the same samples, and their ratio with a paired bootstrap's 95 % interval."""
    a, b = single.numpy(), scheduled.numpy()
    rows = np.random.default_rng(0).integers(len(a), size=(RESAMPLES, len(a)))
    low, high = np.quantile(b[rows].sum(1) / a[rows].sum(1), [0.025, 0.975])
    return {
        "single": float(a.sum() / norm.sum()),
        "schedule": float(b.sum() / norm.sum()),
        "ratio": float(b.sum() / a.sum()),
        "ratio_low": float(low),
        "ratio_high": float(high),
    }


def draw(bench: Bench, switch: Switchers, schedule: Schedule, count: int) -> np.ndarray:
    """Pictures `(N, H, W, 3)` of checker captions: the plan is switched to before each step, by its timestep."""
    adapter, transformer = bench.teacher.adapter, bench.transformer

    def before(_module: Any, _args: Any, arguments: dict[str, Any]) -> None:
        timestep = float(arguments[adapter.timestep].max()) / adapter.timestep_scale
        if schedule.is_noisy(timestep):
            switch.noisy(transformer, schedule.noisy)
        else:
            switch.clean(transformer, schedule.clean)

    prompts = test_prompts(bench, count)
    hook = transformer.register_forward_pre_hook(before, with_kwargs=True)
    try:
        made = []
        for start in range(0, count, BATCH):
            some = prompts[start : start + BATCH]
            seeds = [1_000_000 + start + index for index in range(len(some))]
            made.append(generate_images(bench.pipeline, [p.text for p in some], seeds, bench.config.sampling))
    finally:
        hook.remove()
        bench.switch(transformer, ())
    return np.concatenate(made)


def test_prompts(bench: Bench, count: int) -> list[Any]:
    checker = load_checker(bench.config.evaluation.checker or "shapes")
    return checker_prompts(checker, count, bench.config.seed, bench.samples.seen_prompts())


def judged(bench: Bench, images: Mapping[str, np.ndarray], teachers: np.ndarray) -> dict[str, Any]:
    """The checker's score, PSNR and SSIM of pictures, and the paired difference of schedule and single plan."""
    checker, prompts = load_checker(bench.config.evaluation.checker or "shapes"), test_prompts(bench, len(teachers))
    values = {
        name: {
            "score": 100 * np.array(checked(checker, made, prompts), float),
            "psnr": psnr(made, teachers),
            "ssim": ssim(made, teachers),
        }
        for name, made in images.items()
    }
    record: dict[str, Any] = {
        name: {measure: float(value.mean()) for measure, value in one.items()} for name, one in values.items()
    }
    rows = np.random.default_rng(0).integers(len(teachers), size=(RESAMPLES, len(teachers)))
    record["difference"] = {}
    for measure in values["single"]:
        difference = values["schedule"][measure] - values["single"][measure]
        low, high = np.quantile(difference[rows].mean(1), [0.025, 0.975])
        record["difference"][measure] = [float(difference.mean()), float(low), float(high)]
    return record | {"teacher": float(100 * np.mean(checked(checker, teachers, prompts))), "pictures": len(teachers)}


class OfTimesteps:
    """The samples of some timesteps alone."""

    def __init__(self, samples: CalibrationSet, low: float, high: float):
        """`low`, `high`: shares of noise; the first is included."""
        self.samples, self.low, self.high = samples, low, high

    def ids(self, split: Split) -> np.ndarray:
        ids = self.samples.ids(split)
        adapter = self.samples.adapter
        chunks = [ids[start : start + 256] for start in range(0, len(ids), 256)]
        timestep = np.concatenate(
            [self.samples.batch(chunk)[adapter.timestep].numpy() / adapter.timestep_scale for chunk in chunks]
        )
        return ids[(timestep >= self.low - 1e-6) & (timestep < self.high - 1e-6)]

    def batch(self, ids: Sequence[int] | np.ndarray, device: str, dtype: torch.dtype) -> dict[str, Any]:
        return self.samples.batch(ids, device, dtype)


def finetuned(bench: Bench, plan: Plan, part: tuple[float, float], steps: int) -> VariantSwitcher:
    """A switcher of a plan's replacements, fine-tuned on a part of the timesteps."""
    folder = Path(tempfile.mkdtemp(prefix="timestep-plans-"))
    # Without rollouts: those of a part of the timesteps would begin on the other part's states.
    settings = bench.config.finetuning.model_copy(
        update={
            "steps": steps,
            "rollout_share": 0.0,
            "plan": str(plan),
            "variants": [],
            "data_parallel": 1,
            "measured_plans": 0,
            "activation_checkpointing": False,
        }
    )
    files = {replacement: bench.files[replacement] for replacement in plan}
    with torch.enable_grad():
        finetune(
            bench.teacher,
            OfTimesteps(bench.samples, *part),
            DistilledReplacements(files, {}, {}),
            settings,
            RunContext(folder, folder / "checkpoints", bench.config.seed),
            bench.config.sampling,
        )
    bench.switch(bench.transformer, ())
    switch = VariantSwitcher(bench.teacher, bench.files | files_in(folder))
    # It takes the blocks that it finds for the teacher's own.
    switch.blocks(bench.transformer)
    return switch


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("result", help="the output of a job with a prompt checker")
    parser.add_argument("--speeds", type=float, nargs="+", default=[1.4, 1.84, 2.5])
    parser.add_argument("--samples", type=int, default=384, help="validation samples that plans are chosen on")
    parser.add_argument("--test-samples", type=int, default=1024)
    parser.add_argument("--pictures", type=int, default=480, help="pictures of each side; 0: none")
    parser.add_argument("--emphasis", type=float, nargs="+", default=[0.0], metavar="P")
    parser.add_argument("--finetune", type=int, default=0, metavar="STEPS")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    diffusers.utils.logging.set_verbosity_error()
    torch.set_num_threads(1)
    # On a machine that is shared, the clock says as much of the others as of the plans.
    latency._synchronized = time.process_time
    bench = Bench(options.result)
    with torch.no_grad():
        for record in measured(bench, options):
            if options.json:
                options.json.write_text(json.dumps(record, indent=1) + "\n")


def measured(bench: Bench, options: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """The record, again with every row."""
    validation = bench.batches("validation", options.samples)
    parts = [sensitivities(bench.transformer, bench.switch, batch) for batch in validation]
    alone = {r: ErrorSums.joined(part[r] for part in parts) for r in parts[0]}
    grid = np.unique(np.round(next(iter(alone.values())).timestep.numpy(), 6))
    print(f"the sampler's {len(grid)} timesteps: {', '.join(f'{t:.3f}' for t in grid)}", flush=True)
    times = latency.measure_latencies(bench.transformer, bench.switch, validation[0])
    models = models_by_timestep(alone, grid)
    teachers = draw(bench, bench.plain(), always(Plan()), options.pictures) if options.pictures else None
    test = bench.batches("test", options.test_samples)
    rows, pairs = list[dict[str, Any]](), []
    record = {
        "validation_samples": sum(len(batch[bench.teacher.adapter.timestep]) for batch in validation),
        "timesteps": grid.tolist(),
        "rows": rows,
    }
    for emphasis, speed in itertools.product(options.emphasis, options.speeds):
        weights = grid**emphasis
        weighted = [ErrorModel(m.replacements, m.products * w) for m, w in zip(models, weights, strict=True)]
        plans = candidate_plans(weighted, times, [speed])
        pool = Pool(plans, grid, [1 / times.speedup(plan) for plan in plans], predicted(plans, weighted))
        both = chosen(bench, pool, weights, validation, 1 / speed)
        pairs.append((both, {"emphasis": emphasis, "speed": speed, "candidates": len(plans)}))
        rows.append(row(bench, both, (bench.plain(), bench.plain()), test, teachers) | pairs[-1][1])
        shown(rows[-1], *both)
        yield record
    for both, case in pairs if options.finetune else ():
        rows.append(finetuned_row(bench, both, options.finetune, test, teachers) | case)
        shown(rows[-1], *both)
        yield record


def chosen(
    bench: Bench, pool: Pool, weights: np.ndarray, validation: list[dict[str, Any]], time: float
) -> tuple[Schedule, Schedule]:
    """The best plan and the best schedule, by the errors and times of some plans as measured of each as a whole.

    `weights (T,)`: of the error of each timestep. `time`: of a step, as a share of the teacher's.
    """
    plans: dict[Plan, None] = {}
    for margin in MARGINS:
        plans |= dict.fromkeys(pool.best_plans(margin * time, MEASURED))
        for schedule in pool.best_schedules(margin * time, MEASURED):
            plans |= dict.fromkeys((schedule.noisy, schedule.clean))
    sums = bench.errors(plans, validation)
    errors = np.stack([by_timestep(one, pool.grid) * weights for one in sums.values()])
    times = [1 / speed.value for speed in bench.speedups(list(sums), validation[0])]
    measured_pool = Pool(list(sums), pool.grid, times, errors)
    (single,), (schedule,) = measured_pool.best_plans(time, 1), measured_pool.best_schedules(time, 1)
    print(f"{len(plans)} plans measured as a whole", flush=True)
    return always(single), schedule


def finetuned_row(
    bench: Bench, both: tuple[Schedule, Schedule], steps: int, test: list[dict[str, Any]], teachers: np.ndarray | None
) -> dict[str, Any]:
    single, schedule = both
    whole = finetuned(bench, single.noisy, (0.0, 2.0), steps)
    parts = Switchers(
        finetuned(bench, schedule.noisy, (schedule.boundary, 2.0), round(steps * schedule.share)),
        finetuned(bench, schedule.clean, (0.0, schedule.boundary), round(steps * (1 - schedule.share))),
    )
    return row(bench, both, (Switchers(whole, whole), parts), test, teachers) | {"finetuning_steps": steps}


def scheduled_sums(
    bench: Bench, schedule: Schedule, switch: Switchers, batches: Sequence[Mapping[str, Any]]
) -> ErrorSums:
    """By sample, the error of the plan that its timestep has."""
    noisy = bench.errors_with(switch.noisy, [schedule.noisy], batches)[schedule.noisy]
    clean = bench.errors_with(switch.clean, [schedule.clean], batches)[schedule.clean]
    error = torch.where(noisy.timestep >= schedule.boundary - 1e-6, noisy.error, clean.error)
    return ErrorSums(noisy.timestep, error, noisy.norm, noisy.sketch)


def row(
    bench: Bench,
    both: tuple[Schedule, Schedule],
    switch: tuple[Switchers, Switchers],
    test: list[dict[str, Any]],
    teachers: np.ndarray | None,
) -> dict[str, Any]:
    """Everything that is measured of a single plan and of a schedule, each with its switchers."""
    single, schedule = both
    sums = [scheduled_sums(bench, one, its, test) for one, its in zip(both, switch, strict=True)]
    plans = (single.noisy, schedule.noisy, schedule.clean)
    speeds = bench.speedups(plans, test[0])
    mean = schedule.share / speeds[1].value + (1 - schedule.share) / speeds[2].value
    record: dict[str, Any] = {
        "single": str(single.noisy),
        "schedule": {"boundary": schedule.boundary, "noisy": str(schedule.noisy), "clean": str(schedule.clean)},
        "noisy_share": schedule.share,
        "measured_speed": {"single": speeds[0].value, "schedule": 1 / mean},
        "speeds": {name: list(speed) for name, speed in zip(("single", "noisy", "clean"), speeds, strict=True)},
        "velocity": compared(sums[0].error, sums[1].error, sums[0].norm),
        "by_timestep": {name: one.by_timestep() for name, one in zip(("single", "schedule"), sums, strict=True)},
    }
    if teachers is not None:
        images = {
            name: draw(bench, its, one, len(teachers))
            for name, one, its in zip(("single", "schedule"), both, switch, strict=True)
        }
        record["images"] = judged(bench, images, teachers)
    return record


def shown(record: Mapping[str, Any], single: Schedule, schedule: Schedule) -> None:
    tuned = f", {record['finetuning_steps']} steps of fine-tuning" if "finetuning_steps" in record else ""
    print(f"\n{record['speed']:g} times the teacher's speed, emphasis {record['emphasis']:g}{tuned}")
    print(f"  single:   {single.noisy}\n  schedule: {schedule}")
    error, speed = record["velocity"], record["measured_speed"]
    print(
        f"  velocity error {error['single']:.5f} and {error['schedule']:.5f}, {error['ratio']:.3f} "
        f"({error['ratio_low']:.3f} to {error['ratio_high']:.3f}); measured speed {speed['single']:.2f} and "
        f"{speed['schedule']:.2f}",
        flush=True,
    )
    if images := record.get("images"):
        for measure, (difference, low, high) in images["difference"].items():
            print(
                f"  {measure} {images['single'][measure]:.3f} and {images['schedule'][measure]:.3f}, "
                f"{difference:+.3f} ({low:+.3f} to {high:+.3f}), {images['pictures']} pictures, teacher "
                f"{images['teacher']:.1f}",
                flush=True,
            )


if __name__ == "__main__":
    main()
