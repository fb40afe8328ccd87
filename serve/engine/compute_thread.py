"""One thread for everything that computes.

On CPUs every thread that computes has a team of helpers of its own, and where teams together have more members than there are
cores, each member that waits gives its core away and is late for what comes next: the steps of a small model then take half as
long again. On a GPU the kernels of one stream follow each other anyway.
"""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

import torch

from serve.engine.batcher import Cancelled

T = TypeVar("T")


class Arithmetic:
    """Called with a function and its arguments, it runs it in its thread, without gradients, after what it was given before.

    Raises `Cancelled` once it is closed.
    """

    def __init__(self) -> None:
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="arithmetic")

    def __call__(self, what: Callable[..., T], *args: Any, **arguments: Any) -> T:
        try:
            computed = self._thread.submit(torch.no_grad()(what), *args, **arguments)
        except RuntimeError:  # it was closed
            raise Cancelled from None
        return computed.result()

    def close(self) -> None:
        self._thread.shutdown()
