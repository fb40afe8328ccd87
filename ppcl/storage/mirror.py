"""The same file operations for folders of this machine and for buckets.

Code works on files. Files of a bucket are processed in their *mirror*, a folder of this node: `s3://bucket/key` has
the mirror `<PPCL_SCRATCH>/ppcl-mirror/bucket/key` (a temporary folder by default). So a path inside a mirror names its
URL, and `store_of` is the one place that reads it out of the path. Such a path can be sent to another node, which has a
mirror of its own. The bucket is the truth: what is read from it is compared with the sha256 of its writer, or with a
manifest.

Every function here takes a path and does nothing with a bucket where the path is in no mirror.
"""

from __future__ import annotations

import contextlib
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ppcl.config.location import SCHEME, Location, LocationLike
from ppcl.errors import UserError
from ppcl.storage.node_cache import MIRROR, file_sha256, mirror, once_a_node, parallel_map
from ppcl.storage.object_store import Store
from ppcl.storage.scratch import private_temporary


def store_of(path: str | Path) -> Store | None:
    """The store whose mirror contains a path, of this node or of another one; None for an ordinary path."""
    parts = Path(path).parts
    if MIRROR not in parts:
        return None
    return Store(SCHEME + "/".join(parts[parts.index(MIRROR) + 1 :]))


def to_local(path: str | Path) -> Path:
    """The path on this node for a path of another node: the same one, or the one in this node's mirror."""
    store = store_of(path)
    return Path(path) if store is None else mirror(store.url)


def local_file(place: LocationLike) -> Path:
    """The path of a file on this node, downloaded where it is in a bucket; a path inside a mirror is downloaded too.

    Raises `UserError` where a bucket does not have it, or has it damaged.
    """
    location = Location.of(place)
    store = Store(location.url) if location.is_url else store_of(location.path)
    if store is None:
        return location.path
    path = mirror(store.url, is_file=True)
    tag = path.with_name(f".{path.name}.tag")
    answer = store.head()
    if answer is None:
        raise UserError(f"{store.url} does not exist; upload it or correct the URL")
    with once_a_node(path):
        # Not every writer leaves a hash, so that of what was downloaded is noted beside the tag.
        if not path.is_file() or not tag.is_file() or tag.read_text() != f"{answer['ETag']} {file_sha256(path)}":
            if not store.download("", path):
                raise UserError(f"{store.url} is damaged: its content does not match its sha256; upload it again")
            tag.write_text(f"{answer['ETag']} {file_sha256(path)}")
    return path


def exists(path: str | Path) -> bool:
    """Whether a file exists; for a path inside a mirror, whether its object exists."""
    store = store_of(path)
    return Path(path).exists() if store is None else store.head() is not None


def file_version(place: LocationLike) -> tuple[str, int, Any] | None:
    """Place, size, and time of change or tag of a file: another content has other ones. None where it is missing."""
    location = Location.of(place)
    store = Store(location.url) if location.is_url else store_of(location.path)
    if store is not None:
        answer = store.head()
        return None if answer is None else (store.url, answer["ContentLength"], answer["ETag"])
    path = location.path
    try:
        stat = path.stat()
    except OSError:
        return None
    return str(path), stat.st_size, stat.st_mtime_ns


def upload(path: Path) -> None:
    """Upload a file that is inside a mirror."""
    store = store_of(path)
    if store is not None:
        store.upload(path, "")


def remove(path: Path) -> None:
    """Remove a file or folder from this node, and from the bucket where it is inside a mirror."""
    store = store_of(path)
    if store is not None:
        parent = Store(store.url.rpartition("/")[0])
        parent.remove(store.url.rpartition("/")[2])
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def download(folder: Path) -> None:
    """Download what other nodes uploaded into a folder of a mirror, checkpoints excepted.

    Raises `UserError` for an object that changed or went away meanwhile.
    """
    store = store_of(folder)
    if store is None:
        return
    names = [name for name in store.objects() if "checkpoints" not in name.split("/")]

    def get(name: str) -> None:
        if not store.download(name, folder / name):
            raise UserError(f"{store.url}/{name} changed or went away while it was read; run the same command again")

    parallel_map(get, names)


@contextlib.contextmanager
def upload_on_exit(folder: str | Path) -> Iterator[Path]:
    """A folder for the output of a process: the folder itself, or a temporary one whose files are uploaded on exit."""
    store = store_of(folder)
    if store is None:
        yield Path(folder)
        return
    with private_temporary() as temporary:
        yield temporary
        files = [path for path in sorted(temporary.rglob("*")) if path.is_file()]
        parallel_map(lambda path: store.upload(path, str(path.relative_to(temporary))), files)
