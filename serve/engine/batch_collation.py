"""Collation: joins transformer calls of several images into one call.

Row arguments are `hidden_states` of shape (B, S, d) or (B, C, H, W), the timestep, the prompt's arguments, and vectors
of B numbers such as a guidance scale. All other arguments must be equal in all calls of a batch and are part of its
group.
"""

from __future__ import annotations

import hashlib
from collections.abc import Hashable, Mapping, Sequence
from typing import Any

import torch
from torch.nn import functional as F

from ppcl.models import ModelAdapter


class Digests:
    """Digests of tensors. Each is cached while the pipeline passes the same tensor, so computed once per image."""

    def __init__(self) -> None:
        self._known: dict[str, tuple[torch.Tensor, str]] = {}

    def __call__(self, name: str, tensor: torch.Tensor) -> str:
        if name not in self._known or self._known[name][0] is not tensor:
            content = tensor.detach().contiguous().cpu().flatten().view(torch.uint8).numpy()
            self._known[name] = tensor, hashlib.sha256(content.data).hexdigest()
        return self._known[name][1]


def rows_of(adapter: ModelAdapter, arguments: Mapping[str, Any]) -> int:
    return arguments[adapter.latents].shape[0]


def group_of(adapter: ModelAdapter, arguments: Mapping[str, Any], digests: Digests) -> Hashable:
    """Return what calls must have in common to share a forward. Texts that can be padded may differ in length."""
    rows = rows_of(adapter, arguments)
    parts: list[Hashable] = []
    for name, value in sorted(arguments.items()):
        if name == adapter.text_mask:
            continue
        if _is_row_tensor(adapter, name, value, rows):
            padded = adapter.text_mask is not None and name in adapter.prompt_arguments and value.ndim == 3
            parts.append((name, value.shape[2:] if padded else value.shape[1:], value.dtype))
        elif _is_row_list(adapter, name, value, rows):
            parts.append((name, *{_frozen(name, item, digests) for item in value}))
        else:
            parts.append((name, _frozen(name, value, digests)))
    return tuple(parts)


def join(adapter: ModelAdapter, calls: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Join calls of one group into one call. Shorter texts are padded at the end and masked."""
    first, *others = calls
    if not others:
        return dict(first)
    rows = [rows_of(adapter, call) for call in calls]
    joined = dict(first)
    for name, value in first.items():
        if name == adapter.text_mask:
            continue
        if _is_row_tensor(adapter, name, value, rows[0]):
            tensors = [call[name] for call in calls]
            if adapter.text_mask is not None and name in adapter.prompt_arguments and value.ndim == 3:
                length = max(tensor.shape[1] for tensor in tensors)
                tensors = [F.pad(tensor, (0, 0, 0, length - tensor.shape[1])) for tensor in tensors]
            joined[name] = torch.cat(tensors)
        elif _is_row_list(adapter, name, value, rows[0]):
            joined[name] = [item for call in calls for item in call[name]]
    if adapter.text_mask is not None:
        joined[adapter.text_mask] = _mask(adapter, adapter.text_mask, calls)
    return joined


def _mask(adapter: ModelAdapter, name: str, calls: Sequence[Mapping[str, Any]]) -> torch.Tensor | None:
    """Return the mask (B, T) for the longest text; None where no token is padding."""
    texts = [call[adapter.prompt_arguments[0]] for call in calls]
    masks = [call.get(name) for call in calls]
    length = max(text.shape[1] for text in texts)
    if all(mask is None for mask in masks) and all(text.shape[1] == length for text in texts):
        return None
    padded = []
    for text, mask in zip(texts, masks, strict=True):
        own = torch.ones(text.shape[:2], dtype=torch.bool, device=text.device) if mask is None else mask.bool()
        padded.append(F.pad(own, (0, length - own.shape[1]), value=False))
    return torch.cat(padded)


def _is_row_tensor(adapter: ModelAdapter, name: str, value: Any, rows: int) -> bool:
    if not isinstance(value, torch.Tensor):
        return False
    row_arguments = (adapter.latents, adapter.timestep, *adapter.prompt_arguments)
    return name in row_arguments or (value.ndim == 1 and value.shape[0] == rows)


def _is_row_list(adapter: ModelAdapter, name: str, value: Any, rows: int) -> bool:
    return name in adapter.shared_arguments and isinstance(value, list) and len(value) == rows


def _frozen(name: str, value: Any, digests: Digests) -> Hashable:
    """Return a value as part of a group. A value of unknown type equals nothing, so its call runs alone."""
    if isinstance(value, torch.Tensor):
        return tuple(value.shape), value.dtype, digests(name, value)
    if isinstance(value, Mapping):
        return tuple((key, _frozen(f"{name}.{key}", item, digests)) for key, item in sorted(value.items()))
    if isinstance(value, list | tuple):
        return tuple(_frozen(f"{name}.{index}", item, digests) for index, item in enumerate(value))
    if value is None or isinstance(value, str | int | float | bool):
        return type(value).__name__, value
    return object()
