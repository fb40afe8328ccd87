"""Detection by similarity in one call, as the stage composes it, for tests without a job around it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from ppcl.config.schema import Detection, Width
from ppcl.detection.detect import detection_record, intervals_from_similarity, similarity_tables


def detect(
    probes: Path, block_ranges: list[range], settings: Detection, width: Width, tell: Callable[[int, int], None]
) -> dict[str, Any]:
    """The content of `detection.json`, computed here."""
    tables = similarity_tables(probes, block_ranges, settings, width, tell)
    intervals = intervals_from_similarity(tables, settings)
    return detection_record(tables, intervals, [intervals], width, probes, list(tables["ffn_errors"]))
