"""Detection of what can be replaced, from the probes; light enough for the job's own process."""

from __future__ import annotations

from typing import Any

from jobs.stage import Stage, StageContext
from ppcl.detection.detect import detect, write_detection


def run(context: StageContext) -> dict[str, Any]:
    """Find the redundant intervals, text runs and FFNs; writes `detection.json`."""
    config, teacher = context.config, context.teacher
    block_ranges = teacher.adapter.block_ranges(teacher.empty_transformer())
    probes = context.inputs["probes"].folder
    detection = detect(probes, block_ranges, config.detection, config.width, context.events)
    write_detection(context.folder, detection)
    return {"plan": detection["plan"]}


STAGE = Stage(
    name="detection",
    run=run,
    describe=lambda context: (
        "CKA of every interval, the contiguous redundant ones, and the text runs and FFNs that can go"
    ),
    depends_on=("probes",),
    sections=("detection", "width"),
)
