"""Distillation killed at random moments and started again: steps done twice, at most one checkpoint interval.

    python benchmarks/resume.py --json benchmarks/results/resume.json

Two ranks of a pipeline, a random Qwen-Image, the default closed-form start. For every seed all ranks are ended by
SIGKILL at a moment drawn from the length of an undisturbed run, in the fit of the start, in mid-step or in
mid-checkpoint, and the same command is given again. A step counts from its first sample read, so one that was cut off
counts too. At the end the students are compared with those of the undisturbed run.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import signal
import socket
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from rich.console import Console
from rich.table import Table
from safetensors.torch import load_file

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.distillation import RandomSamples, make_teacher
from ppcl.config.schema import Distillation
from ppcl.models.teacher import Teacher
from ppcl.replacements import Interval
from ppcl.training.distillation.trainer import distil
from ppcl.training.parallel_dims import ParallelDims
from ppcl.training.run_context import RunContext

RANKS = 2


class Counted(RandomSamples):
    """Writes down every batch that is read, at once: a killed process loses nothing of it."""

    def __init__(self, count: int, path: Path):
        super().__init__(count)
        self.path = path

    def batch(self, ids: Sequence[int], device: str, dtype: torch.dtype) -> dict[str, Any]:
        with open(self.path, "a") as file:
            file.write(",".join(map(str, ids)) + "\n")
        return super().batch(ids, device, dtype)


def _rank(rank: int, port: int, options: argparse.Namespace, teacher: Path, out: Path) -> None:
    torch.set_num_threads(1)
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    dist.init_process_group("gloo", rank=rank, world_size=RANKS)
    settings = Distillation(
        steps=options.steps,
        batch_size=options.batch,
        warmup=1,
        pipeline_parallel=RANKS,
        checkpoint_every=options.checkpoint_every,
    )
    plan = [Interval(u, u + 2) for u in range(0, options.blocks - 2, 3)]
    samples = Counted(options.samples, out / f"read-{rank}.txt")
    (out / f"ready-{rank}").touch()
    distil(
        Teacher(teacher),
        samples,
        plan,
        settings,
        RunContext(out / "students", out / "checkpoints", dims=ParallelDims.join(RANKS, 1)),
    )
    dist.destroy_process_group()


def run(options: argparse.Namespace, teacher: Path, out: Path, kill_after: float | None) -> float | None:
    """Start all ranks; gives the seconds from when all were ready to the end, or None where they were killed before."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    for path in out.glob("ready-*"):
        path.unlink()
    context = mp.spawn(_rank, (port, options, teacher, out), nprocs=RANKS, join=False)
    while len(list(out.glob("ready-*"))) < RANKS:
        if any(not p.is_alive() for p in context.processes):
            context.join()
        time.sleep(0.01)
    begun = time.monotonic()
    if kill_after is not None:
        while time.monotonic() - begun < kill_after and all(p.is_alive() for p in context.processes):
            time.sleep(0.001)
        alive = [p for p in context.processes if p.is_alive()]
        for process in alive:
            os.kill(process.pid, signal.SIGKILL)
        for process in alive:
            process.join()
        if alive:
            return None
    while not context.join():
        pass
    return time.monotonic() - begun


def read(out: Path, rank: int) -> tuple[int, int]:
    """How many batches a rank has read for the closed-form start, which reads all samples in order, and for steps."""
    path = out / f"read-{rank}.txt"
    batches = [[int(i) for i in line.split(",")] for line in (path.read_text().splitlines() if path.exists() else [])]
    start = sum(ids == list(range(ids[0], ids[0] + len(ids))) for ids in batches)
    return start, len(batches) - start


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--blocks", type=int, default=12)
    parser.add_argument("--width", type=int, default=128, help="a multiple of 64")
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--samples", type=int, default=128)
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--checkpoint-every", type=int, default=10)
    parser.add_argument("--seeds", type=int, default=12, help="kills, each of a run of its own")
    parser.add_argument("--json", type=Path, help="write the figures there")
    options = parser.parse_args()
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        teacher = make_teacher(Path(folder) / "teacher", options.blocks, options.width)
        whole = Path(folder) / "whole"
        whole.mkdir()
        seconds = run(options, teacher, whole, None)
        once = read(whole, 0)
        students = {path.name: load_file(path) for path in sorted((whole / "students").glob("*.safetensors"))}
        for seed in range(options.seeds):
            out = Path(folder) / f"seed-{seed}"
            out.mkdir()
            moment = random.Random(seed).uniform(0, seconds)
            killed = run(options, teacher, out, moment) is None
            at = [read(out, rank) for rank in range(RANKS)]
            if killed:
                run(options, teacher, out, None)
            again = [[n - m for n, m in zip(read(out, rank), once)] for rank in range(RANKS)]
            differ = max(
                float((load_file(out / "students" / name)[key] - value).norm() / value.norm().clamp_min(1e-6))
                for name, student in students.items()
                for key, value in student.items()
            )
            row = {
                "seed": seed,
                "seconds": moment,
                "killed": killed,
                "at_start_batch": [n for n, _ in at],
                "at_step": [n for _, n in at],
                "start_again": max(n for n, _ in again),
                "steps_again": max(n for _, n in again),
                "difference": differ,
            }
            rows.append(row)
    every = f"a checkpoint every {options.checkpoint_every}"
    table = Table(title=f"{options.steps} steps, {every}, killed at a random moment of {seconds:.1f} s")
    for heading in (
        "seed",
        "killed after, s",
        "at step, by rank",
        "start's batches again",
        "steps again",
        "students differ by",
    ):
        table.add_column(heading, justify="right")
    for row in rows:
        steps = (
            " / ".join(map(str, row["at_step"] if max(row["at_step"]) else ["in the start"]))
            if row["killed"]
            else "ended before"
        )
        table.add_row(
            str(row["seed"]),
            f"{row['seconds']:.1f}",
            steps,
            str(row["start_again"]),
            str(row["steps_again"]),
            f"{row['difference']:.1e}",
        )
    Console(width=120).print(table)
    most = max(row["steps_again"] for row in rows)
    mean = np.mean([row["steps_again"] for row in rows])
    Console(width=120).print(f"at most {most} steps done twice, mean {mean:.1f}; {every}")
    if options.json:
        settings = {k: v for k, v in vars(options).items() if k != "json"}
        figures = {"start_batches": once[0], "seconds": seconds, "most_steps_again": most, "runs": rows}
        options.json.write_text(json.dumps({"settings": settings} | figures, indent=1))


if __name__ == "__main__":
    main()
