"""What the processes of a node share, so that each file is downloaded once per node."""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import re
from collections.abc import Callable, Collection, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, TypeVar

from ppcl.config.location import SCHEME
from ppcl.storage.scratch import keep_used, scratch_folder

MIRROR = "ppcl-mirror"

# In a bucket's mirror, the folder of files whose keys are no paths; and bytes of a name that file systems take.
_HASHED, _LONGEST_NAME = ".hashed", 200

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
    """The folder of this node that mirrors a URL, or its file. What is in the folder stays until this process ends.

    A file whose key is no path, or has a longer name than file systems take, is named by a hash of the URL.
    """
    names = url.removeprefix(SCHEME).split("/")
    if is_file and not all(_is_file_name(name) for name in names):
        # Of a key of up to 1,024 bytes, which need be no path at all.
        suffix = "".join(re.findall(r"\.\w{1,16}$", names[-1]))
        names = [names[0], _HASHED, f"{hashlib.sha256(url.encode()).hexdigest()}{suffix}"]
    path = scratch_folder().joinpath(MIRROR, *names)
    # A mark for each of many files would take as many open files.
    keep_used(path.parent if is_file else path)
    return path


def _is_file_name(name: str) -> bool:
    # Locks and tags lie beside a file, under longer names.
    return name not in ("", ".", "..") and len(name.encode()) <= _LONGEST_NAME


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
