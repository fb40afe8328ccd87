"""A learned choice of blocks, after TinyFusion (arXiv 2412.01199), without its low-rank updates of the weights.

Every block has a logit. A step draws which `count` blocks are removed by Gumbel noise on the logits (the relaxed draw's
gradient, the hard draw's forward), and the velocity's error tells which are missed. TinyFusion draws within groups of
blocks; here the draw is over all, so that any number can be removed.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import nn

from ppcl.models import BlockLayout, ModelAdapter, adapter_of, show_processor, swapped
from ppcl.training.data import Samples, batch_of

if TYPE_CHECKING:
    from diffusers import ModelMixin

_RATE = 0.05
_TEMPERATURE = 1.0


class _Gated(nn.Module):
    """A block whose change of the streams is taken times a gate."""

    context_pre_only = False
    block: nn.Module

    def __init__(
        self, adapter: ModelAdapter, layout: BlockLayout, block: nn.Module, gates: list[torch.Tensor], number: int
    ):
        super().__init__()
        self.adapter, self.layout, self.gates, self.number = adapter, layout, gates, number
        # Not a sub-module: the block belongs to the teacher.
        self.__dict__["block"] = block
        show_processor(self, block)

    def forward(self, *arguments: Any, **named: Any) -> Any:
        given = self.layout.named(arguments, named)
        before, _ = self.adapter.parted(self.layout, given)
        returned = self.block(**given)
        after = self.adapter.from_returned(returned)
        gate = self.gates[0][self.number]
        mixed = {
            name: x
            if getattr(before, name) is None or x is None
            else getattr(before, name) + gate.to(x) * (x - getattr(before, name))
            for name, x in after._asdict().items()
        }
        return self.adapter.to_returned(after._replace(**mixed), returned)


def learned_gates(
    transformer: ModelMixin,
    samples: Samples,
    count: int,
    steps: int,
    batch_size: int,
    seed: int,
    tell: Callable[[int], None],
) -> list[float]:
    """By block, how much it is worth keeping: its logit after `steps` steps."""
    adapter = adapter_of(transformer)
    blocks = adapter.blocks(transformer)
    device, dtype = transformer.device, transformer.dtype
    logits = torch.zeros(len(blocks), device=device, requires_grad=True)
    optimizer = torch.optim.Adam([logits], lr=_RATE)
    generator = torch.Generator().manual_seed(seed)
    ids, gates = samples.ids("train"), [torch.ones(len(blocks), device=device)]
    layouts = [adapter.layout_at(transformer, number) for number in range(len(blocks))]
    gated = {n: _Gated(adapter, layouts[n], block, gates, n) for n, block in enumerate(blocks)}
    for step in range(steps):
        inputs = {**samples.batch(batch_of(step, ids, batch_size, seed), device, dtype), "return_dict": False}
        with torch.no_grad():
            target = transformer(**inputs)[0].float()
        noise = -torch.log(-torch.log(torch.rand(len(blocks), generator=generator).clamp(1e-9, 1 - 1e-9))).to(device)
        soft = torch.sigmoid(
            (logits + noise - torch.sort(logits + noise).values[count - 1 : count + 1].mean()) / _TEMPERATURE
        )
        hard = torch.ones_like(soft)
        hard[(logits + noise).argsort()[:count]] = 0.0
        gates[0] = hard + soft - soft.detach()
        with torch.enable_grad(), swapped(transformer, gated):
            made = transformer(**inputs)[0].float()
            loss = (made - target).square().sum() / target.square().sum()
        optimizer.zero_grad()
        (gradient,) = torch.autograd.grad(loss, logits)
        if torch.isfinite(gradient).all():
            logits.grad = gradient
            optimizer.step()
        tell(step + 1)
    return np.asarray(logits.detach().cpu(), np.float64).tolist()
