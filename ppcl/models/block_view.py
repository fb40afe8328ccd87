"""A view of a block: the same parameters by reference, some of its sub-modules exchanged, its stock forward untouched.

The teacher's own block never changes, so a variant is a choice between a block and its views.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import cast

import torch
from torch import nn


def view(block: nn.Module, parts: Mapping[str, nn.Module]) -> nn.Module:
    """A shallow copy of a block with modules put at `parts`, paths such as `attn.to_add_out`; shares all others."""
    made = _shallow(block)
    copied = {"": made}
    for path, module in parts.items():
        *parents, name = path.split(".")
        here, so_far = made, ""
        for parent in parents:
            so_far = f"{so_far}.{parent}"
            if so_far not in copied:
                copied[so_far] = here._modules[parent] = _shallow(here._modules[parent])
            here = copied[so_far]
        if name not in here._modules:
            raise KeyError(f"{type(block).__name__} has no {path}")
        here._modules[name] = module
    return made


def linear_at(module: nn.Module, path: str) -> nn.Linear:
    """The linear map at a path, or its replacement. Raises `AttributeError` where nothing is there."""
    # Quantised and low-rank maps are no `nn.Linear`, but have its attributes.
    return cast(nn.Linear, module.get_submodule(path))


def _shallow(module: nn.Module | None) -> nn.Module:
    if module is None:
        raise KeyError("a path leads through a sub-module that the block leaves out")
    # Not `copy.copy`: the class of a sharded module would construct a new one.
    made = object.__new__(type(module))
    made.__dict__.update(module.__dict__)
    # nn.Module's copy shares these dictionaries, and the original would change with the view.
    made._modules, made._parameters, made._buffers = (
        dict(module._modules),
        dict(module._parameters),
        dict(module._buffers),
    )
    return made


def linear_rows(linear: nn.Linear, rows: torch.Tensor) -> nn.Linear:
    """A copy of some outputs of a linear map."""
    return new_linear(linear.weight[rows], None if linear.bias is None else linear.bias[rows])


def new_linear(weight: torch.Tensor, bias: torch.Tensor | None) -> nn.Linear:
    """A linear map with copies of these, `(outputs, inputs)` and `(outputs,)`."""
    linear = nn.Linear(weight.shape[1], weight.shape[0], bias=bias is not None, device="meta")
    linear.weight = nn.Parameter(weight.detach().clone())
    if bias is not None:
        linear.bias = nn.Parameter(bias.detach().clone())
    return linear
