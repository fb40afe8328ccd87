"""How many pictures R needs: the width of its 95 % interval against the number of pictures, from a finished job.

    python benchmarks/pictures_needed.py runs/demo --variants p50 half --draws 100

For each number, pictures are drawn with replacement from the result's own, equally many of each category, the same ones
for the variant and the teacher; R and its paired bootstrap interval are computed as evaluation does. The width is the
mean over draws. `found` is the share of the draws in which a variant whose R is 3 % has an interval above 0, and `told`
the same of an interval above 1 %: for it, correct pictures of the teacher are made wrong, or wrong ones right, at the
rates at which the variant differs from the teacher. Nothing of the job is changed.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from ppcl.evaluation.scoring import relative_drop

TEACHER = "teacher"
PICTURES = (192, 384, 768, 1536)


def outcomes(evaluation: Mapping[str, Any], variant: str) -> dict[str, np.ndarray]:
    """By category, `(N,)` of 0 and 1: which pictures of the variant show their caption."""
    right, categories = np.array(evaluation["right"][variant], float), [p["category"] for p in evaluation["prompts"]]
    return {name: right[[category == name for category in categories]] for name in dict.fromkeys(categories)}


def drawn(
    variant: Mapping[str, np.ndarray], teacher: Mapping[str, np.ndarray], pictures: int, rng: np.random.Generator
) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
    """Pairs of outcomes drawn with replacement, equally many of each category."""
    rows = {name: rng.integers(len(values), size=pictures // len(teacher)) for name, values in teacher.items()}
    return {name: variant[name][i] for name, i in rows.items()}, {name: teacher[name][i] for name, i in rows.items()}


def simulated(
    teacher: Mapping[str, np.ndarray], drop: float, changed: float, pictures: int, rng: np.random.Generator
) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
    """Outcomes of a variant whose true R is `drop`, and the teacher's; `changed`: the share of pictures that differ.

    Each category keeps the teacher's rate, at most 1 - changed / 2, so that wrong pictures are there to be made right.
    More pictures than `changed` differ where the drop needs it.
    """
    made: dict[str, np.ndarray] = {}
    reference: dict[str, np.ndarray] = {}
    for name, values in teacher.items():
        rate = min(float(values.mean()), 1 - changed / 2)
        differ = max(changed, drop * rate)
        lost, won = (differ + drop * rate) / 2, (differ - drop * rate) / 2
        # Teacher and variant: both right, only the teacher, only the variant, none.
        shares = np.clip([rate - lost, lost, won, 1 - rate - won], 0, None)
        kind = rng.choice(4, size=pictures // len(teacher), p=shares / shares.sum())
        reference[name], made[name] = (kind < 2).astype(float), np.isin(kind, (0, 2)).astype(float)
    return made, reference


def measure(evaluation: Mapping[str, Any], variant: str, draws: int) -> list[dict[str, Any]]:
    """One row a number of pictures."""
    teacher, own = outcomes(evaluation, TEACHER), outcomes(evaluation, variant)
    changed = float(np.mean([np.mean(own[name] != teacher[name]) for name in teacher]))
    rows = []
    for pictures in PICTURES:
        rng = np.random.default_rng(pictures)
        intervals = {
            "own": [relative_drop(*drawn(own, teacher, pictures, rng), 0.95, seed) for seed in range(draws)],
            "three": [
                relative_drop(*simulated(teacher, 0.03, changed, pictures, rng), 0.95, seed) for seed in range(draws)
            ],
        }
        lows = np.array([interval["R_low"] for interval in intervals["three"]], float)
        widths = [interval["R_high"] - interval["R_low"] for interval in intervals["own"]]
        rows.append(
            {
                "variant": variant,
                "changed": changed,
                "pictures": pictures,
                "width": float(np.mean(widths)),
                "found": float(np.mean(lows > 0)),
                "told": float(np.mean(lows > 1)),
            }
        )
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("result", type=Path, help="the output of a job with a prompt checker")
    parser.add_argument("--variants", nargs="+", default=["p50", "p40"], help="those whose interval is computed")
    parser.add_argument("--draws", type=int, default=200, help="sets of pictures that are drawn for each number")
    parser.add_argument("--output", type=Path, help="JSON file to write the rows to")
    options = parser.parse_args()
    evaluation = json.loads((options.result / "evaluation" / "evaluation.json").read_text())
    rows = [row for variant in options.variants for row in measure(evaluation, variant, options.draws)]
    table = Table("variant", "differ from the teacher", "pictures", "width of R, %", "3 % found > 0", "> 1 %")
    for row in rows:
        shares = [f"{row[name]:.0%}" for name in ("found", "told")]
        table.add_row(row["variant"], f"{row['changed']:.1%}", str(row["pictures"]), f"{row['width']:.1f}", *shares)
    Console().print(table)
    if options.output:
        options.output.write_text(json.dumps(rows, indent=1) + "\n")


if __name__ == "__main__":
    main()
