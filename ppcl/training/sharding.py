"""Fine-tuning's model, sharded over the ranks by torch's FSDP2: each keeps a part of every block and replacement.

A unit runs as a whole: a block of the teacher, a student, or a linear map of another replacement. Its parameters are
gathered before it runs and freed after it, so a rank's memory falls with the number of ranks, except for one unit.
Every rank holds the whole embedders and the whole head, which are small.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor

from ppcl.training.parallel_dims import ParallelDims


def mesh_of(dims: ParallelDims, device: str) -> DeviceMesh:
    """The data-parallel mesh of all ranks."""
    return init_device_mesh(torch.device(device).type, (dims.dp,), mesh_dim_names=("dp",))


def shard(module: nn.Module, mesh: DeviceMesh) -> None:
    """Shard a block or a replacement's module: as a whole if it is called as a whole, else map by map."""
    if type(module).forward is not nn.Module.forward:
        fully_shard(module, mesh=mesh, reshard_after_forward=True)
        return
    # It only holds maps, which are put into blocks and called there.
    for part in module.modules():
        if isinstance(part, nn.Linear):
            fully_shard(part, mesh=mesh, reshard_after_forward=True)


@contextmanager
def gathered(modules: Iterable[nn.Module]) -> Iterator[None]:
    """The parameters of sharded modules whole, for the length of a `with` block. All ranks take part."""
    sharded = [part for module in modules for part in module.modules() if isinstance(part, FSDPModule)]
    for part in sharded:
        part.unshard()
    try:
        yield
    finally:
        for part in sharded:
            part.reshard()


def whole(tensor: torch.Tensor) -> torch.Tensor:
    """A tensor in one piece; a sharded one is gathered, for which all ranks take part."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def local(tensor: torch.Tensor) -> torch.Tensor:
    """This rank's part of a tensor; the same memory."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor
