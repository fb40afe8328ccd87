"""Terminal tables of the memory estimate and of the step-time estimate."""

from __future__ import annotations

from collections.abc import Sequence

from rich.table import Table

from ppcl.sizing.job import WorkerSize
from ppcl.sizing.memory import Rank
from ppcl.sizing.model import Model
from ppcl.sizing.simulation import Step

LAYOUT_COLUMNS = (
    "GPUs",
    "pp × dp",
    "teacher",
    "students",
    "streams",
    "activations",
    "memory",
    "sent",
    "reduced",
    "FSDP",
)
# What a step of either kind consists of.
DISTILLATION = ("compute", "imbalance", "weights", "reduce", "streams")
PROBES = ("compute", "sums", "imbalance", "weights", "streams")
_STEP_COLUMNS = ("GPUs", "pp × dp", "samples a replica", "step, ms", "samples a second", "efficiency", "binds")


def gigabytes(count: float) -> str:
    """Three digits: `28.3 MB`, `40.9 GB`; a dash for nothing."""
    if not count:
        return "–"
    for unit, size in (("TB", 1e12), ("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if count >= size:
            return f"{count / size:.3g} {unit}" if count / size < 999.5 else f"{count / size:.0f} {unit}"
    return f"{count} B"


def rows_of(ranks: Sequence[Rank]) -> list[list[str]]:
    return [
        [str(rank.gpus), f"{rank.pp} × {rank.dp}"]
        + [
            gigabytes(n)
            for n in (
                rank.teacher,
                rank.students,
                rank.streams,
                rank.activations,
                rank.memory,
                rank.sent,
                rank.reduced,
                rank.fsdp,
            )
        ]
        for rank in ranks
    ]


def table(model: Model, ranks: Sequence[Rank], interval: int, batch: int, size: str) -> Table:
    title = (
        f"{model.name}: {model.parameters / 1e9:.2f} billion parameters, one student for {interval} blocks, {batch} "
        f"samples a step, {size}"
    )
    made = Table(title=title, title_justify="left", title_style="")
    for name in LAYOUT_COLUMNS:
        made.add_column(name, justify="right")
    for row in rows_of(ranks):
        made.add_row(*row)
    return made


def duration(seconds: float | None) -> str:
    """`45 s`, `12 min`, `3.4 h`; a dash for what is not computed."""
    if seconds is None:
        return "–"
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"


JOB_COLUMNS = ("stage", "worker", "workers", "device", "most of it", "host", "written", "sent", "time")


def job_rows(workers: Sequence[WorkerSize]) -> list[list[str]]:
    """A row a kind of worker: bytes of the fullest one, and what the stage writes, sends and how long it takes."""
    rows = []
    for worker in workers:
        largest = sorted(worker.device.items(), key=lambda part: -part[1])[:2]
        parts = ", ".join(f"{name} {gigabytes(size)}" for name, size in largest if size)
        sizes = [gigabytes(n) for n in (worker.host_bytes, worker.written, worker.sent)]
        rows.append(
            [worker.stage, worker.worker, str(worker.count), gigabytes(worker.device_bytes), parts or "–", *sizes]
            + [duration(worker.seconds)]
        )
    return rows


def job_table(title: str, workers: Sequence[WorkerSize]) -> Table:
    made = Table(title=title, title_justify="left", title_style="")
    for name in JOB_COLUMNS:
        made.add_column(name, justify="left" if name in ("stage", "worker", "most of it") else "right")
    for row in job_rows(workers):
        made.add_row(*row)
    return made


def step_rows(steps: Sequence[Step], parts: Sequence[str]) -> list[list[str]]:
    return [
        [
            str(step.gpus),
            f"{step.pp} × {step.dp}",
            str(step.samples),
            f"{1e3 * step.step:.0f}",
            f"{step.throughput:.0f}",
            f"{100 * step.efficiency:.0f} %",
            step.binds,
            *(f"{1e3 * getattr(step, part):.0f}" for part in parts),
            f"{step.fill:.1f}",
            f"{step.read:.0f}",
        ]
        for step in steps
    ]


def step_table(title: str, steps: Sequence[Step], parts: Sequence[str]) -> Table:
    made = Table(title=title, title_justify="left", title_style="")
    for name in (*_STEP_COLUMNS, *(f"{part}, ms" for part in parts), "fill, s", "read, s"):
        made.add_column(name, justify="left" if name == "binds" else "right")
    for row in step_rows(steps, parts):
        made.add_row(*row)
    return made
