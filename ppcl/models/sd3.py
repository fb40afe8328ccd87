"""Stable Diffusion 3 and 3.5."""

from __future__ import annotations

from typing import Any

import torch

from ppcl.models.adapter import ModelAdapter, register
from ppcl.models.example_inputs import latents_and_text
from ppcl.models.flux import JOINT_PARTS


def _example(config: Any, samples: int, grid: tuple[int, int], text: int) -> dict[str, Any]:
    call = latents_and_text(config, samples, grid, text, packed=False)
    return call | {"pooled_projections": torch.empty(samples, config.pooled_projection_dim)}


SD3 = register(
    ModelAdapter(
        name="Stable Diffusion 3.5",
        transformer="SD3Transformer2DModel",
        pipelines=("StableDiffusion3Pipeline",),
        block_lists=("transformer_blocks",),
        block_classes=("JointTransformerBlock",),
        layer_counts=("num_layers",),
        parts={"transformer_blocks": JOINT_PARTS},
        prompt_arguments=("encoder_hidden_states", "pooled_projections"),
        shared_arguments=(),
        encoded=("encoder_hidden_states", None, "pooled_projections", None),
        timestep_scale=1000.0,
        example=_example,
        packed_latents=False,
        guidance_argument="guidance_scale",
        # Zeros stand for the text of the T5 then.
        optional_components=("text_encoder_3", "tokenizer_3"),
    )
)
