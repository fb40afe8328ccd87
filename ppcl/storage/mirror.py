"""Files under a mirror: the same calls for what lies in a folder and for what lies in a bucket."""

from __future__ import annotations

import contextlib
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ppcl.config.location import SCHEME, Location, LocationLike
from ppcl.errors import UserError
from ppcl.storage.node_cache import MIRROR, make_folder, mirror, once_a_node, parallel_map, scratch_folder
from ppcl.storage.object_store import Store


def store_of(path: str | Path) -> Store | None:
    """The store whose mirror a path lies in, on whatever node; None for an ordinary path."""
    parts = Path(path).parts
    if MIRROR not in parts:
        return None
    return Store(SCHEME + "/".join(parts[parts.index(MIRROR) + 1 :]))


def to_local(path: str | Path) -> Path:
    """A path of another node on this one: itself, or its place in this node's mirror."""
    store = store_of(path)
    return Path(path) if store is None else mirror(store.url)


def local_file(place: LocationLike) -> Path:
    """One file, downloaded to this node where it lies in a bucket. A path inside of a mirror is downloaded too.

    Raises `UserError` where a bucket does not have it, or has it damaged.
    """
    location = Location.of(place)
    store = Store(location.url) if location.is_url else store_of(location.path)
    if store is None:
        return location.path
    path, tag = mirror(store.url), mirror(store.url).with_name(f".{store.url.rpartition('/')[2]}.tag")
    answer = store.head()
    if answer is None:
        raise UserError(f"{store.url} does not exist; upload it or correct the URL")
    with once_a_node(path):
        if not path.is_file() or not tag.is_file() or tag.read_text() != answer["ETag"]:
            if not store.download("", path):
                raise UserError(f"{store.url} is damaged: its content is not what its sha256 says; upload it again")
            tag.write_text(answer["ETag"])
    return path


def exists(path: str | Path) -> bool:
    """Whether a file is there; of a mirror, whether it is in the store."""
    store = store_of(path)
    return Path(path).exists() if store is None else store.head() is not None


def file_version(path: Path) -> tuple[str, int, Any] | None:
    """Place, size, and time of change or tag of a file: they differ where its content does. None where it does not exist."""
    store = store_of(path)
    if store is not None:
        answer = store.head()
        return None if answer is None else (store.url, answer["ContentLength"], answer["ETag"])
    try:
        stat = path.stat()
    except OSError:
        return None
    return str(path), stat.st_size, stat.st_mtime_ns


def upload(path: Path) -> None:
    """Upload a file of a mirror, if it is one."""
    store = store_of(path)
    if store is not None:
        store.upload(path, "")


def remove(path: Path) -> None:
    """Remove a file or folder, here and in the store whose mirror it is in."""
    store = store_of(path)
    if store is not None:
        parent = Store(store.url.rpartition("/")[0])
        parent.remove(store.url.rpartition("/")[2])
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def download(folder: Path) -> None:
    """Download what other nodes uploaded into a folder of a mirror."""
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
    """A folder for what one process makes: the folder itself, or a temporary one whose files are uploaded at the end."""
    store = store_of(folder)
    if store is None:
        yield Path(folder)
        return
    with tempfile.TemporaryDirectory(dir=make_folder(scratch_folder() / "made")) as made:
        yield Path(made)
        files = [path for path in sorted(Path(made).rglob("*")) if path.is_file()]
        parallel_map(lambda path: store.upload(path, str(path.relative_to(made))), files)
