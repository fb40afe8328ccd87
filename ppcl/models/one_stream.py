"""Qwen-Image 2.1 and Krea 2: all blocks take text and image tokens as one stream, and share one modulation."""

from __future__ import annotations

from typing import Any

import torch

from ppcl.models.adapter import NEEDS_MASK, ModelAdapter, register
from ppcl.models.block_layout import ONE_STREAM
from ppcl.models.example_inputs import latents_and_text

_NO_WIDTH = {"width": "the FFNs are gated, and the blocks have no modulations of their own"}


def _qwen_example(config: Any, samples: int, grid: tuple[int, int], text: int) -> dict[str, Any]:
    call = latents_and_text(config, samples, grid, text, packed=True)
    # Behind the text come the image's slots, each of which stands for 2 × 2 tokens.
    mask = torch.arange(text + grid[0] * grid[1] // 4) >= text
    return call | {"img_shapes": [[(1, *grid)]] * samples, "img_mask": mask.expand(samples, -1)}


def _krea_example(config: Any, samples: int, grid: tuple[int, int], text: int) -> dict[str, Any]:
    tokens = grid[0] * grid[1]
    return {
        "hidden_states": torch.empty(samples, tokens, config.in_channels),
        "timestep": torch.empty(samples),
        "encoder_hidden_states": torch.empty(samples, text, config.num_text_layers, config.text_hidden_dim),
        "position_ids": torch.empty(text + tokens, 3),
    }


QWEN_IMAGE_21 = register(
    ModelAdapter(
        name="Qwen-Image 2.1",
        transformer="QwenImage21Transformer2DModel",
        pipelines=("QwenImage21Pipeline",),
        block_lists=("transformer_blocks",),
        block_classes=("QwenImage21TransformerBlock",),
        layouts={"transformer_blocks": ONE_STREAM},
        layer_counts=("num_layers",),
        parts={},
        prompt_arguments=("encoder_hidden_states", "encoder_hidden_states_mask", "img_mask"),
        shared_arguments=("img_shapes",),
        encoded=("encoder_hidden_states", "encoder_hidden_states_mask", "img_mask"),
        timestep_scale=1.0,
        example=_qwen_example,
        uncalibrated={"QwenImage21Pipeline": "its call caches text between denoising steps"},
        notes=_NO_WIDTH
        | {
            "plan": "its forward reads the values of its images' mask",
            "QwenImage21Pipeline": "it cannot be built without the files of its processor",
        },
    )
)

KREA2 = register(
    ModelAdapter(
        name="Krea 2",
        transformer="Krea2Transformer2DModel",
        pipelines=("Krea2Pipeline",),
        block_lists=("transformer_blocks",),
        block_classes=("Krea2TransformerBlock",),
        layouts={"transformer_blocks": ONE_STREAM},
        layer_counts=("num_layers",),
        parts={},
        prompt_arguments=("encoder_hidden_states", "encoder_attention_mask"),
        shared_arguments=("position_ids",),
        encoded=("encoder_hidden_states", "encoder_attention_mask"),
        timestep_scale=1.0,
        guidance_argument="guidance_scale",
        example=_krea_example,
        uncalibrated={"Krea2Pipeline": NEEDS_MASK},
        notes=_NO_WIDTH,
    )
)
