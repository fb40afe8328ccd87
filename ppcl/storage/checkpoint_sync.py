"""Folders of checkpoints that travel: what one node wrote, another goes on from."""

from __future__ import annotations

import contextlib
import os
import shutil
import tempfile
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from ppcl.storage.mirror import store_of
from ppcl.storage.node_cache import make_folder, once_a_node, parallel_map, scratch_folder
from ppcl.storage.object_store import Store


@contextlib.contextmanager
def synced_checkpoints(
    folder: str | Path, attempt: str, whole: Callable[[Path], bool], damaged: Callable[[Path], None]
) -> Iterator[Path]:
    """A folder of checkpoints, whole files that are replaced now and then, which the same work continues from, on any node.

    In a store: it begins with what lies there, and each file is uploaded soon after it was written. `attempt` names this
    run of the work, the same on all nodes: they all begin with what was there when its first process looked, but for files
    that are not what their writer left, or not `whole`: those `damaged` is told of.
    """
    store = store_of(folder)
    if store is None:
        yield Path(folder)
        return
    found = scratch_folder() / "checkpoints" / attempt
    with once_a_node(found):
        if not found.exists():
            coming = make_folder(found.with_name(f"{attempt}.coming"))
            names = list(store.objects())
            there = parallel_map(lambda name: store.download(name, coming / name) and whole(coming / name), names)
            for path in [coming / name for name, right in zip(names, there, strict=True) if not right]:
                path.unlink(missing_ok=True)
                damaged(path)
            os.replace(coming, found)
    with tempfile.TemporaryDirectory(dir=make_folder(scratch_folder() / "made")) as made:
        for path in [path for path in found.rglob("*") if path.is_file()]:
            own = Path(made) / path.relative_to(found)
            own.parent.mkdir(parents=True, exist_ok=True)
            os.link(path, own)
        with _Uploads(Path(made), store):
            yield Path(made)
    shutil.rmtree(found, ignore_errors=True)


class _Uploads:
    """Uploads what is written into a folder, in the background; what lies there already, and unfinished files, are left out."""

    EVERY = 1.0

    def __init__(self, folder: Path, store: Store):
        self.folder, self.store = folder, store
        self.known = {path: self._version(path) for path in self._files()}
        self.failure: Exception | None = None
        self.ending = threading.Event()
        self.thread = threading.Thread(target=self._run, name="uploads", daemon=True)

    def _files(self) -> list[Path]:
        return [path for path in sorted(self.folder.rglob("*")) if path.is_file() and path.suffix != ".partial"]

    @staticmethod
    def _version(path: Path) -> tuple[int, int]:
        stat = path.stat()
        return stat.st_mtime_ns, stat.st_ino

    def __enter__(self) -> None:
        self.thread.start()

    def __exit__(self, kind: Any, error: Any, trace: Any) -> None:
        self.ending.set()
        self.thread.join()
        if error is None and self.failure is not None:
            raise self.failure

    def _run(self) -> None:
        last = False
        while not last:
            last = self.ending.wait(self.EVERY)
            try:
                self._upload()
                self.failure = None
            except Exception as error:
                # The work goes on: the next checkpoint is tried again, and the end raises what the last try did.
                self.failure = error

    def _upload(self) -> None:
        for path in self._files():
            if self.known.get(path) == self._version(path):
                continue
            # A second name: the first may come to stand for the next checkpoint while this one is on its way.
            held = path.with_name(f"{path.name}.held.partial")
            held.unlink(missing_ok=True)
            os.link(path, held)
            version = self._version(held)
            self.store.upload(held, str(path.relative_to(self.folder)))
            held.unlink()
            self.known[path] = version
