"""CogView4: double-stream blocks whose streams share the maps of the attention and the FFN."""

from __future__ import annotations

from typing import Any

import torch

from ppcl.models.adapter import ModelAdapter, register
from ppcl.models.example_inputs import latents_and_text


def _example(config: Any, samples: int, grid: tuple[int, int], text: int) -> dict[str, Any]:
    sizes = {name: torch.empty(samples, 2) for name in ("original_size", "target_size", "crop_coords")}
    return latents_and_text(config, samples, grid, text, packed=False) | sizes


COGVIEW4 = register(
    ModelAdapter(
        name="CogView4",
        transformer="CogView4Transformer2DModel",
        pipelines=("CogView4Pipeline",),
        block_lists=("transformer_blocks",),
        block_classes=("CogView4TransformerBlock",),
        layer_counts=("num_layers",),
        parts={},
        prompt_arguments=("encoder_hidden_states",),
        shared_arguments=("original_size", "target_size", "crop_coords"),
        encoded=("encoder_hidden_states", None),
        timestep_scale=1000.0,
        attention="attn1",
        packed_latents=False,
        guidance_argument="guidance_scale",
        example=_example,
        uncalibrated={"CogView4Pipeline": "its calls have sizes of images by sample, which are not recorded"},
        notes={"width": "both streams share one FFN and one modulation"},
    )
)
