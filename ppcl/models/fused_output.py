"""A fused output projection as two maps, so that what replaces heads and what replaces hidden units are apart.

`W [a; h] + b = W_a a + (W_h h + b)`: a single-stream block has one map for what its attention's heads give, `a`, and
for its hidden units, `h`. The stock forward of the block stays as it is: it calls one module with both side by side.
Two products have as many multiplications as the one; their sum is one more pass over the output `(B, T + S, d)`.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import nn
from torch.distributed.tensor import DTensor
from torch.nn import functional as F

from ppcl.models.adapter import FusedParts, Parts
from ppcl.models.block_view import linear_at, new_linear, view
from ppcl.models.lora_linear import LoraLinear
from ppcl.models.weight_cache import host_original


class FusedOutput(nn.Module):
    """`attention (…, a → d)` of the first inputs plus `ffn (…, h → d)` of the others: `(…, a + h)` to `(…, d)`."""

    def __init__(self, attention: nn.Module, ffn: nn.Module):
        super().__init__()
        self.attention, self.ffn = attention, ffn

    @classmethod
    def of(cls, linear: nn.Module, attended: int) -> FusedOutput:
        """A linear map, or one with a LoRA, by reference: its first `attended` inputs, and the others with the bias."""
        plain = linear.base_linear if isinstance(linear, LoraLinear) else linear_at(linear, "")
        first, others = slice(0, attended), slice(attended, linear_at(linear, "").in_features)
        attention, ffn = _columns(plain, first, False), _columns(plain, others, True)
        if isinstance(linear, LoraLinear):
            return cls(linear.columns(attention, first, bias=False), linear.columns(ffn, others))
        return cls(attention, ffn)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        attended = linear_at(self.attention, "").in_features
        return self.attention(x[..., :attended]) + self.ffn(x[..., attended:])

    def joined(self) -> dict[str, torch.Tensor]:
        """The tensors of one linear map that does the same; a bias is there where either has one."""
        maps = [linear_at(part, "") for part in (self.attention, self.ffn)]
        tensors: dict[str, torch.Tensor] = {"weight": torch.cat([one.weight.detach() for one in maps], 1)}
        if biases := [one.bias.detach() for one in maps if one.bias is not None]:
            tensors["bias"] = sum(biases[1:], biases[0])
        return tensors

    def join_biases(self) -> None:
        """Have one bias in the place of two, as the stock map; what is trained or sharded keeps both."""
        biases = [_plain(part).bias for part in (self.attention, self.ffn)]
        if any(bias is None or bias.requires_grad or isinstance(bias, DTensor) for bias in biases):
            return
        first, second = (host_original(bias) for bias in biases)
        self.attention = _with_bias(self.attention, None)
        self.ffn = _with_bias(self.ffn, nn.Parameter(first + second, requires_grad=False))


class _Columns(nn.Module):
    """Some inputs of a linear map that must stay whole: in training, or sharded, where they are read as it runs."""

    source: nn.Linear

    def __init__(self, source: nn.Linear, columns: slice, with_bias: bool):
        super().__init__()
        if source.weight.requires_grad:
            self.source = source
        else:
            # Not a sub-module: the other columns are what is saved.
            self.__dict__["source"] = source
        self.columns, self.with_bias = columns, with_bias
        self.in_features, self.out_features = columns.stop - columns.start, source.out_features

    @property
    def weight(self) -> torch.Tensor:
        return self.source.weight[:, self.columns]

    @property
    def bias(self) -> torch.Tensor | None:
        return self.source.bias if self.with_bias else None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.linear(x, self.weight, self.bias)


def unfused(block: nn.Module, parts: Iterable[Parts]) -> nn.Module:
    """A view of a block in which `out` and `ffn_down` of `FusedParts` are modules; other blocks as they are.

    The weights are the block's own, by reference. Its numbers are those of the stock block up to rounding.
    """
    for where in parts:
        if isinstance(where, FusedParts) and not isinstance(block.get_submodule(where.fused), FusedOutput):
            output = FusedOutput.of(block.get_submodule(where.fused), attended_inputs(block, where))
            block = view(block, {where.fused: output})
    return block


def separate_output(block: nn.Module, where: FusedParts) -> FusedOutput:
    """A stock block's output projection as two maps with weights of their own."""
    linear, attended = linear_at(block, where.fused), attended_inputs(block, where)
    attention, ffn = linear.weight[:, :attended], linear.weight[:, attended:]
    return FusedOutput(new_linear(attention, None), new_linear(ffn, linear.bias))


def reader_of(block: nn.Module, where: Parts, path: str) -> tuple[str, slice]:
    """The module of a stock block that reads what the one at `path` in its view does, and which of its inputs."""
    if not isinstance(where, FusedParts):
        return path, slice(None)
    attended = attended_inputs(block, where)
    return where.fused, slice(0, attended) if path == where.out else slice(attended, None)


def attended_inputs(block: nn.Module, where: FusedParts) -> int:
    """How many inputs of a stock block's output projection come from its attention."""
    return linear_at(block, where.qkv[0]).out_features


def _columns(linear: nn.Linear, columns: slice, with_bias: bool) -> nn.Module:
    if linear.weight.requires_grad or isinstance(linear.weight, DTensor):
        return _Columns(linear, columns, with_bias)
    part = nn.Linear(columns.stop - columns.start, linear.out_features, bias=False, device="meta")
    part.weight = nn.Parameter(host_original(linear.weight)[:, columns], requires_grad=False)
    if with_bias and linear.bias is not None:
        part.bias = nn.Parameter(host_original(linear.bias), requires_grad=False)
    return part


def _plain(part: nn.Module) -> nn.Linear:
    return part.base_linear if isinstance(part, LoraLinear) else linear_at(part, "")


def _with_bias(part: nn.Module, bias: nn.Parameter | None) -> nn.Module:
    """A linear map with another bias, as a view of it."""
    if isinstance(part, LoraLinear):
        return view(part, {"base": _with_bias(part.base, bias)})
    made = view(part, {})
    made._parameters["bias"] = bias
    return made
