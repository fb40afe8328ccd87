"""A linear map with a low-rank update beside it, as a LoRA gives one (Hu et al. 2021, arXiv 2106.09685, Eq. 3)."""

from __future__ import annotations

from typing import cast

import torch
from torch import nn
from torch.nn import functional as F


class LoraLinear(nn.Module):
    """`base(x) + scale · (up (down x) + bias)`, `(…, p) → (…, q)`: `base` by reference, `down (r, p)`, `up (q, r)`.

    It has no `weight`: what reads that of a linear map would leave the update out without a word. `origin`: the LoRA's
    layer; None where it was transferred from others. `share`: the part of that layer's update, by its squared norm,
    that is left here.
    """

    bias: nn.Parameter | None

    def __init__(
        self,
        base: nn.Module,
        down: torch.Tensor,
        up: torch.Tensor,
        scale: float,
        origin: str | None,
        bias: torch.Tensor | None = None,
        share: float = 1.0,
    ):
        super().__init__()
        self.base, self.scale, self.origin, self.share = base, scale, origin, share
        self.down = nn.Parameter(down, requires_grad=False)
        self.up = nn.Parameter(up, requires_grad=False)
        self.bias = None if bias is None else nn.Parameter(bias, requires_grad=False)

    @property
    def base_linear(self) -> nn.Linear:
        """The map without the update."""
        return cast(nn.Linear, self.base)

    @property
    def in_features(self) -> int:
        return self.down.shape[1]

    @property
    def out_features(self) -> int:
        return self.up.shape[0]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.base(x) + F.linear(F.linear(x, self.down), self.up, self.bias) * self.scale

    def rows(self, base: nn.Module, rows: slice | torch.Tensor) -> LoraLinear:
        """The update of some outputs, beside a map that gives those alone."""
        up = self.up[rows]
        bias = None if self.bias is None else self.bias[rows]
        return LoraLinear(base, self.down, up, self.scale, self.origin, bias, self._share(self.down, up))

    def columns(self, base: nn.Module, columns: slice | torch.Tensor, bias: bool = True) -> LoraLinear:
        """The update for some inputs, beside a map that reads those alone. `bias`: with that of the update."""
        down = self.down[:, columns]
        shift = self.bias if bias else None
        return LoraLinear(base, down, self.up, self.scale, self.origin, shift, self._share(down, self.up))

    def in_basis(self, base: nn.Module, directions: torch.Tensor, mean: torch.Tensor) -> LoraLinear:
        """The update for inputs given by coordinates `c` in `x = directions c + mean`: `W'Q = WQ + up (down Q)`."""
        down = self.down.float()
        bias = self.up.float() @ (down @ mean.float())
        if self.bias is not None:
            bias = bias + self.bias.float()
        down = (down @ directions.float()).to(self.down.dtype)
        return LoraLinear(base, down, self.up, self.scale, self.origin, bias.to(self.up.dtype), self.share)

    def _share(self, down: torch.Tensor, up: torch.Tensor) -> float:
        whole = update_norm(self.down, self.up)
        return self.share * (update_norm(down, up) / whole) ** 2 if whole else self.share

    @torch.no_grad()
    def merged(self) -> nn.Linear:
        """One linear map that does the same; the product is computed in float32."""
        base = self.base_linear
        update = self.scale * (self.up.float() @ self.down.float())
        made = nn.Linear(
            base.in_features, base.out_features, bias=base.bias is not None or self.bias is not None, device="meta"
        )
        made.weight = nn.Parameter((base.weight.float() + update).to(base.weight.dtype), requires_grad=False)
        if made.bias is not None:
            bias = torch.zeros(base.out_features, device=base.weight.device) if base.bias is None else base.bias.float()
            if self.bias is not None:
                bias = bias + self.scale * self.bias.float()
            made.bias = nn.Parameter(bias.to(base.weight.dtype), requires_grad=False)
        return made


def update_norm(down: torch.Tensor, up: torch.Tensor) -> float:
    """The Frobenius norm of `up down`, without the product: `O(r² (p + q))`."""
    down, up = down.double(), up.double()
    return float(((up.T @ up) * (down @ down.T)).sum().clamp_min(0).sqrt())
