"""Distillation and probes on 1, 2 and 4 one-thread workers: throughput, bytes between them, and what a simulation says.

    python benchmarks/scaling.py --json benchmarks/results/scaling.json

A random Qwen-Image transformer whose products dominate, bfloat16, the same random samples for all. Efficiency is
against as many cores as there are: 4 workers on 2 cores can be at most twice as fast as one.

- `distillation`, `probes`: pipelines of 1, 2 and 4 ranks; `1 × 2`, `2 × 2`: replicas; `uneven`: one student for half of
  the blocks, so that two ranks cannot have equal shares.
- `FSDP`: the scheme that holds everything everywhere, sharded by torch's FSDP2 (`fully_shard`), two ranks: a block of
  the teacher is gathered for its forward, a student for its forward and its backward, its gradient is scattered.

Bytes are what a rank sends in a step, counted where torch.distributed is called; a gather of n ranks sends (n − 1) / n
of what it makes, a reduction of n ranks twice that. `by formula` is what `ppcl plan` computes from the configuration
alone.

The simulation gets this machine's rates (products of a block, memory, messages), measured with both cores busy on
pieces of work alone; it does not see a pipeline. `predicted` and `measured` are steps a second against one rank's.
"""

from __future__ import annotations

import argparse
import copy
import json
import os
import socket
import statistics
import sys
import tempfile
import time
import warnings
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from rich.console import Console
from rich.table import Table
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.distillation import SIDE, TEXT_TOKENS, RandomSamples, joint_loss, make_teacher
from ppcl.calibration.splits import Split
from ppcl.config.schema import Distillation, Probes
from ppcl.detection import fit_probes as probes_run
from ppcl.linalg import Moments
from ppcl.models import embed, run_blocks
from ppcl.models.teacher import Teacher
from ppcl.replacements import Interval
from ppcl.sizing import Model
from ppcl.sizing.device import Device
from ppcl.sizing.memory import rank_of
from ppcl.sizing.simulation import STUDENT_TRAFFIC, distillation_on, probes
from ppcl.training.captured import CapturedActivations
from ppcl.training.data import batch_of
from ppcl.training.distillation.objectives import TeacherBlocks, new_objective
from ppcl.training.distillation.trainee import Trainee
from ppcl.training.distillation.trainer import distil
from ppcl.training.parallel_dims import ParallelDims
from ppcl.training.run_context import RunContext
from ppcl.training.teacher_segment import TeacherSegment

WARM = 3
BF16 = torch.bfloat16
# pp, dp and which plan; None: FSDP.
MESHES = {
    "1": (1, 1, "even"),
    "2": (2, 1, "even"),
    "4": (4, 1, "even"),
    "1 × 2": (1, 2, "even"),
    "2 × 2": (2, 2, "even"),
    "1, uneven": (1, 1, "uneven"),
    "2, uneven": (2, 1, "uneven"),
}


class Bytes:
    """Counts what this process sends, by kind, from where torch.distributed is called."""

    def __init__(self) -> None:
        self.sent: Counter[str] = Counter()

        def counted(name: str, size: Callable[..., float]) -> None:
            stock = getattr(dist, name)

            def call(*args: Any, **named: Any) -> Any:
                self.sent[name] += size(*args, **named)
                return stock(*args, **named)

            setattr(dist, name, call)

        def share(group: Any) -> float:
            n = dist.get_world_size(group)
            return (n - 1) / n

        counted("isend", lambda x, *args, **named: x.nbytes)
        counted("all_reduce", lambda x, op=None, group=None, **named: 2 * share(group) * x.nbytes)
        # What FSDP2 calls.
        counted(
            "all_gather_single",
            lambda output_tensor, input_tensor, group=None, **named: share(group) * output_tensor.nbytes,
        )
        counted(
            "reduce_scatter_single", lambda output, input, op=None, group=None, **named: share(group) * input.nbytes
        )


def plan_of(kind: str, blocks: int) -> list[Interval]:
    """Students of three blocks each; `uneven`: one for the first half, the rest in threes."""
    begin = blocks // 2 if kind == "uneven" else 0
    long = [Interval(0, begin - 1)] if begin else []
    return long + [Interval(u, u + 2) for u in range(begin, blocks - 2, 3)]


def _distil(
    options: argparse.Namespace, folder: Path, pp: int, dp: int, kind: str, step_done: Callable[[], None]
) -> None:
    settings = Distillation(
        steps=options.steps,
        batch_size=options.batch,
        warmup=1,
        pipeline_parallel=pp,
        data_parallel=dp,
        init="first",
        precision="bfloat16",
        checkpoint_every=10**6,
    )
    with tempfile.TemporaryDirectory() as out:
        distil(
            Teacher(folder),
            RandomSamples(256),
            plan_of(kind, options.blocks),
            settings,
            RunContext(
                Path(out),
                Path(out) / "c",
                dims=ParallelDims.join(pp, dp),
                report=lambda *_, phase=None: step_done(),
            ),
        )


def _probe(options: argparse.Namespace, folder: Path, pp: int, step_done: Callable[[], None]) -> None:
    class Fitted(RandomSamples):
        def ids(self, split: Split) -> np.ndarray:
            return np.arange(1 if split == "validation" else options.batch * options.steps)

    with tempfile.TemporaryDirectory() as out:
        probes_run.fit_probes(
            Teacher(folder),
            Fitted(0),
            Probes(batch_size=options.batch),
            RunContext(
                Path(out),
                Path(out),
                dims=ParallelDims.join(pp, 1),
                report=lambda done, total, told, phase=None: step_done(),
            ),
            tokens=1,
            precision="bfloat16",
        )


def _fsdp(options: argparse.Namespace, folder: Path, step_done: Callable[[], None]) -> None:
    """The teacher's forward, all students' losses added up, one backward, one optimizer; everything sharded."""
    dims, rank, world = init_device_mesh("cpu", (dist.get_world_size(),)), dist.get_rank(), dist.get_world_size()
    teacher = Teacher(folder)
    model, adapter = teacher.transformer(dtype=BF16), teacher.adapter
    blocks, intervals = adapter.blocks(model), plan_of("even", options.blocks)
    students = [copy.deepcopy(blocks[i.first]).float().requires_grad_(True) for i in intervals]
    for block in blocks:
        fully_shard(block, dims=dims, reshard_after_forward=True)
    precision = MixedPrecisionPolicy(param_dtype=BF16, reduce_dtype=torch.float32)
    for student in students:
        fully_shard(student, dims=dims, reshard_after_forward=True, mp_policy=precision)
    parameters = [p for student in students for p in student.parameters()]
    optimizer = torch.optim.AdamW(parameters, lr=1e-4, betas=(0.9, 0.95), weight_decay=0.02, foreach=True)
    samples = RandomSamples(256)
    for step in range(options.steps):
        rows = batch_of(step, samples.ids("train"), options.batch, 0)[rank::world]
        with torch.no_grad():
            start = embed(model, samples.batch(rows, "cpu", BF16))
        loss = joint_loss(adapter, blocks, students, intervals, start, "relative")
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        step_done()


def _seconds(work: Callable[[], Any], times: int = 7) -> float:
    """Median of one call, all ranks at it at once."""
    found = []
    for _ in range(times):
        dist.barrier()
        begun = time.perf_counter()
        work()
        found.append(time.perf_counter() - begun)
    return statistics.median(found[2:])


def _rates(options: argparse.Namespace, folder: Path, model: Model) -> dict[str, float]:
    """This machine as a device, from pieces of work alone, on two ranks."""
    teacher, rank = Teacher(folder), dist.get_rank()
    segment = TeacherSegment(teacher, range(2), [Interval(0, 1)], "cpu", BF16)
    adapter, samples = segment.adapter, RandomSamples(256)
    streams, context = embed(segment.transformer, samples.batch(range(options.batch), "cpu", BF16))

    @torch.no_grad()
    def forward() -> Any:
        return run_blocks(adapter, segment.blocks.values(), streams, context)

    flops = options.batch * sum(model.flops[:2]) / _seconds(forward)
    objective = new_objective(
        TeacherBlocks(adapter, segment.transformer, segment.blocks, 2), Interval(0, 1), Distillation(init="first")
    )
    trainee = Trainee(objective, Distillation(), ParallelDims())
    captured = CapturedActivations(boundaries={0: streams, 2: forward()}, context=context)
    trainee.train_step(captured, True)
    own = sum(p.numel() for p in trainee.state.parameters.values())

    def update() -> None:
        torch.nn.utils.clip_grad_norm_(trainee.state.parameters.values(), 1.0)
        trainee.state.optimizer.step()

    memory = own * 40 / _seconds(update)  # the norm, the clip and AdamW
    learn = _seconds(lambda: trainee.train_step(captured, True))
    trained = options.batch * model.trained_flops[0] / max(learn - own * STUDENT_TRAFFIC / memory, 1e-9)
    x = streams.img.flatten(0, 1).float()
    sums = 4 * x.shape[0] * x.shape[1] ** 2 / _seconds(lambda: Moments(x.shape[1], x.shape[1]).update(x, x))
    large, small = torch.zeros(own), torch.zeros(1)
    one, other = (_seconds(lambda x=x: dist.all_reduce(x)) for x in (small, large))

    def sent() -> None:
        # There and back, so that the sender's clock sees the whole way.
        for source in (0, 1):
            for x in streams:
                dist.send(x, 1 - rank) if rank == source else dist.recv(torch.empty_like(x), 1 - rank)

    stream = options.batch * model.stream_bytes
    there = _seconds(sent) / 2
    latency = one / 2
    return {
        "flops": flops,
        "trained": trained,
        "sums": sums,
        "memory": memory,
        "latency": latency,
        "send": stream / max(there - 2 * latency, 1e-9),
        "reduce": large.nbytes / max(other - one, 1e-9),
        "learn_seconds": learn,
    }


def _rank(
    rank: int, world: int, port: int, what: tuple, options: argparse.Namespace, folder: Path, answers: Any
) -> None:
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    dist.init_process_group("gloo", rank=rank, world_size=world)
    if what[0] == "rates":
        answers.put((rank, _rates(options, folder, what[1])))
        dist.destroy_process_group()
        return
    counted = Bytes()
    times, sent = [], []

    def step_done() -> None:
        times.append(time.monotonic())
        sent.append(Counter(counted.sent))

    work = {"distillation": _distil, "probes": _probe, "FSDP": _fsdp}[what[0]]
    work(options, folder, *what[1:], step_done)
    # The last count of probes is of held-out samples.
    times, sent = times[: options.steps], sent[: options.steps]
    steps = len(times) - WARM - 1
    by_kind = {kind: (sent[-1][kind] - sent[WARM][kind]) / steps for kind in sent[-1]}
    # Over all steps but the first: a pipeline's last rank begins later, all end together.
    answers.put((rank, {"seconds": (times[-1] - times[WARM]) / steps, "sent": by_kind}))
    dist.destroy_process_group()


def spawn(world: int, what: tuple, options: argparse.Namespace, folder: Path) -> list[dict[str, Any]]:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    answers = mp.get_context("spawn").SimpleQueue()
    mp.spawn(_rank, (world, port, what, options, folder, answers), nprocs=world)
    return [answer for _, answer in sorted((answers.get() for _ in range(world)), key=lambda pair: pair[0])]


def measured(ranks: Sequence[dict[str, Any]]) -> dict[str, Any]:
    return {
        "ranks": len(ranks),
        "steps_per_second": 1 / max(r["seconds"] for r in ranks),
        "sent": max(({k: v for k, v in r["sent"].items() if v} for r in ranks), key=lambda sent: sum(sent.values())),
        "sent_by_all": sum(sum(r["sent"].values()) for r in ranks),
    }


def fsdp_bytes(model: Model, plan: Sequence[Interval], world: int) -> float:
    """What a rank sends in a step of FSDP: teacher's blocks and students (twice) in bfloat16, gradients in float32."""
    students = sum(model.blocks[i.first] for i in plan)
    return (world - 1) / world * (2 * sum(model.blocks) + 2 * 2 * students + 4 * students)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--blocks", type=int, default=24)
    parser.add_argument("--width", type=int, default=256, help="a multiple of 64")
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--rounds", type=int, default=2, help="everything so many times in turn; the best counts")
    parser.add_argument("--json", type=Path, help="write the figures there")
    options = parser.parse_args()
    cores = len(os.sched_getaffinity(0))
    best: dict[str, dict[str, Any]] = {}
    with tempfile.TemporaryDirectory() as name:
        folder = make_teacher(Path(name), options.blocks, options.width)
        with warnings.catch_warnings(action="ignore"):
            config = dict(Teacher(folder).config())
            model = Model.of("random", "QwenImageTransformer2DModel", config, TEXT_TOKENS, 16 * SIDE, 16 * SIDE)
        rates = spawn(2, ("rates", model), options, folder)
        work = {
            f"distillation {key}": (pp * dp, ("distillation", pp, dp, kind)) for key, (pp, dp, kind) in MESHES.items()
        }
        work |= {f"probes {pp}": (pp, ("probes", pp)) for pp in (1, 2, 4)}
        work |= {f"FSDP {n}": (n, ("FSDP",)) for n in (2,)}
        for _ in range(options.rounds):
            for key, (world, what) in work.items():
                got = measured(spawn(world, what, options, folder))
                if key not in best or got["steps_per_second"] > best[key]["steps_per_second"]:
                    best[key] = got
    rate = {key: statistics.mean(r[key] for r in rates) for key in rates[0]}
    _told(options, config, model, rate, best, cores)


def device_of(rate: dict[str, float], model: Model, blocks: int) -> Device:
    """This machine: one rate for forward and backward, weighed as a step has them; another one for reductions."""
    flops = sum(model.flops), sum(model.trained_flops[i.first] for i in plan_of("even", blocks))
    mixed = sum(flops) / (flops[0] / rate["flops"] + flops[1] / rate["trained"])
    return Device(
        name="this machine, a core each",
        flops=mixed,
        sums=rate["sums"],
        memory=rate["memory"],
        link=rate["send"],
        network=rate["reduce"],
        latency=rate["latency"],
        utilisation=1.0,
        reached=1.0,
        size=1e12,
        node=1 << 20,
    )


def predicted(key: str, model: Model, device: Device, batch: int, blocks: int, cores: int) -> float | None:
    """Steps a second against one rank's; all ranks together cannot have more than the cores there are."""
    what, _, dims = key.partition(" ")
    if what == "FSDP":
        return None
    if what == "probes":
        alone, step = (probes(model, batch, pp, device) for pp in (1, int(dims)))
    else:
        pp, dp, kind = MESHES[dims]
        here = device.model_copy(update={"link": device.network}) if dp > 1 else device
        alone = distillation_on(model, plan_of(kind, blocks), batch, 1, 1, device)
        step = distillation_on(model, plan_of(kind, blocks), batch, pp, dp, here)
    busy = step.used * (step.compute + step.sums + step.weights + step.reduce)
    return alone.step / max(step.step, busy / cores)


def _told(
    options: argparse.Namespace,
    config: dict[str, Any],
    model: Model,
    rate: dict[str, float],
    best: dict[str, dict[str, Any]],
    cores: int,
) -> None:
    device = device_of(rate, model, options.blocks)
    teacher = f"{options.blocks} blocks of width {options.width}"
    lines = Table(title=f"{teacher}, batch {options.batch}, one thread a worker, {cores} cores")
    for heading in (
        "",
        "workers",
        "steps a second",
        "times one",
        "of the cores",
        "predicted",
        "sent a rank and step, kB",
        "by formula",
        "FSDP's, kB",
    ):
        lines.add_column(heading, justify="left" if not heading else "right")
    for key, row in best.items():
        what, _, dims = key.partition(" ")
        base = best[
            "distillation 1, uneven" if "uneven" in key else "probes 1" if what == "probes" else "distillation 1"
        ]
        row["times_one"] = row["steps_per_second"] / base["steps_per_second"]
        row["of_cores"] = row["times_one"] / min(row["ranks"], cores)
        row["sent_bytes"] = sum(row["sent"].values())
        # Probes need the teacher's forward alone.
        plan = [] if what == "probes" else plan_of("uneven" if "uneven" in key else "even", options.blocks)
        row["fsdp_bytes"] = fsdp_bytes(model, plan, row["ranks"])
        row["predicted"] = predicted(key, model, device, options.batch, options.blocks, cores)
        if what == "distillation":
            pp, dp, _ = MESHES[dims]
            first = rank_of(replace(model, affine=0), plan, options.batch // dp, 0, pp, dp)
            row["formula_bytes"] = first.sent + first.reduced
        elif what == "probes":
            row["formula_bytes"] = options.batch * model.stream_bytes if row["ranks"] > 1 else 0
        else:
            row["formula_bytes"] = row["fsdp_bytes"]
        lines.add_row(
            key,
            str(row["ranks"]),
            f"{row['steps_per_second']:.2f}",
            f"{row['times_one']:.2f}",
            f"{row['of_cores']:.2f}",
            f"{row['predicted']:.2f}" if row["predicted"] else "",
            f"{row['sent_bytes'] / 1e3:,.0f}",
            f"{row['formula_bytes'] / 1e3:,.0f}",
            f"{row['fsdp_bytes'] / 1e3:,.0f}",
        )
    Console(width=150).print(lines)
    alone = distillation_on(model, plan_of("even", options.blocks), options.batch, 1, 1, device)
    overhead = 1 / best["distillation 1"]["steps_per_second"] / alone.step
    giga = {name: value / 1e9 for name, value in rate.items()}
    Console(width=150).print(
        f"A step of one rank takes {overhead:.2f} times the sum of its parts. "
        f"Rates: forward {giga['flops']:.1f} GFLOP/s, training {giga['trained']:.1f}, sums {giga['sums']:.1f}, "
        f"memory {giga['memory']:.1f} GB/s, send {giga['send']:.2f}, all-reduce {giga['reduce']:.2f}, "
        f"latency {rate['latency'] * 1e3:.2f} ms"
    )
    if options.json:
        settings = {k: v for k, v in vars(options).items() if k != "json"}
        settings |= {"cores": cores, "side": SIDE, "text_tokens": TEXT_TOKENS, "config": config}
        figures = {"rates": rate, "overhead": overhead, "runs": best}
        options.json.write_text(json.dumps({"settings": settings} | figures, indent=1))


if __name__ == "__main__":
    main()
