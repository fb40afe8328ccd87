"""What one batch leaves of the teacher, and what of it somebody needs."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch

from ppcl.models import Streams


@dataclass
class CapturedActivations:
    """What one batch left of the teacher: streams by boundary, and what its blocks were doing inside.

    Boundary `b` is the input of block `b`. `text_inputs`: by block, the modulated text input of its attention. `residuals`:
    by block and stream, the stream after the attention's residual. `hidden`: by block and stream, the FFN's hidden units
    `(B, T, h)`. `text_mask`: `(B, T)`, true where a token is no padding.
    """

    boundaries: dict[int, Streams] = field(default_factory=dict)
    text_inputs: dict[int, torch.Tensor] = field(default_factory=dict)
    residuals: dict[tuple[int, str], torch.Tensor] = field(default_factory=dict)
    hidden: dict[tuple[int, str], torch.Tensor] = field(default_factory=dict)
    context: dict[str, Any] = field(default_factory=dict)
    text_mask: torch.Tensor | None = None

    def mask(self, stream: str) -> torch.Tensor | None:
        return self.text_mask if stream == "txt" else None

    def tokens(self, x: torch.Tensor, stream: str) -> torch.Tensor:
        """A stream's tokens `(n, d)` that are no padding, float32."""
        mask = self.mask(stream)
        return (x[mask] if mask is not None else x.flatten(0, 1)).float()


@dataclass(frozen=True)
class CaptureSpec:
    """What must be captured of the teacher; see `CapturedActivations`."""

    boundaries: frozenset[int] = frozenset()
    text_inputs: frozenset[int] = frozenset()
    residuals: frozenset[int] = frozenset()
    hidden: frozenset[int] = frozenset()

    def __or__(self, other: CaptureSpec) -> CaptureSpec:
        return CaptureSpec(
            self.boundaries | other.boundaries,
            self.text_inputs | other.text_inputs,
            self.residuals | other.residuals,
            self.hidden | other.hidden,
        )
