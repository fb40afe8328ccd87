"""Whether pruned heads earn their place beside pruned FFNs: each block's alone, and in the plans that a search finds.

    python benchmarks/heads.py runs/demo --json benchmarks/results/heads.json

Takes the calibration set and the replacements of a finished job, and fits heads to it in closed form; nothing of the
job is changed. Errors are of the validation samples, without fine-tuning.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.table import Table

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from ppcl.calibration.dataset import CalibrationSet
from ppcl.config.schema import Config, Target
from ppcl.errors import UserError
from ppcl.evaluation.latency import measure_latencies
from ppcl.evaluation.velocity_error import ErrorSums, error_model, sensitivities, variant_errors
from ppcl.linalg import FittedMap, Moments, eliminate_groups
from ppcl.models.teacher import Teacher
from ppcl.replacements import Plan, PrunedFfn, PrunedHeads, Replacement
from ppcl.replacements.io import files_in, replacement_files
from ppcl.replacements.parameter_counts import parameter_counts
from ppcl.replacements.pruned_heads import HeadPaths
from ppcl.replacements.switcher import VariantSwitcher
from ppcl.search.candidates import CandidateSearch
from ppcl.storage.manifest import CONFIG, Artifacts
from ppcl.training.data import spread_samples
from ppcl.training.distillation.trainer import distil
from ppcl.training.run_context import RunContext

BATCH = 48
RIDGE = 1e-4
BUDGETS = (0.6, 0.5, 0.4, 0.3)
SPEEDUPS = (1.3, 1.5, 1.8, 2.1)


class Measured:
    """The replacements of a job and the heads fitted here: their sizes, times and errors, and those of plans."""

    def __init__(self, teacher: Teacher, files: dict[Replacement, Path], samples: CalibrationSet, count: int):
        self.switch, self.transformer = VariantSwitcher(teacher, files), teacher.transformer()
        ids = spread_samples(samples.ids("validation"), count)
        self.batches = [samples.batch(ids[i : i + BATCH], "cpu", torch.float32) for i in range(0, len(ids), BATCH)]
        self.sizes = parameter_counts(teacher, files)
        self.times = measure_latencies(self.transformer, self.switch, self.batches[0])
        parts = [sensitivities(self.transformer, self.switch, batch) for batch in self.batches]
        self.errors = error_model({r: ErrorSums.joined(part[r] for part in parts) for r in parts[0]})

    def error(self, plans: Sequence[Plan]) -> list[float]:
        """The velocity errors of whole plans."""
        named = {str(number): plan for number, plan in enumerate(plans)}
        parts = [variant_errors(self.transformer, self.switch, named, batch) for batch in self.batches]
        return [ErrorSums.joined(part[name] for part in parts).overall() for name in named]

    def saved(self, replacements: Iterable[Replacement]) -> tuple[float, float]:
        """The shares of parameters and of time that go, in the mean."""
        replacements = list(replacements)
        parameters = statistics.mean(self.sizes.saved(one) / self.sizes.total for one in replacements)
        return parameters, statistics.mean(self.times.saved(one) / self.times.total for one in replacements)

    def found(self, known: Sequence[Replacement], key: str) -> dict[str, Any] | None:
        """The best of the plans that a search proposes; None where there is none. `key`: such as `40 %`, `1.8x`."""
        search = CandidateSearch(self.sizes, self.errors.of(known), self.times)
        try:
            if key.endswith("x"):
                wanted = float(key[:-1])
                plans = search.for_target(key, Target(speedup=wanted))
                plans = [plan for plan in plans if self.times.speedup(plan) >= wanted] or plans
            else:
                plans = search.for_budget(float(key[:-1]) / 100)
        except UserError:
            return None
        error, plan = min(zip(self.error(plans), plans, strict=True))
        return {
            "error": error,
            "parameters": self.sizes.parameters(plan) / self.sizes.total,
            "speedup": self.times.speedup(plan),
            "heads": sum(isinstance(one, PrunedHeads) for one in plan),
            "plan": str(plan),
        }


def fit(teacher: Teacher, samples: CalibrationSet, plan: list[Replacement], folder: Path) -> dict[Replacement, Path]:
    """Closed forms alone: no step of training."""
    settings = Config(teacher=teacher.place, prompts="none").distillation.model_copy(
        update={"steps": 0, "batch_size": 64, "ridge": RIDGE}
    )
    distil(teacher, samples, plan, settings, RunContext(folder, folder / "checkpoints"))
    return files_in(folder)


def real_width(width: int, heads: int) -> dict[str, float]:
    """Seconds of one elimination of a block with both streams, down to three quarters and half of the heads."""
    maps = []
    for seed in (0, 1):
        generator = torch.Generator().manual_seed(seed)
        mix = torch.randn(width, width // 3, generator=generator).double()
        moments = Moments(width, 0)
        moments.n, moments.xx = 1, mix @ mix.T / (width // 3)
        moments.xx.diagonal().add_(0.1 * torch.rand(width, generator=generator).double())
        weight = torch.randn(width, width, generator=generator) / width**0.5
        maps.append(FittedMap(moments, weight, torch.zeros(width)))
    started_at = time.monotonic()
    eliminate_groups(maps, width // heads, [3 * heads // 4, heads // 2], RIDGE)
    return {"width": width, "heads": heads, "seconds": time.monotonic() - started_at}


@torch.no_grad()
def alone(measured: Measured, known: Iterable[Replacement], blocks: list[int]) -> list[dict[str, Any]]:
    """By kind and percent, what a replacement saves and costs over the blocks, and the error of all together."""
    kinds = sorted({(type(r).__name__, r.detail) for r in known}, key=lambda kind: (kind[0], -kind[1]))
    rows = []
    for name, percent in kinds:
        group = [r for r in known if (type(r).__name__, r.detail) == (name, percent) and r.first in blocks]
        parameters, seconds = measured.saved(group)
        errors = [measured.errors.sensitivity[one] for one in group]
        (together,) = measured.error([Plan(group)])
        rows.append(
            {
                "kind": {"PrunedHeads": "heads", "PrunedFfn": "FFN"}[name],
                "kept": percent,
                "parameters": parameters,
                "time": seconds,
                "median_error": statistics.median(errors),
                "worst_error": max(errors),
                "all_blocks_error": together,
                "errors": errors,
            }
        )
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("job", type=Path, help="folder of a finished job")
    parser.add_argument("--samples", type=int, default=192)
    parser.add_argument("--percents", default="75,50,25", help="heads that stay, with commas between")
    parser.add_argument("--width", type=int, default=3072, help="of the elimination that is timed; 0: none is")
    parser.add_argument("--heads", type=int, default=24, help="the same")
    parser.add_argument("--json", type=Path, help="write the figures there")
    options = parser.parse_args()
    config = Config.model_validate_json((options.job / CONFIG).read_text())
    artifacts, teacher = Artifacts(options.job), Teacher(config.teacher)
    samples = CalibrationSet(options.job / "calibration")
    model = teacher.empty_transformer()
    blocks = teacher.adapter.blocks(model)
    paths = [HeadPaths.of(teacher.adapter, model, number, block) for number, block in enumerate(blocks)]
    there = [number for number, one in enumerate(paths) if one.out]
    percents = list(map(int, options.percents.split(",")))
    plan: list[Replacement] = [PrunedHeads(b, percent) for b in there for percent in percents]
    plan += [PrunedFfn(b, percent) for b in there for percent in (75, 50, 25)]
    with tempfile.TemporaryDirectory() as folder:
        fitted = fit(teacher, samples, plan, Path(folder))
        own = replacement_files(artifacts.stage_files("students", "*.safetensors").paths())
        measured = Measured(teacher, {**fitted, **own}, samples, options.samples)
        rows = alone(measured, plan, there)
        without = [one for one in {**own} if not isinstance(one, PrunedHeads)]
        heads = [one for one in plan if isinstance(one, PrunedHeads)]
        keys = [f"{100 * budget:g}%" for budget in BUDGETS] + [f"{speedup:g}x" for speedup in SPEEDUPS]
        plans = [
            {"key": key, "without": measured.found(without, key), "with": measured.found([*without, *heads], key)}
            for key in keys
        ]
    elimination = real_width(options.width, options.heads) if options.width else None
    show(rows, plans, elimination)
    if options.json:
        figures = {"alone": rows, "plans": plans, "elimination": elimination}
        options.json.write_text(json.dumps(figures, indent=1) + "\n")


def show(rows: list[dict[str, Any]], plans: list[dict[str, Any]], elimination: dict[str, float] | None) -> None:
    console = Console(width=140)
    table = Table(title="one replacement alone, over the blocks, and all blocks' together")
    for heading in ("kept", "parameters less, %", "time less, %", "median error", "worst", "all blocks"):
        table.add_column(heading)
    for row in rows:
        shares = [f"{100 * row[name]:.2f}" for name in ("parameters", "time")]
        errors = [f"{row[name]:.2g}" for name in ("median_error", "worst_error", "all_blocks_error")]
        table.add_row(f"{row['kept']} % of {row['kind']}", *shares, *errors)
    console.print(table)
    table = Table(title="the best plan that the search finds, without fine-tuning")
    for heading in ("asked", "error without heads", "speed", "with heads", "speed", "ratio", "replaced attentions"):
        table.add_column(heading)
    for row in plans:
        before, after = row["without"], row["with"]
        told = [
            text
            for one in (before, after)
            for text in ((f"{one['error']:.3g}", f"{one['speedup']:.2f}") if one else ("none", ""))
        ]
        ratio = f"{after['error'] / before['error']:.2f}" if before and after else ""
        table.add_row(row["key"], *told, ratio, str(after["heads"]) if after else "")
    console.print(table)
    if elimination:
        console.print(
            f"one block of width {elimination['width']}, {elimination['heads']} heads: {elimination['seconds']:.0f} s"
        )


if __name__ == "__main__":
    torch.manual_seed(0)
    np.random.seed(0)
    main()
