"""Files that appear whole or not at all, whoever else writes them at the same time.

A file is written beside its place under a name that no other writer uses, then renamed. What a killed process left half
written is removed by whoever holds the folder's lock next.
"""

from __future__ import annotations

import os
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

PARTIAL = ".partial"  # the suffix of files that are being written


@contextmanager
def replacing(path: Path, durable: bool = True) -> Iterator[Path]:
    """A path to write to for the length of a `with` block; at its end the file takes the place of `path` in one rename.

    Where the block raises, the file is removed and `path` stays as it was. `durable`: flush it to the disk before, else
    a power failure could leave the name without the content.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f"{path.name}.{uuid.uuid4().hex[:12]}{PARTIAL}")
    try:
        yield partial
        if durable:
            with open(partial, "rb") as file:
                os.fsync(file.fileno())
        os.replace(partial, path)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise


def remove_partials(folder: Path) -> None:
    """Remove what killed processes left half written in a folder and those below it.

    Called by who has locked the folder: a process that is still writing there would lose its file.
    """
    for path in folder.rglob(f"*{PARTIAL}"):
        path.unlink(missing_ok=True)
