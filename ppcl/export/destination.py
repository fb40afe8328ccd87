"""Where an export is written: a new folder of this machine or of a bucket, which is there whole or not at all."""

from __future__ import annotations

import shutil
import uuid
from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from ppcl.config.location import Location
from ppcl.errors import UserError
from ppcl.storage.atomic import PARTIAL
from ppcl.storage.object_store import Store
from ppcl.storage.scratch import private_temporary


class Destination(ABC):
    """A folder that is being written. `working`: where files are made on this machine."""

    working: Path

    def path(self, name: str) -> Path:
        """Where to make a file, by its path in the exported folder."""
        path = self.working / name
        path.parent.mkdir(parents=True, exist_ok=True)
        return path

    @abstractmethod
    def finished(self, name: str) -> None:
        """A file is complete."""

    def check_room(self, size: int) -> None:
        """Raises `UserError` where `size` bytes do not fit."""
        free = shutil.disk_usage(self.working).free
        if size > free:
            raise UserError(
                f"the export needs {size / 1e9:.3g} GB and {self.working.parent} has {free / 1e9:.3g} GB free; free "
                "space or choose another place"
            )


@contextmanager
def destination(to: Location, last: str, single: bool = False) -> Iterator[Destination]:
    """A new folder, or with `single` one new file `last` in any folder.

    It is there at the end of a `with` block, and not where that raises. `last`: the file without which the folder is no
    model; in a bucket it goes up last. Raises `UserError` where something is there already.
    """
    check_free(to, last, single)
    with _in_bucket(to, last) if to.is_url else _on_disk(to.path.absolute(), last if single else None) as made:
        yield made


def check_free(to: Location, last: str, single: bool = False) -> None:
    """Raises `UserError` where something is where `destination` would write."""
    if to.is_url:
        store = Store(to.url)
        # Beside a single file there may be a whole bucket of others, which nobody wants listed.
        there = [last] if store.head(last) else [] if single else list(store.objects())
        if there:
            raise UserError(f"{to} exists already: it holds {there[0]}; give --to another place, or remove it")
        return
    folder = to.path.absolute()
    final = folder / last if single else folder
    if final.exists() and (final.is_file() or any(final.iterdir())):
        raise UserError(f"{final} exists already; give --to another place, or remove it")
    if folder.exists() and not folder.is_dir():
        raise UserError(f"{folder} is a file; give --to a folder")


class _Folder(Destination):
    def __init__(self, working: Path):
        self.working = working

    def finished(self, name: str) -> None:
        """It is in its place already."""


@contextmanager
def _on_disk(to: Path, name: str | None) -> Iterator[Destination]:
    final = to / name if name else to
    working = to.parent / f".{to.name}.{uuid.uuid4().hex[:12]}{PARTIAL}"
    missing = [folder for folder in (to, *to.parents) if not folder.exists()]
    try:
        working.mkdir(parents=True)
        yield _Folder(working)
        if name:
            to.mkdir(exist_ok=True)
            (working / name).rename(final)
            working.rmdir()
        else:
            if to.exists():
                to.rmdir()
            working.rename(to)
    except BaseException:
        shutil.rmtree(working, ignore_errors=True)
        # Those that were made here, the deepest first; one in which somebody has put something stays.
        for folder in missing:
            with suppress(OSError):
                folder.rmdir()
        raise


class _Bucket(Destination):
    """Files go up as soon as they are complete, so that the disk holds one at a time. `last` goes up at the end."""

    def __init__(self, working: Path, store: Store, last: str):
        self.working, self.store, self.last = working, store, last
        self.uploaded: list[str] = []

    def finished(self, name: str) -> None:
        if name != self.last:
            self._upload(name)

    def _upload(self, name: str) -> None:
        self.uploaded.append(name)
        self.store.upload(self.working / name, name)
        (self.working / name).unlink()

    def check_room(self, size: int) -> None:
        """Only the largest file is ever on this machine, and a bucket has no end."""

    def commit(self) -> None:
        if (self.working / self.last).exists():
            self._upload(self.last)

    def undo(self) -> None:
        for name in self.uploaded:
            self.store.remove(name)


@contextmanager
def _in_bucket(to: Location, last: str) -> Iterator[Destination]:
    store = Store(to.url)
    with private_temporary() as working:
        made = _Bucket(working, store, last)
        try:
            yield made
            made.commit()
        except BaseException:
            made.undo()
            raise
