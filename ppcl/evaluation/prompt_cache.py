"""Embeddings of test prompts, kept on the host: every variant draws the same prompts, which are encoded once."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Hashable
from functools import partial
from typing import Any

import torch

_KEPT_BYTES = 4 << 30


def keep_embeddings(pipeline: Any, limit: int = _KEPT_BYTES) -> None:
    """Have a pipeline's `encode_prompt` answer from memory where it can, with at most `limit` bytes on the host.

    So text encoders leave the device once for a batch of prompts, not once for each variant of it. What comes back is
    what the stock method gave, bit by bit.
    """
    pipeline.encode_prompt = partial(_encode, pipeline, _Embeddings(limit))


class _Embeddings:
    def __init__(self, limit: int):
        self.limit, self.held = limit, 0
        self.by_call: OrderedDict[Hashable, Any] = OrderedDict()

    def put(self, call: Hashable, returned: Any) -> None:
        self.by_call[call] = returned
        self.held += _bytes(returned)
        while self.held > self.limit:
            self.held -= _bytes(self.by_call.popitem(last=False)[1])


def _encode(pipeline: Any, kept: _Embeddings, *args: Any, **arguments: Any) -> Any:
    call = _hashable((args, tuple(sorted(arguments.items()))))
    if call is None:
        # It has embeddings already.
        return type(pipeline).encode_prompt(pipeline, *args, **arguments)
    if call not in kept.by_call:
        returned = type(pipeline).encode_prompt(pipeline, *args, **arguments)
        kept.put(call, _to(returned, "cpu"))
        return returned
    kept.by_call.move_to_end(call)
    return _to(kept.by_call[call], pipeline._execution_device)


def _hashable(value: Any) -> Hashable | None:
    """Arguments as a key; None where a tensor or something else that is none is among them."""
    if isinstance(value, list | tuple):
        items = tuple(map(_hashable, value))
        return None if any(item is None and given is not None for item, given in zip(items, value)) else items
    return value if isinstance(value, Hashable) and not isinstance(value, torch.Tensor) else None


def _to(value: Any, device: Any) -> Any:
    if isinstance(value, tuple):
        return tuple(_to(item, device) for item in value)
    return value.to(device) if isinstance(value, torch.Tensor) else value


def _bytes(value: Any) -> int:
    if isinstance(value, tuple):
        return sum(map(_bytes, value))
    return value.nbytes if isinstance(value, torch.Tensor) else 0
