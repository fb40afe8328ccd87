"""Activations of the teacher that are captured from one batch, and the specification of what to capture."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.nn import functional as F

from ppcl.models import Streams

# What is of all tokens, the text's in front: the one stream of a single-stream block.
JOINT = "joint"


@dataclass
class CapturedActivations:
    """Activations of the teacher on one batch: streams by boundary, and inner tensors of its blocks.

    Boundary `b` is the input of block `b`, both streams `(B, S, d)` and `(B, T, d)`. `text_inputs`: by block, the
    modulated text input of its attention `(B, T, d)`. `residuals`: by block and stream, the stream after the
    attention's residual. `hidden`: by block and stream, the FFN's hidden units `(B, T, h)`. `attended`: by block and
    stream, what the attention's heads give to the output projection `(B, T, d)`; of a single-stream block both are of
    all tokens, `(B, T + S, …)`, under `img`. `context`: the block's other arguments. `text_mask`: `(B, T)`, true where
    a token is not padding.
    """

    boundaries: dict[int, Streams] = field(default_factory=dict)
    text_inputs: dict[int, torch.Tensor] = field(default_factory=dict)
    residuals: dict[tuple[int, str], torch.Tensor] = field(default_factory=dict)
    hidden: dict[tuple[int, str], torch.Tensor] = field(default_factory=dict)
    attended: dict[tuple[int, str], torch.Tensor] = field(default_factory=dict)
    context: dict[str, Any] = field(default_factory=dict)
    text_mask: torch.Tensor | None = None

    def drop(self, name: str, number: int) -> None:
        """Forget one thing that was captured: field `name` of boundary or block `number`, of both streams."""
        field_of: dict[Any, Any] = getattr(self, name)
        for key in [key for key in field_of if (key[0] if isinstance(key, tuple) else key) == number]:
            del field_of[key]

    def mask(self, stream: str) -> torch.Tensor | None:
        return self.text_mask if stream == "txt" else None

    def tokens(self, x: torch.Tensor, stream: str) -> torch.Tensor:
        """The tokens `(n, d)` that are not padding, of a stream or of `JOINT`, float32."""
        mask = self.mask(stream)
        if stream == JOINT and self.text_mask is not None:
            mask = F.pad(self.text_mask, (0, x.shape[1] - self.text_mask.shape[1]), value=True)
        return (x[mask] if mask is not None else x.flatten(0, 1)).float()

    def all_tokens(self, streams: Streams) -> torch.Tensor:
        """The tokens `(n, d)` of both streams that are not padding, those of the text first, float32."""
        named = (("txt", streams.txt), ("img", streams.img))
        return torch.cat([self.tokens(x, name) for name, x in named if x is not None])


@dataclass(frozen=True)
class CaptureSpec:
    """What to capture of the teacher; see `CapturedActivations`."""

    boundaries: frozenset[int] = frozenset()
    text_inputs: frozenset[int] = frozenset()
    residuals: frozenset[int] = frozenset()
    hidden: frozenset[int] = frozenset()
    attended: frozenset[int] = frozenset()

    def items(self) -> Iterator[tuple[str, int, int]]:
        """`(field, number, block)`: each thing to capture, and the block after which it is there.

        Boundary `b` is there after block `b - 1`.
        """
        for name in ("boundaries", "text_inputs", "residuals", "hidden", "attended"):
            for number in getattr(self, name):
                yield name, number, number - 1 if name == "boundaries" else number

    @property
    def first_block(self) -> int:
        """The block after which the first of it is there; -1 where nothing must be captured."""
        return min((block for _, _, block in self.items()), default=-1)

    @property
    def last_block(self) -> int:
        """The block after which all of it is there; -1 where nothing must be captured."""
        return max((block for _, _, block in self.items()), default=-1)

    def __or__(self, other: CaptureSpec) -> CaptureSpec:
        return CaptureSpec(
            self.boundaries | other.boundaries,
            self.text_inputs | other.text_inputs,
            self.residuals | other.residuals,
            self.hidden | other.hidden,
            self.attended | other.attended,
        )
