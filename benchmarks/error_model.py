"""How well the error of a plan is predicted: by the sum of the sensitivities, and by the model that keeps products.

    python benchmarks/error_model.py runs/demo --json benchmarks/results/error_model.json

For plans near the best ones, which the search finds over a range of budgets, and for random plans; on validation
samples, without fine-tuning. A ratio is the predicted error over the measured one.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from ppcl.calibration.dataset import CalibrationSet
from ppcl.evaluation.velocity_error import ErrorSums, error_model, sensitivities, variant_errors
from ppcl.models.teacher import Teacher
from ppcl.replacements import Plan, Replacement, conflicts
from ppcl.replacements.io import replacement_files
from ppcl.replacements.parameter_counts import parameter_counts
from ppcl.replacements.switcher import VariantSwitcher
from ppcl.search.candidates import CandidateSearch
from ppcl.search.error_model import ErrorModel
from ppcl.storage.manifest import Artifacts
from ppcl.training.data import spread_samples

BATCH = 48


def random_plans(known: list[Replacement], count: int) -> Iterator[Plan]:
    """Plans of random length, without conflicts."""
    rng = np.random.default_rng(0)
    for _ in range(count):
        share, plan = rng.random(), list[Replacement]()
        for index in rng.permutation(len(known)):
            if rng.random() < share and not any(conflicts(known[index], other) for other in plan):
                plan.append(known[index])
        if plan:
            yield Plan(plan)


def row(name: str, plans: list[Plan], model: ErrorModel, measured: dict[Plan, float]) -> dict[str, float | str]:
    """Median ratios, and the spread of their logarithms, of both predictions."""
    errors = np.array([measured[plan] for plan in plans])
    sums = np.array([sum(model.sensitivity[r] for r in plan) for plan in plans])
    predicted = np.array([model(plan) for plan in plans])
    return {
        "plans": name,
        "count": len(plans),
        "sum": float(np.median(sums / errors)),
        "sum_spread": float(np.std(np.log(sums / errors))),
        "products": float(np.median(predicted / errors)),
        "products_spread": float(np.std(np.log(predicted / errors))),
    }


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("result")
    parser.add_argument("--samples", type=int, default=192)
    parser.add_argument("--random", type=int, default=40, help="random plans")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    artifacts = Artifacts(options.result)
    teacher = Teacher(artifacts.manifest()["job"]["teacher"])
    files = replacement_files(artifacts.stage_files("students", "*.safetensors").paths())
    switch, transformer = VariantSwitcher(teacher, files), teacher.transformer()
    samples = CalibrationSet.of(artifacts.stage_files("calibration"))
    ids = spread_samples(samples.ids("validation"), options.samples)
    batches = [samples.batch(ids[i : i + BATCH], "cpu", torch.float32) for i in range(0, len(ids), BATCH)]
    parts = [sensitivities(transformer, switch, batch) for batch in batches]
    model = error_model({r: ErrorSums.joined(part[r] for part in parts) for r in parts[0]})
    search = CandidateSearch(parameter_counts(teacher, files), model)
    found = [search.for_budget(budget)[0] for budget in (0.6, 0.55, 0.5, 0.45, 0.4, 0.35, 0.3)]
    groups = {"best of a budget": list(dict.fromkeys(found)), "random": list(random_plans(list(files), options.random))}
    numbered = {str(i): plan for i, plan in enumerate(dict.fromkeys(p for plans in groups.values() for p in plans))}
    each = [variant_errors(transformer, switch, numbered, batch) for batch in batches]
    measured = {plan: ErrorSums.joined(part[name] for part in each).overall() for name, plan in numbered.items()}
    rows = [row(name, plans, model, measured) for name, plans in groups.items()]
    for one in rows:
        print(
            f"{one['plans']}, {one['count']} plans: sum of the sensitivities {one['sum']:.2f} of the error (spread "
            f"{one['sum_spread']:.2f}), with products {one['products']:.2f} (spread {one['products_spread']:.2f})"
        )
    if options.json:
        options.json.write_text(json.dumps(rows, indent=1) + "\n")


if __name__ == "__main__":
    main()
