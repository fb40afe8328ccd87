"""Weights on a device while they are used: the host keeps all of them, the device copies of those used last.

Weights are frozen, so nothing is ever copied back, and what the host has in one storage stays one. The hooks are
PyTorch's own: those of accelerate and diffusers replace a module's `forward` by one that is bound to that module, and a
block of a variant is a view of the teacher's, which would then run the teacher's.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

_HOST = "_host_original"  # the attribute of a tensor with a copy on the device


def host_original(tensor: torch.Tensor) -> torch.Tensor:
    """What the host has of a weight; the weight itself where nothing moves it."""
    return getattr(tensor, _HOST, tensor)


def tensor_bytes(module: nn.Module) -> int:
    """Bytes of a module's parameters and buffers, each counted once."""
    return sum(tensor.nbytes for tensor in _tensors(module, lambda _: False))


@dataclass
class _Copy:
    """`used`: the event behind the last kernels that read it; None where a device has no streams."""

    tensor: torch.Tensor
    used: torch.cuda.Event | None = None


class WeightCache:
    """Copies of weights on a device, at most `limit` bytes of them, the least recently used dropped first.

    `attach` makes a module bring its weights when it runs. `following(module)`: the one that runs next, if known: its
    weights are copied while the module computes. A module that is larger than `limit` is there alone.
    """

    def __init__(self, device: str | torch.device, limit: int, following: Callable[[nn.Module], nn.Module | None]):
        self.device, self.limit, self._following = torch.device(device), limit, following
        self.held = self.most_held = self.copied = 0  # bytes
        self._copies: OrderedDict[int, _Copy] = OrderedDict()
        self._running: list[list[torch.Tensor]] = []
        self._stream = torch.cuda.Stream(self.device) if self.device.type == "cuda" else None

    def attach(self, module: nn.Module) -> None:
        """Have a module bring its own weights; those of modules in it that are attached themselves come with them."""
        if not self._is_attached(module):
            module.register_forward_pre_hook(self._before)
            module.register_forward_hook(self._after, always_call=True)

    def holds(self, tensor: torch.Tensor) -> bool:
        return id(tensor) in self._copies

    def clear(self) -> None:
        """Drop all copies but those of modules that run, and give their memory back to the device."""
        if not self._copies:
            return
        self._drop_until(0)
        if self._stream is not None:
            # What is kept for this stream is of no use to others.
            torch.cuda.empty_cache()

    def forget(self, module: nn.Module) -> None:
        """Drop the copies of a module that is not needed any more."""
        for tensor in _tensors(module, lambda _: False):
            if self.holds(tensor):
                self._drop(id(tensor))

    def _is_attached(self, module: nn.Module) -> bool:
        # A view of a block has the hooks of the block.
        return self._before in module._forward_pre_hooks.values()

    def _before(self, module: nn.Module, arguments: Any) -> None:
        tensors = list(_tensors(module, lambda below: self._is_attached(below)))
        self._running.append(tensors)
        self._bring(tensors)
        if self._stream is not None:
            torch.cuda.current_stream(self.device).wait_stream(self._stream)

    def _after(self, module: nn.Module, arguments: Any, output: Any) -> None:
        self._mark_used(self._running.pop())
        following = self._following(module)
        if following is not None:
            self._bring(list(_tensors(following, lambda _: False)))

    def _mark_used(self, tensors: Sequence[torch.Tensor]) -> None:
        if self._stream is None:
            return
        used = torch.cuda.Event()
        used.record(torch.cuda.current_stream(self.device))
        for tensor in tensors:
            if self.holds(tensor):
                self._copies[id(tensor)].used = used

    def _bring(self, tensors: Sequence[torch.Tensor]) -> None:
        missing = []
        for tensor in tensors:
            if self.holds(tensor):
                self._copies.move_to_end(id(tensor))
            else:
                missing.append(tensor)
        if not missing:
            return
        self._drop_until(self.limit - sum(tensor.nbytes for tensor in missing), tensors)
        # On a stream of its own, so that the kernels of the module that runs do not wait for it.
        with torch.cuda.stream(self._stream) if self._stream is not None else nullcontext():
            for tensor in missing:
                original = tensor.data
                tensor.data = original.to(self.device, non_blocking=True, copy=True)
                setattr(tensor, _HOST, original)
                self._copies[id(tensor)] = _Copy(tensor)
                self.held += original.nbytes
                self.copied += original.nbytes
        self.most_held = max(self.most_held, self.held)

    def _drop_until(self, limit: int, wanted: Sequence[torch.Tensor] = ()) -> None:
        """Drop copies, the least recently used first, until at most `limit` bytes are left or all others are used."""
        kept = {id(tensor) for tensors in (*self._running, wanted) for tensor in tensors}
        for key in [key for key in self._copies if key not in kept]:
            if self.held <= limit:
                return
            self._drop(key)

    def _drop(self, key: int) -> None:
        copy = self._copies.pop(key)
        if copy.used is not None:
            # Else its memory could be written to while kernels read it.
            copy.used.synchronize()
        copy.tensor.data = getattr(copy.tensor, _HOST)
        delattr(copy.tensor, _HOST)
        self.held -= copy.tensor.nbytes


def _tensors(module: nn.Module, is_apart: Callable[[nn.Module], bool]) -> Iterator[torch.Tensor]:
    """A module's parameters and buffers, each once, without those of the modules below that are `apart`."""
    seen: set[int] = set()
    waiting = [module]
    while waiting:
        here = waiting.pop()
        for tensor in (*here._parameters.values(), *here._buffers.values()):
            if tensor is not None and id(tensor) not in seen:
                seen.add(id(tensor))
                yield tensor
        waiting += [below for below in here._modules.values() if below is not None and not is_apart(below)]
