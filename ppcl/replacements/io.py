"""Replacements as files: safetensors, one file for each, named by it.

The structure comes from the teacher, so a file holds tensors and a few metadata only.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from math import prod
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import nn

from ppcl.errors import UserError
from ppcl.models import ModelAdapter
from ppcl.models.teacher import Teacher
from ppcl.replacements.registry import parse_name, parse_stored, sort_key
from ppcl.replacements.replacement import Replacement
from ppcl.storage.tensor_files import save_tensors

_FORMAT = "ppcl-replacement-1"


def files_in(folder: Path) -> dict[Replacement, Path]:
    """The replacements of a folder, from their files' names: `05-07.safetensors`, `text-01-03.safetensors`."""
    return replacement_files(folder.glob("*.safetensors"))


def replacement_files(paths: Iterable[Path]) -> dict[Replacement, Path]:
    """Those of some files that are replacements, by replacement, from their names; the others are left out."""
    names = ((parse_name(path.stem), path) for path in sorted(paths) if path.suffix == ".safetensors")
    files = {replacement: path for replacement, path in names if replacement is not None}
    return {replacement: files[replacement] for replacement in sorted(files, key=sort_key)}


def save_replacement(
    module: nn.Module,
    replacement: Replacement,
    adapter: ModelAdapter,
    path: Path,
    tensors: Mapping[str, torch.Tensor] | None = None,
) -> None:
    """Write a replacement's tensors; the file appears whole or not at all. `tensors`: its own, where it is sharded."""
    metadata = {"format": _FORMAT, "transformer": adapter.transformer, "entry": str(replacement)}
    state = module.state_dict() if tensors is None else dict(tensors)
    save_tensors(path, state, metadata | replacement.metadata(module))


def load_replacement(
    path: Path, teacher: Teacher, device: str = "cpu", dtype: torch.dtype = torch.float32
) -> nn.Module:
    """Read a replacement. Raises `UserError` where the file is damaged or of another adapter."""
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  (not a dictionary)
    except (SafetensorError, OSError) as error:
        raise _unreadable(path, error) from None
    adapter = teacher.adapter
    if metadata.get("format") != _FORMAT or metadata.get("transformer") != adapter.transformer:
        raise UserError(
            f"{path} is not a replacement for a {adapter.transformer}: its metadata has format "
            f"{metadata.get('format')!r}, transformer {metadata.get('transformer')!r}"
        )
    try:
        module = parse_stored(metadata["entry"]).empty_module(tensors, metadata, teacher)
        module.load_state_dict(tensors, strict=True, assign=True)
    except (KeyError, ValueError, IndexError, TypeError, RuntimeError, UserError):
        raise UserError(
            f"the replacement {path} does not fit the teacher in {teacher.place}: its tensors are not those of one of "
            "the teacher's parts; give the teacher it was made from, or run ppcl compress again"
        ) from None
    return module.to(device=device, dtype=dtype).requires_grad_(False).eval()


def empty_replacement(path: Path, teacher: Teacher) -> nn.Module:
    """The structure of a replacement on the meta device, from its file's header alone. Raises `UserError`."""
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            shapes = {name: file.get_slice(name).get_shape() for name in file.keys()}  # noqa: SIM118
    except (SafetensorError, OSError) as error:
        raise _unreadable(path, error) from None
    tensors = {name: torch.empty(shape, device="meta") for name, shape in shapes.items()}
    module = parse_stored(metadata["entry"]).empty_module(tensors, metadata, teacher)
    return module.to("meta").requires_grad_(False).eval()


def stored_sizes(path: Path) -> dict[str, int]:
    """Numbers in each tensor of a file, from its header alone."""
    try:
        with safe_open(path, framework="pt") as file:
            return {name: prod(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118
    except (SafetensorError, OSError) as error:
        raise _unreadable(path, error) from None


def _unreadable(path: Path, error: Exception) -> UserError:
    return UserError(f"the replacement {path} cannot be read as safetensors ({error}); run ppcl compress again")
