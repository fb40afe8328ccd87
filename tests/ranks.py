"""Real gloo ranks, each a process of its own, for tests of what crosses between ranks.

The processes are forked from one that has imported what ranks need and has done nothing else: to import PyTorch anew in
every rank would take most of the tests' time.
"""

from __future__ import annotations

import multiprocessing
import os
import socket
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

_IMPORTED_ONCE = (
    "diffusers.models.transformers.transformer_qwenimage",
    "ppcl.detection.fit_probes",
    "ppcl.training.distillation.trainer",
    "ppcl.training.finetuning.trainer",
    "tests.samples",
    "tests.tiny",
)


def _main(rank: int, world: int, port: int, function: Callable[..., None], arguments: tuple) -> None:
    torch.set_num_threads(1)
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    dist.init_process_group("gloo", rank=rank, world_size=world)
    try:
        function(*arguments)
    finally:
        dist.destroy_process_group()


def run(world: int, function: Callable[..., None], *arguments: Any) -> None:
    """`function(*arguments)` in `world` processes with a process group; raises what a rank raises."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    multiprocessing.set_forkserver_preload(list(_IMPORTED_ONCE))
    mp.start_processes(_main, (world, port, function, arguments), nprocs=world, join=True, start_method="forkserver")
