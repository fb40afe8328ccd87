"""What the processes of a node share, so that each file is downloaded once per node."""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
from collections.abc import Callable, Collection, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, TypeVar

from ppcl.config.location import SCHEME
from ppcl.storage.scratch import keep_used, scratch_folder

MIRROR = "ppcl-mirror"

# Threads of one `parallel_map`.
_AT_ONCE = 8

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


def mirror(url: str, is_file: bool = False) -> Path:
    """The folder of this node that mirrors a URL, or its file. What is in the folder stays until this process ends."""
    path = scratch_folder() / MIRROR / url.removeprefix(SCHEME)
    # A mark for each of many files would take as many open files.
    keep_used(path.parent if is_file else path)
    return path


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
