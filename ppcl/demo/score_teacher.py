"""Score a demo teacher: the share of its images that the checker finds right, by category.

    python -m ppcl.demo.score_teacher demo/teacher --per-category 100

100 images a category is what `training.json` in the teacher's folder records.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ppcl.demo import world
from ppcl.demo.text_encoders import TOKENS
from ppcl.models.teacher import Teacher

_BATCH = 50
# How each family's demo teacher is sampled.
ARGUMENTS: dict[str, dict[str, Any]] = {
    "QwenImagePipeline": {"true_cfg_scale": 1.0},
    "FluxPipeline": {"guidance_scale": 2.0, "max_sequence_length": TOKENS},
    "StableDiffusion3Pipeline": {"guidance_scale": 1.0, "max_sequence_length": TOKENS},
}


def score(pipeline: Any, per_category: int, steps: int, seed: int) -> dict[str, dict[str, float]]:
    """Share of images that the checker finds right, by category: of held-out captions, and of trained ones."""
    result: dict[str, dict[str, float]] = {}
    for name, held_out in (("held_out", True), ("trained", False)):
        scores = {}
        for category in world.CATEGORIES:
            captions = [c.text for c in world.captions() if c.category == category and c.held_out == held_out]
            if captions:
                prompts = [captions[index % len(captions)] for index in range(per_category)]
                scores[category] = _share_right(pipeline, prompts, steps, seed)
        result[name] = scores | {"overall": sum(scores.values()) / len(scores)}
    return result


def _share_right(pipeline: Any, prompts: Sequence[str], steps: int, seed: int) -> float:
    images = draw(pipeline, prompts, steps, seed, _BATCH)
    return sum(map(world.check, images, prompts)) / len(prompts)


def draw(pipeline: Any, prompts: Sequence[str], steps: int, seed: int, batch: int) -> np.ndarray:
    """Images `(N, 64, 64, 3)` uint8, one a prompt, from the noise of one generator."""
    generator = torch.Generator().manual_seed(seed)
    batches = [
        pipeline(
            list(prompts[start : start + batch]),
            num_inference_steps=steps,
            height=world.CANVAS,
            width=world.CANVAS,
            generator=generator,
            output_type="np",
            **ARGUMENTS[type(pipeline).__name__],
        ).images
        for start in range(0, len(prompts), batch)
    ]
    return (np.concatenate(batches) * 255).round().astype(np.uint8)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("teacher", type=Path, help="the pipeline's folder")
    parser.add_argument("--per-category", type=int, default=100, help="images of each category")
    parser.add_argument("--sampling-steps", type=int, default=20)
    parser.add_argument("--seed", type=int, default=1, help="seed of the noise")
    options = parser.parse_args()
    pipeline = Teacher(options.teacher).pipeline()
    print(json.dumps(score(pipeline, options.per_category, options.sampling_steps, options.seed), indent=1))


if __name__ == "__main__":
    main()
