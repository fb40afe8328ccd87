"""One job at a time on a place in a bucket: an object that its owner writes anew every few seconds.

Only the store's clock counts: its answers say when the lock was written and what time it is now, so clocks of nodes that
differ do not matter. Taking it is one conditional write, of which the store lets one through.
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
# Without a sign of life for so long, an owner is taken for dead, seconds.
_DEAD_AFTER = 90.0


@contextlib.contextmanager
def hold_lease(store: Store) -> Iterator[Callable[[], None]]:
    """Hold a place for the length of a `with` block; gives what to call before a write that must be the owner's.

    Raises `UserError` where another job is alive there, and, from the callable, where it took over in the meantime.
    """
    lock = _Lock(store)
    lock.take()
    ending = threading.Event()

    def beat() -> None:
        while not ending.wait(_BEAT):
            # A store that does not work now may by the next beat.
            with contextlib.suppress(UserError):
                lock.beat()

    thread = threading.Thread(target=beat, name="lock", daemon=True)
    thread.start()
    try:
        yield lock.check
    finally:
        ending.set()
        thread.join()
        lock.release()


class _Lock:
    def __init__(self, store: Store):
        self.store = store
        self.owner = uuid.uuid4().hex
        self.beats = 0
        self.tag = ""
        self.lost = False
        # A beat and a check may come at once.
        self.one = threading.Lock()

    def _write(self, **condition: str) -> bool:
        """Whether the lock is this one's now. The count makes each beat another content, and so another tag."""
        self.beats += 1
        held = {"owner": self.owner, "machine": _machine(), "process": os.getpid(), "beats": self.beats}
        content = json.dumps(held).encode()
        try:
            self.tag = self.store.write(LOCK, content, **condition)
            return True
        except (FileExistsError, FileNotFoundError):
            pass
        # A write whose answer got lost is refused when it is tried again.
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
            raise UserError(f"another ppcl works in {self.store.url}; wait for it or choose another --output")

    def _dead(self) -> bool:
        age = self.store.age(LOCK)
        if age is None or age > _DEAD_AFTER:
            return True
        try:
            held = json.loads(self.store.read(LOCK))
            if held["machine"] != _machine():
                return False
            os.kill(held["process"], 0)
        except ProcessLookupError:
            return True
        except (FileNotFoundError, ValueError, KeyError, TypeError, PermissionError):
            return False
        return False

    def beat(self) -> None:
        with self.one:
            self.lost = self.lost or not self._write(IfMatch=self.tag)

    def check(self) -> None:
        self.beat()
        if self.lost:
            raise UserError(
                f"another ppcl took over {self.store.url}, since this one gave no sign of life for {_DEAD_AFTER:.0f} s; "
                "nothing more is written"
            )

    def release(self) -> None:
        with contextlib.suppress(UserError):
            self.beat()
            if not self.lost:
                self.store.remove(LOCK)


def _machine() -> str:
    """This machine, and the process numbers that count on it: those of another container may be the same."""
    with contextlib.suppress(OSError):
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{socket.gethostname()} {boot} {os.readlink('/proc/self/ns/pid')}"
    return f"{socket.gethostname()} {uuid.getnode()}"
