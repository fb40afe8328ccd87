"""The checkpoints that the ranks of a stage resume from: damaged ones are left out and reported."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from jobs.runtime.progress_board import RankReporter
from ppcl.storage.checkpoint_sync import synced_checkpoints
from ppcl.storage.tensor_files import drop_damaged, is_whole


def drop_damaged_checkpoints(stage: str, folder: Path) -> list[str]:
    """Before the ranks start: make the folder, remove what is damaged in it, and give a note for each.

    In a bucket each node does this for itself.
    """
    folder.mkdir(parents=True, exist_ok=True)
    return [damage_note(stage, path) for path in drop_damaged(folder)]


@contextmanager
def open_checkpoints(
    stage: str, folder: str, attempt: str, report: RankReporter, whole: Callable[[Path], bool] = is_whole
) -> Iterator[Path]:
    """On a rank: the folder, see `ppcl.storage.checkpoint_sync.synced_checkpoints`. `whole(path)`: of a file."""
    with synced_checkpoints(folder, attempt, whole, lambda path: report.note(damage_note(stage, path))) as checkpoints:
        yield checkpoints


def damage_note(stage: str, path: Path) -> str:
    """What the user is told of a damaged checkpoint: a file, or the folder of a step."""
    name = path.parent.name if path.parent.name.startswith("step-") else path.stem
    if name.startswith("step-"):
        step = int(name.removeprefix("step-"))
        return f"{stage}: its checkpoint of step {step} was damaged; trained again from the one before, or the start"
    return f"{stage}: the checkpoint of {name} was damaged; trained again from the start"
