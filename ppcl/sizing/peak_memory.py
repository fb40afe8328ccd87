"""The most bytes of tensors that are alive at once, counted as they come and go, on any device."""

from __future__ import annotations

import weakref
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class PeakMemory(TorchDispatchMode):
    """Counts the bytes of all storages that operations inside of a `with` block make, until they are freed.

    `now`, `peak`: bytes. What was there before counts if it is given to `hold`. What kernels allocate for themselves is
    not seen: workspaces of libraries and the gaps of an allocator.
    """

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = 0
        self._sizes: dict[int, int] = {}
        self._storages: dict[int, weakref.ref] = {}
        self._resize = torch.UntypedStorage.resize_

    def hold(self, *things: Any) -> None:
        """Count tensors that are there already: those in `things`, and the parameters and buffers of modules in it."""
        for thing in tree_leaves(things):
            if isinstance(thing, nn.Module):
                self.hold(list(thing.parameters()), list(thing.buffers()))
            elif isinstance(thing, torch.Tensor):
                self._count(thing)

    def restart(self) -> None:
        """Forget the peak so far."""
        self.peak = self.now

    def _count(self, tensor: torch.Tensor) -> None:
        if isinstance(tensor, DTensor):
            tensor = tensor.to_local()
        if tensor.device.type == "meta":
            return
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key in self._storages and self._storages[key]() is not None:
            return
        self._storages[key] = weakref.ref(storage, partial(self._freed, key))
        self._sizes[key] = 0
        self._changed(key, storage.nbytes())

    def _changed(self, key: int, size: int) -> None:
        self.now += size - self._sizes[key]
        self._sizes[key] = size
        self.peak = max(self.peak, self.now)

    def _freed(self, key: int, reference: weakref.ref) -> None:
        self.now -= self._sizes.pop(key, 0)
        self._storages.pop(key, None)

    def __enter__(self) -> PeakMemory:
        def resize(storage: torch.UntypedStorage, size: int) -> Any:
            # FSDP frees what it has gathered so.
            made = self._resize(storage, size)
            if storage._cdata in self._sizes:
                self._changed(storage._cdata, size)
            return made

        torch.UntypedStorage.resize_ = resize  # type: ignore[method-assign, assignment]
        return super().__enter__()

    def __exit__(self, *error: Any) -> None:
        torch.UntypedStorage.resize_ = self._resize  # type: ignore[method-assign]
        super().__exit__(*error)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(made):
            if isinstance(leaf, torch.Tensor):
                self._count(leaf)
        return made
