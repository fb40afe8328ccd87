"""The table of families: what ppcl can do with each, what tests hold of it, and what it cannot do and why.

`ppcl architectures` prints it, and `docs/architectures.md` is made of it.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from ppcl.models.adapter import ModelAdapter, records

# Of families with parts of blocks in their record.
_WIDTHS = ("pruned FFNs", "linear FFNs", "text runs", "fewer heads", "modulations in low rank")
# Families that a whole job is tested with, from calibration to images.
_WHOLE_JOBS = ("FluxPipeline", "QwenImagePipeline", "StableDiffusion3Pipeline")

# Transformers that pipelines with prompts have and that no record describes: why not.
LEFT_OUT = {
    "BriaFiboTransformer2DModel": "the stock forward exchanges half of the text stream's channels before every block",
    "HiDreamImageTransformer2DModel": "the stock forward appends other text to the streams before every block",
}


@dataclass(frozen=True)
class Architecture:
    """One row. `depth`: intervals, their students, and removal of blocks. `widths`: kinds of width replacements.

    `jobs`: the pipelines that a job can calibrate. `tested`: by part, what of it tests hold on a tiny random model.
    `limits`: by what is missing or not tested, why.
    """

    family: str
    transformer: str
    pipelines: tuple[str, ...]
    block_lists: tuple[str, ...]
    depth: bool
    widths: tuple[str, ...]
    jobs: tuple[str, ...]
    tested: dict[str, str]
    limits: dict[str, str]

    @classmethod
    def of(cls, record: ModelAdapter) -> Architecture:
        tested = {
            "depth": "model in parts and swapped, bit for bit; a student's closed form and training; removal",
        }
        if record.parts:
            tested["widths"] = "pruned FFNs and modulations at full width are the stock forward; a text run"
        if generating := [name for name in record.pipelines if name not in record.notes]:
            tested["images"] = f"a variant through {', '.join(generating)}"
        if any(name in _WHOLE_JOBS for name in record.pipelines):
            tested["jobs"] = "from calibration to images"
        elif any(name not in record.uncalibrated for name in record.pipelines):
            tested["jobs"] = "recorded samples give the pipeline's own velocities"
        return cls(
            family=record.name,
            transformer=record.transformer,
            pipelines=record.pipelines,
            block_lists=record.block_lists,
            depth=True,
            widths=_WIDTHS if record.parts else (),
            jobs=tuple(name for name in record.pipelines if name not in record.uncalibrated),
            tested=tested,
            limits={**record.notes, **{f"job of {name}": why for name, why in record.uncalibrated.items()}},
        )

    def as_json(self) -> dict[str, Any]:
        return asdict(self)


def architectures() -> list[Architecture]:
    """All rows, by family."""
    return [Architecture.of(record) for record in records()]


COLUMNS = ("family", "transformer", "pipelines", "block lists", "depth", "widths", "jobs", "tested", "not, and why")


def cells(row: Architecture) -> tuple[str, ...]:
    """A row as text, by column."""
    return (
        row.family,
        row.transformer,
        ", ".join(row.pipelines),
        ", ".join(row.block_lists),
        "yes" if row.depth else "no",
        ", ".join(row.widths) or "none",
        ", ".join(row.jobs) or "none",
        "; ".join(f"{part}: {what}" for part, what in row.tested.items()),
        "; ".join(f"{part}: {why}" for part, why in row.limits.items()),
    )
