"""Transformer calls of several pictures as one: which go together, joined, and their rows given back.

`hidden_states (B, S, d)` or `(B, C, H, W)`, the timestep, the prompt's arguments and one number a row (a guidance scale) are
rows; everything else must be the same in all calls of a batch, and is a part of what tells the batches apart.
"""

from __future__ import annotations

import hashlib
from collections.abc import Hashable, Mapping, Sequence
from typing import Any

import torch
from torch.nn import functional as F

from ppcl.models import ModelAdapter


class Digests:
    """Short names of tensors' contents, remembered as long as the pipeline passes the same tensor: once a picture, not once a step."""

    def __init__(self):
        self._known: dict[str, tuple[torch.Tensor, str]] = {}

    def __call__(self, name: str, tensor: torch.Tensor) -> str:
        if name not in self._known or self._known[name][0] is not tensor:
            content = tensor.detach().contiguous().cpu().flatten().view(torch.uint8).numpy()
            self._known[name] = tensor, hashlib.sha256(content).hexdigest()
        return self._known[name][1]


def rows_of(adapter: ModelAdapter, arguments: Mapping[str, Any]) -> int:
    return arguments[adapter.latents].shape[0]


def group_of(adapter: ModelAdapter, arguments: Mapping[str, Any], digests: Digests) -> Hashable:
    """What calls must have in common to be one forward. The text's length is left out where there is a mask to pad it with."""
    rows = rows_of(adapter, arguments)
    parts = []
    for name, value in sorted(arguments.items()):
        if name == adapter.text_mask:
            continue
        if _by_row(adapter, name, value, rows):
            padded = adapter.text_mask is not None and name in adapter.prompt_arguments and value.ndim == 3
            parts.append((name, value.shape[2:] if padded else value.shape[1:], value.dtype))
        elif _a_list_by_row(adapter, name, value, rows):
            parts.append((name, *{_frozen(name, item, digests) for item in value}))
        else:
            parts.append((name, _frozen(name, value, digests)))
    return tuple(parts)


def join(adapter: ModelAdapter, calls: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """One call of the rows of several, which are of one group; shorter texts are padded behind, and masked."""
    first, *others = calls
    if not others:
        return dict(first)
    rows = [rows_of(adapter, call) for call in calls]
    joined = dict(first)
    for name, value in first.items():
        if name == adapter.text_mask:
            continue
        if _by_row(adapter, name, value, rows[0]):
            tensors = [call[name] for call in calls]
            if adapter.text_mask is not None and name in adapter.prompt_arguments and value.ndim == 3:
                length = max(tensor.shape[1] for tensor in tensors)
                tensors = [F.pad(tensor, (0, 0, 0, length - tensor.shape[1])) for tensor in tensors]
            joined[name] = torch.cat(tensors)
        elif _a_list_by_row(adapter, name, value, rows[0]):
            joined[name] = [item for call in calls for item in call[name]]
    if adapter.text_mask is not None:
        joined[adapter.text_mask] = _mask(adapter, calls)
    return joined


def _mask(adapter: ModelAdapter, calls: Sequence[Mapping[str, Any]]) -> torch.Tensor | None:
    """`(B, T)` of the longest text; None where no token is padding."""
    texts = [call[adapter.prompt_arguments[0]] for call in calls]
    masks = [call.get(adapter.text_mask) for call in calls]
    length = max(text.shape[1] for text in texts)
    if all(mask is None for mask in masks) and all(text.shape[1] == length for text in texts):
        return None
    whole = []
    for text, mask in zip(texts, masks, strict=True):
        own = torch.ones(text.shape[:2], dtype=torch.bool, device=text.device) if mask is None else mask.bool()
        whole.append(F.pad(own, (0, length - own.shape[1]), value=False))
    return torch.cat(whole)


def _by_row(adapter: ModelAdapter, name: str, value: Any, rows: int) -> bool:
    if not isinstance(value, torch.Tensor):
        return False
    of_a_picture = (adapter.latents, adapter.timestep, *adapter.prompt_arguments)
    return name in of_a_picture or (value.ndim == 1 and value.shape[0] == rows)


def _a_list_by_row(adapter: ModelAdapter, name: str, value: Any, rows: int) -> bool:
    return name in adapter.shared_arguments and isinstance(value, list) and len(value) == rows


def _frozen(name: str, value: Any, digests: Digests) -> Hashable:
    """A value as a part of a key. What cannot be compared is like nothing else, so its call runs alone."""
    if isinstance(value, torch.Tensor):
        return tuple(value.shape), value.dtype, digests(name, value)
    if isinstance(value, Mapping):
        return tuple((key, _frozen(f"{name}.{key}", item, digests)) for key, item in sorted(value.items()))
    if isinstance(value, list | tuple):
        return tuple(_frozen(f"{name}.{index}", item, digests) for index, item in enumerate(value))
    if value is None or isinstance(value, str | int | float | bool):
        return type(value).__name__, value
    return object()
