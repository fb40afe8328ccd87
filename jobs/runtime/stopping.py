"""How a job is stopped: Ctrl-C and SIGTERM raise in the main thread, and Ray's processes end with the command."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from types import FrameType
from typing import NoReturn

import psutil

_SIGNALS = (signal.SIGINT, signal.SIGTERM)
# Seconds in which Ray's processes must exit by themselves once Ray is shut down. Agents of a raylet that was
# interrupted in its start notice its end only after a minute.
_EXIT_TIMEOUT_S = 3.0


class Stopped(KeyboardInterrupt):
    """SIGINT or SIGTERM. `exit_code` is that of a shell, 128 + the signal's number."""

    def __init__(self, number: int):
        super().__init__(number)
        self.exit_code = 128 + number


def raise_on_signals() -> None:
    """Make SIGINT and SIGTERM raise `Stopped`. Call it again after `ray.init`, which installs a handler of its own."""
    for number in _SIGNALS:
        signal.signal(number, _raise)


@contextmanager
def stop_signals() -> Iterator[None]:
    """SIGINT and SIGTERM raise `Stopped` within a `with` block. Outside of the main thread nothing changes."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    previous = {number: signal.getsignal(number) for number in _SIGNALS}
    raise_on_signals()
    try:
        yield
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler or signal.SIG_DFL)  # None: not one of Python


def shut_down_ray() -> None:
    """End this process's connection to Ray, and every process of a Ray that it started."""
    import ray  # only now: the caller has set the environment that Ray reads when it is imported

    if threading.current_thread() is threading.main_thread():
        # A second signal must not leave processes behind.
        for number in _SIGNALS:
            signal.signal(number, signal.SIG_IGN)
    processes = psutil.Process().children(recursive=True)
    ray.shutdown()
    _, alive = psutil.wait_procs(processes, timeout=_EXIT_TIMEOUT_S)
    for process in alive:
        with suppress(psutil.NoSuchProcess):
            process.kill()
    psutil.wait_procs(alive, timeout=_EXIT_TIMEOUT_S)


def _raise(number: int, _: FrameType | None) -> NoReturn:
    raise Stopped(number)
