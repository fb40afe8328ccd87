"""Upload checkpoints in the background, so that another node can resume from them."""

from __future__ import annotations

import contextlib
import os
import shutil
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from ppcl.storage.atomic import PARTIAL
from ppcl.storage.mirror import store_of
from ppcl.storage.node_cache import make_folder, once_a_node, parallel_map
from ppcl.storage.object_store import Store
from ppcl.storage.scratch import keep_used, private_temporary, scratch_folder


@contextlib.contextmanager
def synced_checkpoints(
    folder: str | Path, attempt: str, is_whole: Callable[[Path], bool], report_damaged: Callable[[Path], None]
) -> Iterator[Path]:
    """A folder of checkpoints, from which the same work resumes on any node; its files are replaced as a whole.

    A folder inside a mirror begins with the checkpoints of the bucket, and each file is uploaded soon after it was
    written. `attempt` names a run of the work, the same on all nodes: all its processes of a node begin with what the
    first one downloaded. Files that differ from their sha256, or that `is_whole` refuses, are removed and given to
    `report_damaged`.
    """
    store = store_of(folder)
    if store is None:
        yield Path(folder)
        return
    downloaded = scratch_folder() / "checkpoints" / attempt
    keep_used(downloaded)
    with once_a_node(downloaded):
        if not downloaded.exists():
            partial = make_folder(downloaded.with_name(f"{attempt}.coming"))
            keep_used(partial)
            names = list(store.objects())
            intact = parallel_map(lambda name: store.download(name, partial / name) and is_whole(partial / name), names)
            for path in [partial / name for name, good in zip(names, intact, strict=True) if not good]:
                path.unlink(missing_ok=True)
                report_damaged(path)
            os.replace(partial, downloaded)
    with private_temporary() as temporary:
        for path in [path for path in downloaded.rglob("*") if path.is_file()]:
            own = temporary / path.relative_to(downloaded)
            own.parent.mkdir(parents=True, exist_ok=True)
            os.link(path, own)
        with _Uploads(temporary, store):
            yield temporary
    shutil.rmtree(downloaded, ignore_errors=True)


class _Uploads:
    """Uploads files written into a folder in the background, except those there at the start and unfinished ones.

    Files that are removed from the folder are removed from the store.
    """

    EVERY = 1.0

    def __init__(self, folder: Path, store: Store):
        self.folder, self.store = folder, store
        self.known = {path: self._version(path) for path in self._files()}
        self.failure: Exception | None = None
        self.ending = threading.Event()
        self.thread = threading.Thread(target=self._run, name="uploads", daemon=True)

    def _files(self) -> list[Path]:
        return [path for path in sorted(self.folder.rglob("*")) if path.is_file() and path.suffix != PARTIAL]

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
                # The work goes on: the next checkpoint is a new attempt, and the exit raises the last one's error.
                self.failure = error

    def _upload(self) -> None:
        for path in self._files():
            if self.known.get(path) == self._version(path):
                continue
            # A second name keeps this checkpoint while it is uploaded: the first name may get the next one.
            uploading = path.with_name(f"{path.name}.held{PARTIAL}")
            uploading.unlink(missing_ok=True)
            os.link(path, uploading)
            version = self._version(uploading)
            self.store.upload(uploading, str(path.relative_to(self.folder)))
            uploading.unlink()
            self.known[path] = version
        # What was removed here has had its time: checkpoints that later ones replace.
        for path in [path for path in self.known if not path.exists()]:
            self.store.remove(str(path.relative_to(self.folder)))
            del self.known[path]
