"""Safetensors files whose bytes depend on their content alone, written atomically and with a sha256 to find damage."""

from __future__ import annotations

import hashlib
import json
import struct
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save, save_file

from ppcl.storage.atomic import replacing

_SHA256 = "sha256"  # in a file's metadata


class DamagedError(Exception):
    """A tensor file cannot be read, or its content differs from what was written."""


def save_tensors(path: Path, tensors: Mapping[str, torch.Tensor], metadata: Mapping[str, str]) -> None:
    """Write tensors and metadata as one file, whole or not at all; the same content gives the same bytes."""
    tensors = {name: tensor.detach().contiguous().cpu() for name, tensor in tensors.items()}
    with replacing(path) as partial:
        save_file(tensors, partial, {**metadata, _SHA256: _sha256(tensors, metadata)})
        with open(partial, "r+b") as file:
            (length,) = struct.unpack("<Q", file.read(8))
            header = file.read(length)
            file.seek(8)
            file.write(_with_sorted_metadata(header))


def to_bytes(tensors: Mapping[str, torch.Tensor], metadata: Mapping[str, str]) -> bytes:
    """A safetensors file in memory, without a sha256 of its own; the same content gives the same bytes."""
    data = save({name: tensor.detach().contiguous().cpu() for name, tensor in tensors.items()}, dict(metadata))
    (length,) = struct.unpack("<Q", data[:8])
    return data[:8] + _with_sorted_metadata(data[8 : 8 + length]) + data[8 + length :]


def _with_sorted_metadata(header: bytes) -> bytes:
    """The header, equally long, with its metadata sorted: safetensors writes them in another order in every process."""
    content = json.loads(header)
    if "__metadata__" in content:
        content["__metadata__"] = dict(sorted(content["__metadata__"].items()))
    return json.dumps(content, ensure_ascii=False, separators=(",", ":")).encode().ljust(len(header))


def load_tensors(path: Path) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
    """The tensors of a file, on the CPU, and its metadata. Raises `DamagedError`."""
    try:
        with safe_open(path, "pt") as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  (not a dictionary)
    except SafetensorError as error:
        raise DamagedError(f"{path} is no whole safetensors file") from error
    if metadata.pop(_SHA256, None) != _sha256(tensors, metadata):
        raise DamagedError(f"{path} does not hold what was written into it")
    return tensors, metadata


def is_whole(path: Path) -> bool:
    """False for a damaged tensor file. Files of other kinds hold no hash and count as whole."""
    if path.suffix != ".safetensors":
        return True
    try:
        load_tensors(path)
    except DamagedError:
        return False
    return True


def drop_damaged(folder: Path) -> list[Path]:
    """Remove the damaged tensor files of a folder and of the folders in it; return their paths."""
    damaged = [path for path in sorted(folder.rglob("*.safetensors")) if not is_whole(path)]
    for path in damaged:
        path.unlink()
    return damaged


def _sha256(tensors: Mapping[str, torch.Tensor], metadata: Mapping[str, str]) -> str:
    """Hash all tensors and metadata, in sorted order; safetensors has no checksum of its own."""
    sha256 = hashlib.sha256(json.dumps(sorted(metadata.items())).encode())
    for name, tensor in sorted(tensors.items()):
        sha256.update(f"{name} {tensor.dtype} {list(tensor.shape)}".encode())
        sha256.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return sha256.hexdigest()
