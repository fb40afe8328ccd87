"""Fine-tuning on one and on two ranks: the bytes that a rank holds, and the seconds of a step.

    python benchmarks/finetuning_ranks.py runs/demo

Real gloo ranks with one thread each, sharded and with recomputed activations, from the students of a finished job.
Bytes are those of all tensors alive at once; a second run without counting gives the seconds.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import socket
import statistics
import sys
import tempfile
import time
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from rich.console import Console
from rich.table import Table

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from ppcl.calibration.dataset import CalibrationSet
from ppcl.config.schema import Config
from ppcl.models.teacher import Teacher
from ppcl.replacements.io import files_in
from ppcl.search.variants import read_catalog
from ppcl.sizing.peak_memory import PeakMemory
from ppcl.storage.manifest import CONFIG
from ppcl.training.finetuning.trainer import DistilledReplacements, finetune
from ppcl.training.parallel_dims import ParallelDims
from ppcl.training.run_context import RunContext


def one_rank(rank: int, world: int, port: int, job: Path, variant: str, steps: int, count: bool, out: Path) -> None:
    """Fine-tune, and leave what was measured in `out`."""
    torch.set_num_threads(1)
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    dist.init_process_group("gloo", rank=rank, world_size=world)
    config = Config.model_validate_json((job / CONFIG).read_text())
    plan = read_catalog(job / "variants").variants[variant].plan
    files = {one: path for one, path in files_in(job / "students").items() if one in plan}
    settings = config.finetuning.model_copy(
        update={
            "steps": steps,
            "warmup": 1,
            "plan": variant,
            "variants": [],
            "rollout_share": 0.0,
            "data_parallel": world,
            "measured_plans": 0,
            "shard": True,
            "activation_checkpointing": True,
        }
    )
    ends: list[float] = []

    def report(done: int, total: int | None, values: Any, phase: str | None = None) -> None:
        if phase is None:
            ends.append(time.perf_counter())

    memory = PeakMemory()
    run = RunContext(out, out / "checkpoints", dims=ParallelDims.join(1, world), report=report)
    with torch.enable_grad(), memory if count else nullcontext():
        finetune(
            Teacher(config.teacher),
            CalibrationSet(job / "calibration"),
            DistilledReplacements(files, {variant: plan}, {}),
            settings,
            run,
            config.sampling,
        )
    seconds = [b - a for a, b in zip(ends, ends[1:], strict=False)]
    record = {"peak": memory.peak, "seconds": statistics.median(seconds) if seconds else None}
    (out / f"rank-{rank}.json").write_text(json.dumps(record))
    dist.destroy_process_group()


def measured(world: int, job: Path, variant: str, steps: int, count: bool) -> dict[str, Any]:
    """The most bytes of a rank, and its seconds a step."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    multiprocessing.set_start_method("spawn", force=True)
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder)
        mp.start_processes(one_rank, (world, port, job, variant, steps, count, out), nprocs=world, start_method="spawn")
        records = [json.loads((out / f"rank-{rank}.json").read_text()) for rank in range(world)]
    return {name: max(record[name] or 0 for record in records) for name in ("peak", "seconds")}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("job", type=Path, help="folder of a finished job")
    parser.add_argument("--variant", default="half")
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--json", type=Path, help="write the figures there")
    options = parser.parse_args()
    rows = []
    for world in (1, 2):
        bytes_, seconds = (
            measured(world, options.job, options.variant, steps, count)
            for steps, count in ((2, True), (options.steps, False))
        )
        rows.append({"ranks": world, "bytes": bytes_["peak"], "seconds": seconds["seconds"]})
    table = Table(title=f"Fine-tuning {options.variant}, sharded")
    for heading in ("ranks", "MB a rank", "seconds a step", "steps, times one rank's"):
        table.add_column(heading, justify="right")
    for row in rows:
        table.add_row(
            str(row["ranks"]),
            f"{row['bytes'] / 1e6:.1f}",
            f"{row['seconds']:.2f}",
            f"{rows[0]['seconds'] / row['seconds']:.2f}",
        )
    Console(width=100).print(table)
    if options.json:
        options.json.write_text(json.dumps({"variant": options.variant, "rows": rows}, indent=1))


if __name__ == "__main__":
    main()
