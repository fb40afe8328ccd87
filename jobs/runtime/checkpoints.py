"""The checkpoints that the ranks of a stage resume from: damaged ones are left out and reported."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from jobs.runtime.progress_board import RankReporter
from ppcl.storage.checkpoint_sync import synced_checkpoints
from ppcl.storage.tensor_files import drop_damaged, is_whole


def drop_damaged_checkpoints(stage: str, folder: Path, drop: Callable[[Path], list[Path]] = drop_damaged) -> list[str]:
    """Before the ranks start: make the folder, remove what is damaged in it, and give a note for each.

    `drop(folder)` removes it and gives its paths. In a bucket each node does this for itself.
    """
    folder.mkdir(parents=True, exist_ok=True)
    return [_damaged(stage, path) for path in drop(folder)]


@contextmanager
def open_checkpoints(
    stage: str, folder: str, attempt: str, report: RankReporter, whole: Callable[[Path], bool] = is_whole
) -> Iterator[Path]:
    """On a rank: the folder, see `ppcl.storage.checkpoint_sync.synced_checkpoints`. `whole(path)`: of a file."""
    with synced_checkpoints(folder, attempt, whole, lambda path: report.note(_damaged(stage, path))) as checkpoints:
        yield checkpoints


def _damaged(stage: str, path: Path) -> str:
    name = path.parent.name if path.parent.name.startswith("step-") else path.stem
    if name.startswith("step-"):
        step = int(name.removeprefix("step-"))
        return f"{stage}: its checkpoint of step {step} was damaged; trained again from the one before, or the start"
    return f"{stage}: the checkpoint of {name} was damaged; trained again from the start"
