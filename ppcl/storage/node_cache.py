"""Folders of this node that its processes share: mirrors of buckets, snapshots, downloads that happen once."""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import os
import tempfile
from collections.abc import Callable, Collection, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, TypeVar

from ppcl.config.location import SCHEME

MIRROR = "ppcl-mirror"

# Objects on their way at once.
_AT_ONCE = 8

T = TypeVar("T")


def parallel_map(call: Callable[[Any], T], items: Collection[Any]) -> list[T]:
    """`call(item)` for every item, several at once, in the order of the items; raises what the first of them raised."""
    if not items:
        return []
    with ThreadPoolExecutor(min(_AT_ONCE, len(items))) as pool:
        return list(pool.map(call, items))


def file_sha256(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def scratch_folder() -> Path:
    return Path(os.environ.get("PPCL_SCRATCH") or Path(tempfile.gettempdir()) / f"ppcl-{os.getuid()}").absolute()


def mirror(url: str) -> Path:
    """Where the files under a URL are worked on, on this node."""
    return scratch_folder() / MIRROR / url.removeprefix(SCHEME)


def make_folder(folder: Path) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    return folder


@contextlib.contextmanager
def once_a_node(path: Path) -> Iterator[None]:
    """One process of this node at a time: what one of them downloads, the others find."""
    make_folder(path.parent)
    with open(path.with_name(f".{path.name}.lock"), "w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield
