"""Distances of an image to the teacher's image of the same prompt and seed."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from PIL import Image
from torch.nn import functional as F

from ppcl.errors import UserError
from ppcl.evaluation.image_metrics import psnr, ssim
from ppcl.scorers.model_folder import weights_file

_VGG16 = "vgg16-397923af.pth"
_DISTS_SIDE = 256


def psnr_to_teacher(prompts: list[str], images: np.ndarray, metadata: list[dict[str, Any]]) -> np.ndarray:
    """PSNR in dB; see `ppcl.evaluation.image_metrics`. The teacher's own images have 58.9."""
    return psnr(images, _teachers(metadata))


def ssim_to_teacher(prompts: list[str], images: np.ndarray, metadata: list[dict[str, Any]]) -> np.ndarray:
    """SSIM after Wang et al. 2004; see `ppcl.evaluation.image_metrics`. The teacher's own images have 1."""
    return ssim(images, _teachers(metadata))


class Lpips:
    """LPIPS of Zhang et al. 2018, by DiffSynth's implementation (`pip install diffsynth`); smaller is better.

    `weights`: a `.safetensors` file as DiffSynth-Studio/ImageMetrics has them. `net`: what it is of.
    """

    def __init__(self, weights: str, net: Literal["alex", "vgg", "squeeze"] = "alex", device: str = "cpu"):
        from diffsynth.core import ModelConfig
        from diffsynth.metrics import LPIPSMetric

        self.metric: Any = LPIPSMetric.from_pretrained(
            net=net, model_config=ModelConfig(path=str(weights_file(weights))), device=device
        )

    def __call__(self, prompts: list[str], images: np.ndarray, metadata: list[dict[str, Any]]) -> list[float]:
        pairs = zip(images, _teachers(metadata), strict=True)
        return [float(self.metric.compute(Image.fromarray(a), Image.fromarray(b))) for a, b in pairs]


class Dists:
    """DISTS of Ding et al. 2020, structure and texture at once, by torchmetrics (`torchmetrics[image]`).

    Smaller is better. `hub`: a folder of torch.hub with `checkpoints/vgg16-397923af.pth`, torchvision's VGG16, which is
    read without unpickling code. Images with a shorter side above 256 pixels are shrunk to that, as its authors do.
    """

    def __init__(self, hub: str, device: str = "cpu"):
        from torchmetrics.functional.image.dists import DISTSNetwork

        if not (Path(hub) / "checkpoints" / _VGG16).is_file():
            raise UserError(f"{hub} has no checkpoints/{_VGG16}; give a folder of torch.hub that has it")
        torch.hub.set_dir(hub)
        self.device, self.network = device, DISTSNetwork().to(device).eval()

    def __call__(self, prompts: list[str], images: np.ndarray, metadata: list[dict[str, Any]]) -> list[float]:
        distances = self.network(self._tensor(images), self._tensor(_teachers(metadata)))
        return distances.reshape(-1).cpu().tolist()

    def _tensor(self, images: np.ndarray) -> torch.Tensor:
        """`(N, H, W, 3)` uint8 to `(N, 3, h, w)` float32 in [0, 1]."""
        tensor = torch.from_numpy(images).to(self.device).permute(0, 3, 1, 2).float() / 255
        scale = _DISTS_SIDE / min(tensor.shape[-2:])
        return F.interpolate(tensor, scale_factor=scale, mode="bilinear", antialias=True) if scale < 1 else tensor


def _teachers(metadata: list[dict[str, Any]]) -> np.ndarray:
    return np.stack([row["teacher"] for row in metadata])
