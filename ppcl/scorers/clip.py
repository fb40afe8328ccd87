"""Scores by a CLIP model: CLIPScore, and PickScore, which is CLIP trained on people's preferences."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from ppcl.scorers.model_folder import model_folder


class ClipScore:
    """CLIPScore of Hessel et al. 2021: 100 times the cosine between image and prompt, at least 0.

    `model`: a folder, or s3://bucket/key, with a `CLIPModel` as transformers saves it, weights as safetensors. Longer
    prompts are cut to the tokens that the model takes. It says little of the loss by pruning: see `docs/scorers.md`.
    """

    def __init__(self, model: str, device: str = "cpu"):
        from transformers import CLIPModel, CLIPProcessor
        from transformers.utils import logging

        # Its bars are for people who wait for it alone.
        logging.disable_progress_bar()
        folder = model_folder(model)
        self.device = device
        # In float32 whatever the file has: a score is compared in its third digit.
        weights = {"use_safetensors": True, "local_files_only": True, "dtype": torch.float32}
        self.model = CLIPModel.from_pretrained(folder, **weights).to(device).eval()
        self.processor: Any = CLIPProcessor.from_pretrained(folder, local_files_only=True)
        self.tokens = self.model.config.text_config.max_position_embeddings

    def __call__(self, prompts: list[str], images: np.ndarray, metadata: list[dict[str, Any]]) -> list[float]:
        return (100 * self._cosines(prompts, images).clamp(min=0)).tolist()

    @torch.no_grad()
    def _cosines(self, prompts: list[str], images: np.ndarray) -> torch.Tensor:
        """`(N,)` float32 on the CPU."""
        cut = {"padding": True, "truncation": True, "max_length": self.tokens}
        inputs = self.processor(text=prompts, images=list(images), return_tensors="pt", **cut)
        outputs = self.model(**inputs.to(self.device))
        # Both are normalised.
        return (outputs.image_embeds.float() * outputs.text_embeds.float()).sum(-1).cpu()


class PickScore(ClipScore):
    """PickScore of Kirstain et al. 2023: the cosine times the model's own scale, about 20.

    `model`: a folder with PickScore_v1, as transformers saves it.
    """

    def __call__(self, prompts: list[str], images: np.ndarray, metadata: list[dict[str, Any]]) -> list[float]:
        scale = self.model.logit_scale.detach().exp().cpu()
        return (scale * self._cosines(prompts, images)).tolist()
