"""Safetensors files that are written one tensor after the other, in the memory of one tensor.

The format is a length, a JSON header with every tensor's place, and the tensors' bytes; it is known before the first
tensor is.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

_NAMES = {
    torch.bfloat16: "BF16",
    torch.float16: "F16",
    torch.float32: "F32",
    torch.float64: "F64",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.bool: "BOOL",
    torch.uint8: "U8",
}
# Of shards, as diffusers writes them.
SHARD_BYTES = 5_000_000_000


def tensor_size(tensor: torch.Tensor) -> int:
    return tensor.numel() * tensor.element_size()


class TensorFile:
    """One file of tensors whose names, shapes and types are known. Used as a `with` block; all of them are written.

    `tensors`: what will be written, on any device, the meta device too.
    """

    def __init__(self, path: Path, tensors: Mapping[str, torch.Tensor], metadata: Mapping[str, str]):
        self.path, self._left = path, dict(tensors)
        self._starts: dict[str, int] = {}
        header: dict[str, Any] = {"__metadata__": dict(metadata)}
        place = 0
        for name, tensor in tensors.items():
            self._starts[name] = place
            place += tensor_size(tensor)
            offsets = [self._starts[name], place]
            header[name] = {"dtype": _NAMES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": offsets}
        encoded = json.dumps(header, separators=(",", ":")).encode()
        encoded = encoded.ljust(-(-len(encoded) // 8) * 8)
        self._header = struct.pack("<Q", len(encoded)) + encoded

    def __enter__(self) -> TensorFile:
        self._file = open(self.path, "wb")
        self._file.write(self._header)
        return self

    def write(self, name: str, tensor: torch.Tensor) -> None:
        """Raises `ValueError` for a tensor that is of another shape or type than announced, or written already."""
        announced = self._left.pop(name, None)
        if announced is None or announced.shape != tensor.shape or announced.dtype != tensor.dtype:
            raise ValueError(f"{name} was not announced as {tensor.dtype} {tuple(tensor.shape)} in {self.path.name}")
        self._file.seek(len(self._header) + self._starts[name])
        self._file.write(tensor.detach().contiguous().cpu().reshape(-1).view(torch.uint8).numpy().data)

    @property
    def complete(self) -> bool:
        return not self._left

    def __exit__(self, kind: Any, error: Any, trace: Any) -> None:
        self._file.close()
        if kind is None and self._left:
            raise ValueError(
                f"{self.path.name} lacks {len(self._left)} tensors, the first being {next(iter(self._left))}"
            )


def shards_of(tensors: Mapping[str, torch.Tensor], most: int = SHARD_BYTES) -> list[dict[str, torch.Tensor]]:
    """Tensors in their order, in as many parts as are needed for none to be larger than `most` bytes."""
    shards: list[dict[str, torch.Tensor]] = [{}]
    filled = 0
    for name, tensor in tensors.items():
        size = tensor_size(tensor)
        if shards[-1] and filled + size > most:
            shards.append({})
            filled = 0
        shards[-1][name] = tensor
        filled += size
    return shards
