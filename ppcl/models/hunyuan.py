"""HunyuanImage-2.1 and HunyuanVideo: double-stream blocks, then single-stream blocks that part the streams again.

The refiner of the text belongs to the embedder.
"""

from __future__ import annotations

from typing import Any

import torch

from ppcl.models.adapter import NEEDS_MASK, ModelAdapter, register
from ppcl.models.example_inputs import text_width
from ppcl.models.flux import BLOCK_LISTS, JOINT_PARTS, LAYER_COUNTS


def _image_example(config: Any, samples: int, grid: tuple[int, int], text: int) -> dict[str, Any]:
    call: dict[str, Any] = {
        "hidden_states": torch.empty(samples, config.in_channels, *grid),
        "timestep": torch.empty(samples),
        "encoder_hidden_states": torch.empty(samples, text, text_width(config)),
        "encoder_attention_mask": torch.ones(samples, text, dtype=torch.bool),
    }
    if config.guidance_embeds:
        call["guidance"] = torch.empty(samples)
    if config.use_meanflow:
        call["timestep_r"] = torch.empty(samples)
    return call


def _video_example(config: Any, samples: int, grid: tuple[int, int], text: int) -> dict[str, Any]:
    rows, columns = grid
    call: dict[str, Any] = {
        "hidden_states": torch.empty(samples, config.in_channels, 1, 2 * rows, 2 * columns),
        "timestep": torch.empty(samples),
        "encoder_hidden_states": torch.empty(samples, text, text_width(config)),
        "encoder_attention_mask": torch.ones(samples, text, dtype=torch.bool),
        "pooled_projections": torch.empty(samples, config.pooled_projection_dim),
    }
    if config.guidance_embeds:
        call["guidance"] = torch.empty(samples)
    return call


HUNYUAN_IMAGE = register(
    ModelAdapter(
        name="HunyuanImage-2.1",
        transformer="HunyuanImageTransformer2DModel",
        pipelines=("HunyuanImagePipeline",),
        block_lists=BLOCK_LISTS,
        block_classes=("HunyuanImageTransformerBlock", "HunyuanImageSingleTransformerBlock"),
        layer_counts=LAYER_COUNTS,
        parts={"transformer_blocks": JOINT_PARTS},
        prompt_arguments=(
            "encoder_hidden_states",
            "encoder_attention_mask",
            "encoder_hidden_states_2",
            "encoder_attention_mask_2",
        ),
        shared_arguments=("guidance",),
        encoded=(
            "encoder_hidden_states",
            "encoder_attention_mask",
            "encoder_hidden_states_2",
            "encoder_attention_mask_2",
        ),
        timestep_scale=1000.0,
        packed_latents=False,
        guidance_argument="distilled_guidance_scale",
        example=_image_example,
        uncalibrated={"HunyuanImagePipeline": NEEDS_MASK},
    )
)

HUNYUAN_VIDEO = register(
    ModelAdapter(
        name="HunyuanVideo",
        transformer="HunyuanVideoTransformer3DModel",
        pipelines=("HunyuanVideoPipeline",),
        block_lists=BLOCK_LISTS,
        block_classes=("HunyuanVideoTransformerBlock", "HunyuanVideoSingleTransformerBlock"),
        layer_counts=LAYER_COUNTS,
        parts={"transformer_blocks": JOINT_PARTS},
        prompt_arguments=("encoder_hidden_states", "encoder_attention_mask", "pooled_projections"),
        shared_arguments=("guidance",),
        encoded=("encoder_hidden_states", "pooled_projections", "encoder_attention_mask"),
        timestep_scale=1000.0,
        packed_latents=False,
        example=_video_example,
        uncalibrated={"HunyuanVideoPipeline": NEEDS_MASK},
    )
)
