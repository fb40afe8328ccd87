"""A node's folder for what is downloaded: private to its user and bounded in size, the oldest files removed first.

A process marks what it uses by a lock that ends with it, so nothing is removed under a running job, and nothing stays
marked by one that was killed.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import os
import shutil
import stat
import tempfile
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from ppcl.errors import UserError, cannot_write

_BOUND = "PPCL_SCRATCH_GB"
# Of the disk that the folder is on, where the variable is not set.
_SHARE = 0.8
_OTHERS_WRITE = stat.S_IWGRP | stat.S_IWOTH
_MARKS = "in-use"
# Folders of the scratch folder whose members are removed as a whole; of others each file is removed alone.
_MADE = "made"
_WHOLE = ("snapshots", "checkpoints", _MADE)

_marked: dict[Path, IO[str]] = {}
_marking = threading.Lock()
# Scratch folders from which this process has removed what others left.
_swept: set[Path] = set()


def scratch_folder() -> Path:
    """The folder of this node for what is downloaded, which this user alone can write to.

    `PPCL_SCRATCH`, by default a folder of the system's temporary one. In a folder that others can write to, such as a
    volume of a node, it is a private folder inside. Raises `UserError` where somebody else has made that: what lies
    there cannot be trusted.
    """
    given = os.environ.get("PPCL_SCRATCH")
    if given and (not Path(given).exists() or _is_private(Path(given))):
        folder = Path(given).absolute()
    else:
        folder = Path(given or tempfile.gettempdir()).absolute() / f"ppcl-{os.getuid()}"
    # Where it cannot be made, whoever writes to it says why.
    with contextlib.suppress(OSError):
        folder.parent.mkdir(parents=True, exist_ok=True)
        folder.mkdir(mode=0o700)
    if (folder.exists() or folder.is_symlink()) and not _is_private(folder):
        raise UserError(
            f"the scratch folder {folder} is not private to this user: it belongs to somebody else, is a link, or "
            "others can write to it; remove it, or set PPCL_SCRATCH to a folder of your own"
        )
    return folder


def _is_private(folder: Path) -> bool:
    """Whether a folder is this user's own, and nobody else can write to it."""
    status = folder.lstat()
    return stat.S_ISDIR(status.st_mode) and status.st_uid == os.getuid() and not status.st_mode & _OTHERS_WRITE


def scratch_bound(folder: Path) -> int:
    """Bytes that the scratch folder may hold: `PPCL_SCRATCH_GB`, by default 80 % of its disk."""
    given = os.environ.get(_BOUND)
    if not given:
        return round(_SHARE * shutil.disk_usage(folder).total)
    try:
        bound = float(given)
        if not 0 < bound < float("inf"):
            raise ValueError
    except ValueError:
        raise UserError(f"{_BOUND} is {given!r}: give a number of GB greater than 0") from None
    return round(bound * 1e9)


def keep_used(path: Path) -> None:
    """Have `reserve` leave a file or folder of the scratch folder, and all in it, until this process ends.

    The first call of a process removes the temporary folders of processes that are gone.
    """
    folder = scratch_folder()
    if folder not in _swept:
        _swept.add(folder)
        _remove_orphans(folder)
    _keep(path)


def _keep(path: Path) -> None:
    with _marking:
        if path not in _marked and _marked.keys().isdisjoint(path.parents):
            mark = _mark(scratch_folder(), path)
            with contextlib.suppress(OSError):
                mark.parent.mkdir(parents=True, exist_ok=True)
                file = open(mark, "a")  # noqa: SIM115  (its lock is to last)
                # Waits for one who is removing it.
                fcntl.flock(file, fcntl.LOCK_SH)
                os.utime(mark)
                _marked[path] = file


@contextlib.contextmanager
def private_temporary() -> Iterator[Path]:
    """A new folder in the scratch folder, for the length of a `with` block; those of killed processes are removed."""
    folder = scratch_folder()
    made = folder / _MADE
    made.mkdir(parents=True, exist_ok=True)
    _remove_orphans(folder)
    with contextlib.ExitStack() as until_end:
        # Nobody else sees it without its mark.
        with _one_at_a_time(folder):
            temporary = Path(until_end.enter_context(tempfile.TemporaryDirectory(dir=made)))
            _keep(temporary)
        until_end.callback(_let_go, temporary)
        yield temporary


def _let_go(path: Path) -> None:
    if mark := _marked.pop(path, None):
        Path(mark.name).unlink(missing_ok=True)
        mark.close()


def _remove_orphans(folder: Path) -> None:
    """Remove temporary folders whose process has ended without doing so; one without a mark may still be used."""
    with contextlib.suppress(OSError):
        left = [path for path in (folder / _MADE).iterdir() if _mark(folder, path).exists()]
        if not left:
            return
        with _one_at_a_time(folder):
            for path in left:
                if path not in _marked and _removed(folder, path):
                    _mark(folder, path).unlink(missing_ok=True)


def reserve(path: Path, size: int, what: str) -> None:
    """Make a file of `size` bytes, which are to be written, after removing what was used longest ago where needed.

    `what`: is downloaded, in messages. Raises `UserError` where there is no room for it.
    """
    folder = scratch_folder()
    try:
        if folder not in path.parents:
            _create(path, size)
            return
        with _one_at_a_time(folder):
            _make_room(folder, size, what, path)
            _create(path, size)
    except OSError as error:
        if sentence := cannot_write(error):
            raise UserError(f"{sentence}; free space, or set PPCL_SCRATCH to another folder") from None
        raise


def _create(path: Path, size: int) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "wb") as file:
        file.truncate(size)


@contextlib.contextmanager
def _one_at_a_time(folder: Path) -> Iterator[None]:
    with open(folder / ".reserve.lock", "w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


@dataclass(frozen=True)
class _Entry:
    """What is removed as a whole. `size`: bytes of its files. `to_come`: those of them that are not on the disk yet."""

    path: Path
    size: int
    to_come: int
    used_at: float


def _make_room(folder: Path, size: int, what: str, path: Path) -> None:
    entries = _entries(folder)
    held, to_come = sum(entry.size for entry in entries), sum(entry.to_come for entry in entries)
    bound, free = scratch_bound(folder), shutil.disk_usage(folder).free - to_come
    over, lacking = held + size - bound, size - free
    for entry in sorted(entries, key=lambda entry: entry.used_at):
        if max(over, lacking) <= 0:
            return
        if entry.path not in path.parents and _removed(folder, entry.path):
            over, lacking = over - entry.size, lacking - (entry.size - entry.to_come)
    if over > 0:
        raise UserError(
            f"the scratch folder {folder} is full: it may hold {_gb(bound)} GB ({_BOUND}), running processes use "
            f"{_gb(bound - size + over)}, and {what} needs {_gb(size)} more; raise {_BOUND}, or set PPCL_SCRATCH to a "
            "folder on a larger disk"
        )
    if lacking > 0:
        raise UserError(
            f"the disk of the scratch folder {folder} has {_gb(size - lacking)} GB free, and {what} needs {_gb(size)}; "
            "free space, or set PPCL_SCRATCH to another folder"
        )


def _gb(count: int) -> str:
    return f"{max(count, 0) / 1e9:.3g}"


def _entries(folder: Path) -> list[_Entry]:
    """Everything in the scratch folder but marks and locks. Costs a look at each file."""
    entries = []
    for top in folder.iterdir():
        if top.name == _MARKS or not top.is_dir() or top.is_symlink():
            continue
        members = top.iterdir() if top.name in _WHOLE else (path for path in top.rglob("*") if path.is_file())
        entries += [_entry(folder, path) for path in members if not path.name.endswith(".lock")]
    return entries


def _entry(folder: Path, path: Path) -> _Entry:
    size = to_come = 0
    used_at = 0.0
    for file in path.rglob("*") if path.is_dir() else (path,):
        with contextlib.suppress(FileNotFoundError):
            status = file.lstat()
            if not stat.S_ISDIR(status.st_mode):
                size += status.st_size
                to_come += max(0, status.st_size - status.st_blocks * 512)
                used_at = max(used_at, status.st_mtime)
    for marked in _up_to(folder, path):
        with contextlib.suppress(FileNotFoundError):
            used_at = max(used_at, _mark(folder, marked).stat().st_mtime)
    return _Entry(path, size, to_come, used_at)


def _removed(folder: Path, path: Path) -> bool:
    """Remove a file or folder, unless a process uses it, or one that it is in."""
    with contextlib.ExitStack() as locks:
        for marked in _up_to(folder, path):
            mark = _mark(folder, marked)
            if not mark.exists():
                continue
            file = locks.enter_context(open(mark))
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError:
                return False
        if path.is_dir():
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink(missing_ok=True)
    return True


def _up_to(folder: Path, path: Path) -> Iterator[Path]:
    """The path and the folders that it is in, below the scratch folder."""
    yield path
    yield from (above for above in path.parents if folder in above.parents)


def _mark(folder: Path, path: Path) -> Path:
    """The file whose lock says that a path is used."""
    return folder / _MARKS / hashlib.sha256(str(path).encode()).hexdigest()[:32]
