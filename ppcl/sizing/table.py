"""The sizing of a model as a table on the terminal."""

from __future__ import annotations

from collections.abc import Sequence

from rich.table import Table

from ppcl.sizing.model import Model
from ppcl.sizing.plan import Rank

_COLUMNS = ("GPUs", "pp × dp", "teacher", "students", "streams", "activations", "memory", "sent", "reduced", "FSDP")


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
        + [gigabytes(n) for n in (rank.teacher, rank.students, rank.streams, rank.activations, rank.memory, rank.sent, rank.reduced, rank.fsdp)]
        for rank in ranks
    ]


def table(model: Model, ranks: Sequence[Rank], interval: int, batch: int, size: str) -> Table:
    title = f"{model.name}: {model.parameters / 1e9:.2f} billion parameters, one student for {interval} blocks, {batch} samples a step, {size}"
    made = Table(title=title, title_justify="left", title_style="")
    for name in _COLUMNS:
        made.add_column(name, justify="right")
    for row in rows_of(ranks):
        made.add_row(*row)
    return made
