"""A student: one block that stands for an interval of the teacher's, optionally followed by an affine map."""

from __future__ import annotations

from typing import Any

from torch import nn

from ppcl.models import ModelAdapter, Streams
from ppcl.replacements.plan import Interval


class StudentBlock(nn.Module):
    """Called exactly as a block is: keyword arguments in, the streams as the adapter returns them out.

    `block`: of the same kind as the teacher's block `source`. `affine`: by stream, a residual map `x + W x + b` behind
    the block, the closed-form start of a student; empty for the paper's start. PPCL, arXiv 2511.16156, Eq. 6.
    """

    # Read by the stock SD3 forward between blocks.
    context_pre_only = False

    def __init__(
        self,
        adapter: ModelAdapter,
        interval: Interval,
        source: int,
        block: nn.Module,
        affine: dict[str, nn.Linear] | None = None,
    ):
        super().__init__()
        self.adapter = adapter
        self.interval = interval
        self.source = source
        self.block = block
        self.affine = nn.ModuleDict(affine or {})

    def forward(self, **arguments: Any) -> tuple:
        streams = self.adapter.from_returned(self.block(**arguments))
        mapped = {name: x + self.affine[name](x) for name, x in streams._asdict().items() if name in self.affine}
        return self.adapter.to_returned(streams._replace(**mapped))

    def streams(self, streams: Streams, context: dict[str, Any]) -> Streams:
        """The same on streams: `(X_{u-1}, context)` to the student's `X_v`."""
        return self.adapter.from_returned(self(**self.adapter.join(streams, context)))


def affine_map(width: int) -> nn.Linear:
    """A residual affine map that changes nothing yet."""
    linear = nn.Linear(width, width)
    nn.init.zeros_(linear.weight)
    nn.init.zeros_(linear.bias)
    return linear
