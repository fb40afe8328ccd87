"""A calibration set in memory, of random states for the tiny Qwen-Image."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from ppcl.calibration.splits import Split
from ppcl.demo import text
from tests import tiny


class MemorySamples:
    """`count` samples, the last quarter both of validation and of test; prompts have 4 to 7 tokens."""

    def __init__(self, count: int = 32, seed: int = 0):
        g = torch.Generator().manual_seed(seed)
        self.count = count
        self.latents = torch.randn(count, 16, 4 * tiny.Z_DIM, generator=g)
        self.timesteps = torch.rand(count, generator=g)
        self.mask = (torch.arange(7) < torch.randint(4, 8, (count, 1), generator=g)).long()
        self.mask[:, :4] = 1
        self.embeddings = torch.randn(count, 7, text.WIDTH, generator=g) * self.mask[..., None]

    def ids(self, split: Split) -> np.ndarray:
        border = self.count - self.count // 4
        return np.arange(border) if split == "train" else np.arange(border, self.count)

    def batch(self, ids: Sequence[int], device: str = "cpu", dtype: torch.dtype = torch.float32) -> dict[str, Any]:
        rows = torch.as_tensor(np.asarray(ids))
        return {
            "hidden_states": self.latents[rows].to(device, dtype),
            "timestep": self.timesteps[rows].to(device, dtype),
            "encoder_hidden_states": self.embeddings[rows].to(device, dtype),
            "encoder_hidden_states_mask": self.mask[rows].to(device),
            "img_shapes": [[(1, 4, 4)]] * len(rows),
        }


class FluxSamples:
    """The same for the tiny FLUX.1: a transformer's inputs, row by row."""

    def __init__(self, transformer: torch.nn.Module, count: int = 64):
        self.count, self.inputs = count, tiny.inputs(transformer, count)

    def ids(self, split: Split) -> np.ndarray:
        border = self.count - self.count // 4
        return np.arange(border) if split == "train" else np.arange(border, self.count)

    def batch(self, ids: Sequence[int], device: str = "cpu", dtype: torch.dtype = torch.float32) -> dict[str, Any]:
        rows = torch.as_tensor(np.asarray(ids))
        shared = ("img_ids", "txt_ids")
        return {
            name: value.clone() if name in shared else value[rows].to(device, dtype)
            for name, value in self.inputs.items()
        }
