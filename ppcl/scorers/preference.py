"""Reward models that were trained on people's preferences, by DiffSynth's implementations (`pip install diffsynth`).

Weights as DiffSynth-Studio/ImageMetrics has them: a folder for each, with `model.safetensors` and the tokenizer or
processor.
"""

from __future__ import annotations

from typing import Any, ClassVar

import numpy as np
from PIL import Image

from ppcl.errors import UserError
from ppcl.scorers.model_folder import model_folder


class _Preference:
    """`model`: the folder, or s3://bucket/key."""

    metric: ClassVar[str]
    # The argument for what stands beside the weights.
    beside: ClassVar[str] = "processor_config"

    def __init__(self, model: str, device: str = "cpu"):
        from diffsynth import metrics

        folder = model_folder(model)
        weights = folder / "model.safetensors"
        if not weights.is_file():
            raise UserError(f"{model} has no model.safetensors; give a folder of DiffSynth-Studio/ImageMetrics")
        configs = {"model_config": metrics.ModelConfig(path=str(weights))}
        configs[self.beside] = metrics.ModelConfig(path=str(folder))
        self.scorer: Any = getattr(metrics, self.metric).from_pretrained(**configs, device=device)

    def __call__(self, prompts: list[str], images: np.ndarray, metadata: list[dict[str, Any]]) -> list[float]:
        # One pair a call: some of these score every prompt with every image.
        pairs = zip(prompts, images, strict=True)
        return [float(np.ravel(self.scorer.score(text, Image.fromarray(image)))[0]) for text, image in pairs]


class ImageReward(_Preference):
    """ImageReward of Xu et al. 2023. Its scores may be negative: it has no R where the teacher's mean is."""

    metric = "ImageRewardMetric"
    beside = "tokenizer_config"


class HpsV2(_Preference):
    """Human Preference Score v2 of Wu et al. 2023."""

    metric = "HPSv2Metric"


class HpsV3(_Preference):
    """Human Preference Score v3 of Ma et al. 2025, a vision-language model of 7 billion parameters."""

    metric = "HPSv3Metric"
