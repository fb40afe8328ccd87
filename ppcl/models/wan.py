"""Wan and LTX-Video: video transformers whose blocks attend to the text beside the stream of video tokens.

The text is the same in every block: it is context, not a stream.
"""

from __future__ import annotations

from typing import Any

import torch

from ppcl.models.adapter import NEEDS_MASK, ModelAdapter, register
from ppcl.models.example_inputs import text_width


def _wan_example(config: Any, samples: int, grid: tuple[int, int], text: int) -> dict[str, Any]:
    rows, columns = grid
    frames, height, width = config.patch_size
    return {
        "hidden_states": torch.empty(samples, config.in_channels, frames, height * rows, width * columns),
        "timestep": torch.empty(samples),
        "encoder_hidden_states": torch.empty(samples, text, text_width(config)),
    }


def _ltx_example(config: Any, samples: int, grid: tuple[int, int], text: int) -> dict[str, Any]:
    rows, columns = grid
    return {
        "hidden_states": torch.empty(samples, rows * columns, config.in_channels),
        "timestep": torch.empty(samples),
        "encoder_hidden_states": torch.empty(samples, text, text_width(config)),
        "encoder_attention_mask": torch.ones(samples, text, dtype=torch.bool),
        "num_frames": 1,
        "height": rows,
        "width": columns,
    }


_NO_WIDTH = {"width": "the blocks have a table of modulations, and no linear map that makes them"}

WAN = register(
    ModelAdapter(
        name="Wan",
        transformer="WanTransformer3DModel",
        pipelines=("WanPipeline",),
        block_lists=("blocks",),
        block_classes=("WanTransformerBlock",),
        layer_counts=("num_layers",),
        parts={},
        prompt_arguments=("encoder_hidden_states",),
        shared_arguments=(),
        encoded=("encoder_hidden_states", None),
        timestep_scale=1000.0,
        attention="attn1",
        packed_latents=False,
        guidance_argument="guidance_scale",
        example=_wan_example,
        uncalibrated={"WanPipeline": "a job evaluates images, not videos"},
        notes=_NO_WIDTH,
    )
)

LTX = register(
    ModelAdapter(
        name="LTX-Video",
        transformer="LTXVideoTransformer3DModel",
        pipelines=("LTXPipeline",),
        block_lists=("transformer_blocks",),
        block_classes=("LTXVideoTransformerBlock",),
        layer_counts=("num_layers",),
        parts={},
        prompt_arguments=("encoder_hidden_states", "encoder_attention_mask"),
        shared_arguments=("num_frames", "height", "width", "rope_interpolation_scale"),
        encoded=("encoder_hidden_states", "encoder_attention_mask", None, None),
        timestep_scale=1000.0,
        attention="attn1",
        guidance_argument="guidance_scale",
        example=_ltx_example,
        uncalibrated={"LTXPipeline": NEEDS_MASK},
        notes=_NO_WIDTH,
    )
)
