"""A Qwen-Image whose weights, moments and activations are in the proportions of the real one, and its samples.

Width 96 of 3072, 384 hidden units of 12,288, 64 image tokens of 4096; a pipeline folder with the transformer alone in
it, for what reads no other part.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import QwenImageTransformer2DModel

from ppcl.calibration.splits import Split
from ppcl.config.schema import Config
from ppcl.models.teacher import Teacher
from ppcl.replacements import Replacement
from ppcl.sizing.device import Device
from ppcl.sizing.job import JobSize, replacement_sizes
from ppcl.sizing.model import Model
from tests import tiny

PIXELS, TEXT_TOKENS = 128, 8


def pipeline(folder: Path, blocks: int = 6) -> Path:
    """The tiny pipeline with a larger transformer."""
    tiny.qwen_pipeline(folder)
    model = QwenImageTransformer2DModel(
        patch_size=2,
        in_channels=4 * tiny.Z_DIM,
        out_channels=tiny.Z_DIM,
        num_layers=blocks,
        attention_head_dim=16,
        num_attention_heads=6,
        joint_attention_dim=96,
        axes_dims_rope=(4, 6, 6),
    )
    tiny.randomised(model, 0).save_pretrained(folder / "transformer")
    return folder


def model_of(folder: Path) -> Model:
    teacher = Teacher(folder)
    return Model.of("sized", teacher.adapter.transformer, teacher.config(), TEXT_TOKENS, PIXELS, PIXELS, torch.float32)


def job_of(folder: Path, plan: Sequence[Replacement], **sections: Any) -> JobSize:
    """A job on the CPU with these replacements, on eight prompts."""
    model = model_of(folder)
    config = Config(teacher="teacher", prompts="prompts.txt", device="cpu", **sections)
    return JobSize(config, model, {}, 8, replacement_sizes(config, model, plan), Device(), cpu=True)


class SizedSamples:
    """`count` random samples, the last quarter both of validation and of test; no text is padded."""

    def __init__(self, count: int = 32):
        self.count = count

    def ids(self, split: Split) -> np.ndarray:
        border = self.count - self.count // 4
        return np.arange(border) if split == "train" else np.arange(border, self.count)

    def batch(self, ids: Any, device: str = "cpu", dtype: torch.dtype = torch.float32) -> dict[str, Any]:
        rows, side = len(ids), PIXELS // 16
        g = torch.Generator().manual_seed(int(ids[0]))
        return {
            "hidden_states": torch.randn(rows, side * side, 4 * tiny.Z_DIM, generator=g).to(dtype),
            "timestep": torch.rand(rows, generator=g),
            "encoder_hidden_states": torch.randn(rows, TEXT_TOKENS, 96, generator=g).to(dtype),
            "encoder_hidden_states_mask": None,
            "img_shapes": [[(1, side, side)]] * rows,
        }
