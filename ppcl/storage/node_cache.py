"""Scratch folders that the processes of a node share, so that each file is downloaded once per node."""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import os
import stat
import tempfile
from collections.abc import Callable, Collection, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, TypeVar

from ppcl.config.location import SCHEME
from ppcl.errors import UserError

MIRROR = "ppcl-mirror"

# Threads of one `parallel_map`.
_AT_ONCE = 8

_OTHERS_WRITE = stat.S_IWGRP | stat.S_IWOTH

T = TypeVar("T")


def parallel_map(call: Callable[[Any], T], items: Collection[Any]) -> list[T]:
    """`[call(item) for item in items]` in threads. Raises the exception of the first item that has one."""
    if not items:
        return []
    with ThreadPoolExecutor(min(_AT_ONCE, len(items))) as pool:
        return list(pool.map(call, items))


def file_sha256(path: Path) -> str:
    """The sha256 of a file's content, in hexadecimal digits."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


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


def mirror(url: str) -> Path:
    """The folder of this node that mirrors a URL."""
    return scratch_folder() / MIRROR / url.removeprefix(SCHEME)


def make_folder(folder: Path) -> Path:
    """Make a folder, and those above it, where it does not exist."""
    folder.mkdir(parents=True, exist_ok=True)
    return folder


@contextlib.contextmanager
def once_a_node(path: Path) -> Iterator[None]:
    """A lock on a path among the processes of this node: what one of them downloads, the others find."""
    make_folder(path.parent)
    with open(path.with_name(f".{path.name}.lock"), "w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield
