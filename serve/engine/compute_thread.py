"""Compute thread: the one thread that runs every tensor operation.

On a CPU every thread that computes has its own team of helper threads. Where the teams together exceed the number of
cores, waiting helpers yield their core and resume late, which slows the steps of a small model by half. On a GPU the
kernels of one stream run one after the other anyway.
"""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

import torch

from serve.engine.batcher import Cancelled

T = TypeVar("T")


class ComputeThread:
    """Call it with a function and its arguments: it runs them in order, in its thread, without gradients.

    Raises `Cancelled` once it is closed.
    """

    def __init__(self) -> None:
        self._executor = ThreadPoolExecutor(1, thread_name_prefix="compute")

    def __call__(self, function: Callable[..., T], *args: Any, **kwargs: Any) -> T:
        try:
            future = self._executor.submit(torch.no_grad()(function), *args, **kwargs)
        except RuntimeError:  # the executor is shut down
            raise Cancelled from None
        return future.result()

    def close(self) -> None:
        self._executor.shutdown()
