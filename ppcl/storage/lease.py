"""A lease object in the bucket lets one job at a time write to an output; its owner renews it every few seconds.

Only the store's clock counts: its answers say when the lease was written and what time it is, so nodes' clocks may
differ. A lease is taken by a conditional write, of which the store accepts one.
"""

from __future__ import annotations

import contextlib
import json
import os
import socket
import threading
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path

from ppcl.errors import UserError
from ppcl.storage.object_store import Store

LOCK = "lock.json"
_BEAT = 15.0
# Seconds without a heartbeat after which an owner counts as dead.
_DEAD_AFTER = 90.0


@contextlib.contextmanager
def hold_lease(store: Store) -> Iterator[Callable[[], None]]:
    """Hold the lease of an output during a `with` block; yields a check to call before each write of the owner.

    Raises `UserError` where another job holds the lease. The check does so where another job took it over meanwhile.
    """
    lease = _Lease(store)
    lease.take()
    ending = threading.Event()

    def beat() -> None:
        while not ending.wait(_BEAT):
            # A store that fails now may work at the next beat.
            with contextlib.suppress(UserError):
                lease.beat()

    thread = threading.Thread(target=beat, name="lease", daemon=True)
    thread.start()
    try:
        yield lease.check
    finally:
        ending.set()
        thread.join()
        lease.release()


class _Lease:
    """The lease object of one owner."""

    def __init__(self, store: Store):
        self.store = store
        self.owner = uuid.uuid4().hex
        self.beats = 0
        self.tag = ""
        self.lost = False
        # A beat and a check may come at once.
        self.mutex = threading.Lock()

    def _write(self, **condition: str) -> bool:
        """Write the lease; whether this owner has it. The count gives each beat another content, and so another tag."""
        self.beats += 1
        holder = {"owner": self.owner, "machine": _machine(), "process": os.getpid(), "beats": self.beats}
        content = json.dumps(holder).encode()
        try:
            self.tag = self.store.write(LOCK, content, **condition)
            return True
        except (FileExistsError, FileNotFoundError):
            pass
        # A write whose answer was lost is refused when it is repeated.
        answer = self.store.head(LOCK)
        with contextlib.suppress(FileNotFoundError):
            if answer and self.store.read(LOCK) == content:
                self.tag = answer["ETag"]
                return True
        return False

    def take(self) -> None:
        answer = self.store.head(LOCK)
        condition = {"IfMatch": answer["ETag"]} if answer else {"IfNoneMatch": "*"}
        if (answer and not self._dead()) or not self._write(**condition):
            raise UserError(f"another ppcl job is writing to {self.store.url}; wait for it or choose another --output")

    def _dead(self) -> bool:
        age = self.store.age(LOCK)
        if age is None or age > _DEAD_AFTER:
            return True
        try:
            holder = json.loads(self.store.read(LOCK))
            if holder["machine"] != _machine():
                return False
            os.kill(holder["process"], 0)
        except ProcessLookupError:
            return True
        except (FileNotFoundError, ValueError, KeyError, TypeError, PermissionError):
            return False
        return False

    def beat(self) -> None:
        with self.mutex:
            self.lost = self.lost or not self._write(IfMatch=self.tag)

    def check(self) -> None:
        self.beat()
        if self.lost:
            raise UserError(
                f"another ppcl job took over {self.store.url}, since this one sent no heartbeat for "
                f"{_DEAD_AFTER:.0f} s; nothing more is written"
            )

    def release(self) -> None:
        with contextlib.suppress(UserError):
            self.beat()
            if not self.lost:
                self.store.remove(LOCK)


def _machine() -> str:
    """Identifies this machine and its namespace of process numbers: another container may have the same numbers."""
    with contextlib.suppress(OSError):
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{socket.gethostname()} {boot} {os.readlink('/proc/self/ns/pid')}"
    return f"{socket.gethostname()} {uuid.getnode()}"
