"""What training a demo teacher needs to know of its family."""

from __future__ import annotations

from abc import ABC, abstractmethod
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ppcl.demo.lessons import Batch

SHIFT = 2.0  # of the sampling schedule: what an image shows is settled at high noise


class Family(ABC):
    """A stock transformer of one family and its stock pipeline, with the shapes world's VAE and frozen text encoders.

    `encoded`: by argument of the transformer, its value for each caption of a lesson, `(captions, ...)`.
    """

    transformer: nn.Module
    pipeline: Any
    encoded: dict[str, torch.Tensor]

    @abstractmethod
    def __init__(self, vae: Path, seed: int): ...

    @abstractmethod
    def encode(self, captions: list[str]) -> dict[str, torch.Tensor]:
        """By argument of the transformer, its value for each caption."""

    @abstractmethod
    def velocity(self, batch: Batch) -> torch.Tensor:
        """The transformer's velocity, packed `(B, 16, 32)`."""

    def read(self, captions: list[str], device: str) -> None:
        """Encode a lesson's captions once: the text encoders do not learn."""
        with torch.no_grad():
            self.encoded = {name: value.to(device) for name, value in self.encode(captions).items()}

    def of(self, captions: torch.Tensor) -> dict[str, torch.Tensor]:
        return {name: value[captions] for name, value in self.encoded.items()}


def zero(model: nn.Module, modulations: tuple[str, ...]) -> None:
    """Start the head and the modulations, whose names end so, at zero.

    adaLN-Zero (Peebles & Xie 2023, arXiv 2212.09748): with modulations of zero a block starts as the identity.
    """
    for name, linear in model.named_modules():
        if name == "proj_out" or name.endswith(modulations):
            for parameter in linear.parameters():
                nn.init.zeros_(parameter)
