"""Taking hidden units away: in groups, against one at a time, in turns on the same problem.

    python benchmarks/elimination.py --units 384,1024,2048
    python benchmarks/elimination.py --units 12288 --outputs 3072 --reference 0

The reference is the elimination as its formula has it: one unit after another, each with a rank-1 update of the inverse
and of the columns, in float64. Problems are those of an FFN on correlated units.
"""

from __future__ import annotations

import argparse
import json
import resource
import sys
import time
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from ppcl.linalg import Moments, eliminate_units

RIDGE = 1e-4


def problem(units: int, outputs: int, device: str) -> tuple[Moments, torch.Tensor, torch.Tensor]:
    """Moments of correlated units, and a map on them."""
    generator = torch.Generator(device).manual_seed(0)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator, device=device)

    mix = normal(units, units // 4).double()
    moments = Moments(units, 0, device)
    moments.n = 1
    moments.xx = mix @ mix.T / (units // 4)
    del mix
    moments.xx.diagonal().add_(0.1 * torch.rand(units, generator=generator, device=device).double())
    return moments, normal(outputs, units) / units**0.5, torch.zeros(outputs, device=device)


def one_at_a_time(moments: Moments, weight: torch.Tensor, widths: list[int]) -> dict[int, float]:
    """The error at each width, by rank-1 updates."""
    gram = moments.xx / moments.n
    full = weight.to(gram).T
    spread = float((full * (gram @ full)).sum())
    columns = full.clone()
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(gram + RIDGE * torch.diag(gram.diagonal())))
    alive = torch.ones(len(gram), dtype=torch.bool, device=gram.device)
    errors = {}
    for left in range(len(gram), min(widths) - 1, -1):
        if left in widths:
            change = columns - full
            errors[left] = float((change * (gram @ change)).sum()) / spread
        diagonal = inverse.diagonal()
        unit = int(torch.where(alive, columns.square().sum(1) / diagonal, torch.inf).argmin())
        share = inverse[:, unit] / diagonal[unit]
        columns -= torch.outer(share, columns[unit])
        inverse -= torch.outer(share, inverse[unit].clone())
        alive[unit] = False
        columns[unit], inverse[unit], inverse[:, unit], inverse[unit, unit] = 0, 0, 0, 1
    return errors


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--units", default="384,1024,2048", help="hidden units, with commas between")
    parser.add_argument("--outputs", type=int, help="outputs of the map; a quarter of the units if not given")
    parser.add_argument("--reference", type=int, default=1024, help="compare up to so many units; 0: never")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--json", type=Path, help="write the figures there")
    options = parser.parse_args()
    table = Table(title=f"a half, a quarter and an eighth of the units, {options.device}")
    for heading in ("units", "seconds", "one at a time", "times faster", "errors", "one at a time", "peak memory, GB"):
        table.add_column(heading)
    rows = []
    for units in map(int, options.units.split(",")):
        moments, weight, bias = problem(units, options.outputs or units // 4, options.device)
        widths = [units // 2, units // 4, units // 8]
        started_at = time.monotonic()
        pruned = eliminate_units(moments, weight, bias, widths, RIDGE)
        seconds = time.monotonic() - started_at
        errors, reference, slower = {w: p.error for w, p in pruned.items()}, {}, None
        if units <= options.reference:
            started_at = time.monotonic()
            reference = one_at_a_time(moments, weight, widths)
            slower = time.monotonic() - started_at
        on_gpu = options.device.startswith("cuda")
        peak = torch.cuda.max_memory_allocated() / 1e9 if on_gpu else _process_peak()
        rows.append(
            {"units": units, "seconds": seconds, "reference_seconds": slower, "errors": errors, "peak_gb": peak}
        )
        table.add_row(
            str(units),
            f"{seconds:.2f}",
            f"{slower:.2f}" if slower else "",
            f"{slower / seconds:.0f}" if slower else "",
            " / ".join(f"{errors[w]:.3f}" for w in widths),
            " / ".join(f"{reference[w]:.3f}" for w in widths) if reference else "",
            f"{peak:.1f}",
        )
        print(f"{units} units: {seconds:.2f} s", flush=True)
    Console(width=140).print(table)
    if options.json:
        options.json.write_text(json.dumps(rows, indent=1))


def _process_peak() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9


if __name__ == "__main__":
    main()
