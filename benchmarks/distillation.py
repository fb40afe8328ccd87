"""Depth distillation: steps a second and peak memory a rank, by how the work is shared. One thread a rank.

    python benchmarks/distillation.py

- `reference scheme`: the whole teacher and all students in one process, one sum of losses, one optimizer.
- `whole on each rank`: that scheme on two ranks, data-parallel (PPCL's published training does this, with the
  optimizer's state sharded): here `pipeline_parallel=1, data_parallel=2`.
- `pp=1`, `pp=2`: ours. With pp=2 each rank holds its own blocks and students.

A random Qwen-Image transformer of `--blocks` blocks; the same batches of random samples for all. Memory is the peak
resident size of a rank less what it held before the model.
"""

from __future__ import annotations

import argparse
import copy
import json
import os
import resource
import socket
import statistics
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
from diffusers import QwenImageTransformer2DModel
from rich.console import Console
from rich.table import Table

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from ppcl.calibration.splits import Split
from ppcl.config.schema import Distillation
from ppcl.models import adapter_of, embed, run_blocks
from ppcl.models.teacher import Teacher
from ppcl.replacements import Interval
from ppcl.training.data import batch_of
from ppcl.training.distillation.trainer import distil
from ppcl.training.losses import LOSSES
from ppcl.training.parallel_dims import ParallelDims
from ppcl.training.run_context import RunContext

CHANNELS, TEXT, SIDE, TEXT_TOKENS = 16, 64, 8, 32
WARM_STEPS = 3


class RandomSamples:
    """`count` samples of 64 image tokens and 32 text tokens, made anew from their ids."""

    def __init__(self, count: int):
        self.count = count

    def ids(self, split: Split) -> np.ndarray:
        return np.arange(self.count)

    def batch(self, ids: Sequence[int], device: str, dtype: torch.dtype) -> dict[str, Any]:
        def made(*shape: int) -> torch.Tensor:
            rows = [torch.randn(shape, generator=torch.Generator().manual_seed(int(i))) for i in ids]
            return torch.stack(rows).to(device, dtype)

        return {
            "hidden_states": made(SIDE * SIDE, 4 * CHANNELS),
            "timestep": torch.tensor([(int(i) % 100) / 100 for i in ids]).to(device, dtype),
            "encoder_hidden_states": made(TEXT_TOKENS, TEXT),
            "encoder_hidden_states_mask": torch.ones(len(ids), TEXT_TOKENS, dtype=torch.long),
            "img_shapes": [[(1, SIDE, SIDE)]] * len(ids),
        }


def make_teacher(folder: Path, blocks: int, width: int) -> Path:
    torch.manual_seed(0)
    model = QwenImageTransformer2DModel(
        patch_size=2,
        in_channels=4 * CHANNELS,
        out_channels=CHANNELS,
        num_layers=blocks,
        attention_head_dim=64,
        num_attention_heads=width // 64,
        joint_attention_dim=TEXT,
        axes_dims_rope=(16, 24, 24),
    )
    model.save_pretrained(folder / "transformer")
    index = {"_class_name": "QwenImagePipeline", "transformer": ["diffusers", "QwenImageTransformer2DModel"]}
    (folder / "model_index.json").write_text(json.dumps(index))
    return folder


def resident() -> float:
    """MB."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 1e6


def peak() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e6


def ours(options: argparse.Namespace, folder: Path, intervals: list[Interval], pp: int, dp: int) -> list[float]:
    """Times at which the steps of this rank were done."""
    settings = Distillation(
        steps=options.steps,
        batch_size=options.batch,
        warmup=1,
        pipeline_parallel=pp,
        data_parallel=dp,
        init="first",
        checkpoint_every=10**6,
    )
    times = []
    with tempfile.TemporaryDirectory() as out:
        run = RunContext(
            Path(out),
            Path(out) / "c",
            dims=ParallelDims.join(pp, dp),
            report=lambda *_, phase=None: times.append(time.monotonic()),
        )
        distil(Teacher(folder), RandomSamples(256), intervals, settings, run)
    return times


def joint_loss(
    adapter: Any,
    blocks: Sequence[torch.nn.Module],
    students: Sequence[torch.nn.Module],
    intervals: Sequence[Interval],
    start: tuple[Any, dict[str, Any]],
    loss: str,
) -> torch.Tensor:
    """The teacher's forward, with all its boundaries kept, and the losses of all students added up."""
    streams, context = start
    with torch.no_grad():
        kept = [streams]
        for block in blocks:
            kept.append(run_blocks(adapter, [block], kept[-1], context))
    whole = torch.zeros(())
    for interval, student in zip(intervals, students, strict=True):
        made = run_blocks(adapter, [student], kept[interval.first], context)
        for name in ("img", "txt"):
            total, divisor = LOSSES[loss](getattr(made, name), getattr(kept[interval.last + 1], name), None)
            whole = whole + total / divisor
    return whole


def reference(options: argparse.Namespace, folder: Path, intervals: list[Interval]) -> list[float]:
    """One process: the teacher's forward, all students' losses added up, one backward, one optimizer."""
    model = Teacher(folder).transformer()
    adapter = adapter_of(model)
    blocks = adapter.blocks(model)
    students = torch.nn.ModuleList([copy.deepcopy(blocks[i.first]).requires_grad_(True) for i in intervals])
    optimizer = torch.optim.AdamW(students.parameters(), lr=1e-4, betas=(0.9, 0.95), weight_decay=0.02, foreach=True)
    samples, times = RandomSamples(256), []
    for step in range(options.steps):
        inputs = samples.batch(batch_of(step, samples.ids("train"), options.batch, 0), "cpu", torch.float32)
        with torch.no_grad():
            start = embed(model, inputs)
        loss = joint_loss(adapter, blocks, students, intervals, start, "normalized")
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(students.parameters(), 1.0)
        optimizer.step()
        times.append(time.monotonic())
    return times


def _rank(
    rank: int, world: int, port: int, scheme: str, options: Any, folder: Path, intervals: Any, answers: Any
) -> None:
    torch.set_num_threads(1)
    before = resident()
    if world > 1:
        os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
        dist.init_process_group("gloo", rank=rank, world_size=world)
    pp, dp = {"reference scheme": (0, 0), "whole on each rank": (1, 2), "pp=1": (1, 1), "pp=2": (2, 1)}[scheme]
    times = ours(options, folder, intervals, pp, dp) if pp else reference(options, folder, intervals)
    if world > 1:
        dist.destroy_process_group()
    steps = np.diff(times[WARM_STEPS:])
    answers.put({"rank": rank, "seconds": statistics.median(steps), "memory": peak() - before})


def measure(
    scheme: str, world: int, options: argparse.Namespace, folder: Path, intervals: list[Interval]
) -> dict[str, Any]:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    answers = mp.get_context("spawn").SimpleQueue()
    mp.spawn(_rank, (world, port, scheme, options, folder, intervals, answers), nprocs=world)
    ranks = [answers.get() for _ in range(world)]
    # A pipeline is as fast as its slowest rank; with data-parallel ranks a step is one of all of them together.
    return {
        "scheme": scheme,
        "ranks": world,
        "steps_per_second": 1 / max(r["seconds"] for r in ranks),
        "memory_mb": sorted((round(r["memory"], 1) for r in ranks), reverse=True),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--blocks", type=int, default=24)
    parser.add_argument("--width", type=int, default=256, help="a multiple of 64")
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--steps", type=int, default=15)
    parser.add_argument("--rounds", type=int, default=2, help="every scheme so many times in turn; the best counts")
    parser.add_argument("--json", type=Path, help="write the figures there")
    options = parser.parse_args()
    intervals = [Interval(u, u + 2) for u in range(0, options.blocks - 2, 3)]
    schemes = {"reference scheme": 1, "pp=1": 1, "whole on each rank": 2, "pp=2": 2}
    best: dict[str, dict[str, Any]] = {}
    with tempfile.TemporaryDirectory() as folder:
        make_teacher(Path(folder), options.blocks, options.width)
        for _ in range(options.rounds):
            for scheme, world in schemes.items():
                got = measure(scheme, world, options, Path(folder), intervals)
                if scheme not in best or got["steps_per_second"] > best[scheme]["steps_per_second"]:
                    best[scheme] = got
    base = best["reference scheme"]
    table = Table(
        title=f"{options.blocks} blocks of width {options.width}, {len(intervals)} students, batch {options.batch}"
    )
    for heading in ("scheme", "ranks", "steps a second", "times the reference", "peak memory a rank, MB", "share"):
        table.add_column(heading, justify="left" if heading == "scheme" else "right")
    for row in best.values():
        row["times_reference"] = row["steps_per_second"] / base["steps_per_second"]
        row["memory_share"] = row["memory_mb"][0] / base["memory_mb"][0]
        table.add_row(
            row["scheme"],
            str(row["ranks"]),
            f"{row['steps_per_second']:.2f}",
            f"{row['times_reference']:.2f}",
            " / ".join(f"{m:.0f}" for m in row["memory_mb"]),
            f"{row['memory_share']:.2f}",
        )
    Console(width=120).print(table)
    if options.json:
        settings = {k: v for k, v in vars(options).items() if k != "json"}
        options.json.write_text(json.dumps({"settings": settings, "schemes": list(best.values())}, indent=1))


if __name__ == "__main__":
    main()
