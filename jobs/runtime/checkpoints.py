"""The checkpoints that the ranks of a stage resume from: damaged ones are left out and reported."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from jobs.runtime.progress_board import RankReporter
from ppcl.storage.checkpoint_sync import synced_checkpoints
from ppcl.storage.tensor_files import drop_damaged, is_whole


def drop_damaged_checkpoints(stage: str, folder: Path) -> list[str]:
    """Before the ranks start: make the folder, remove damaged files from it, and give a note for each.

    In a bucket each node does this for itself.
    """
    folder.mkdir(parents=True, exist_ok=True)
    return [_damaged(stage, path) for path in drop_damaged(folder)]


@contextmanager
def open_checkpoints(stage: str, folder: str, attempt: str, report: RankReporter) -> Iterator[Path]:
    """On a rank: the folder, see `ppcl.storage.checkpoint_sync.synced_checkpoints`."""
    with synced_checkpoints(folder, attempt, is_whole, lambda path: report.note(_damaged(stage, path))) as checkpoints:
        yield checkpoints


def _damaged(stage: str, path: Path) -> str:
    whose = "its checkpoint" if path.stem == "checkpoint" else f"the checkpoint of {path.stem}"
    return f"{stage}: {whose} was damaged; trained again from the start"
