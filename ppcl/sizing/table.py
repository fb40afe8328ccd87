"""Terminal tables of the memory estimate and of the step-time estimate."""

from __future__ import annotations

from collections.abc import Sequence

from rich.table import Table

from ppcl.sizing.memory import Rank
from ppcl.sizing.model import Model
from ppcl.sizing.simulation import Step

_COLUMNS = ("GPUs", "pp × dp", "teacher", "students", "streams", "activations", "memory", "sent", "reduced", "FSDP")
# What a step of either kind consists of.
DISTILLATION = ("compute", "imbalance", "weights", "reduce", "streams")
PROBES = ("compute", "sums", "imbalance", "weights", "streams")
_STEP_COLUMNS = ("GPUs", "pp × dp", "samples a replica", "step, ms", "samples a second", "efficiency", "binds")


def gigabytes(count: float) -> str:
    """Three digits: `28.3 MB`, `40.9 GB`; a dash for nothing."""
    if not count:
        return "–"
    for unit, size in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
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
    for name in _COLUMNS:
        made.add_column(name, justify="right")
    for row in rows_of(ranks):
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
