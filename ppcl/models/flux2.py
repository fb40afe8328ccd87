"""FLUX.2: double-stream blocks, then blocks that take text and image tokens as one stream.

All blocks of a list share one modulation, which the transformer computes.
"""

from __future__ import annotations

from typing import Any

import torch

from ppcl.models.adapter import ModelAdapter, register
from ppcl.models.example_inputs import latents_and_text, position_ids


def _example(config: Any, samples: int, grid: tuple[int, int], text: int) -> dict[str, Any]:
    call = latents_and_text(config, samples, grid, text, packed=True) | position_ids(grid, text, axes=4)
    if config.guidance_embeds:
        call["guidance"] = torch.empty(samples)
    return call


FLUX2 = register(
    ModelAdapter(
        name="FLUX.2",
        transformer="Flux2Transformer2DModel",
        pipelines=("Flux2Pipeline", "Flux2KleinPipeline"),
        block_lists=("transformer_blocks", "single_transformer_blocks"),
        block_classes=("Flux2TransformerBlock", "Flux2SingleTransformerBlock"),
        layer_counts=("num_layers", "num_single_layers"),
        parts={},
        prompt_arguments=("encoder_hidden_states",),
        shared_arguments=("img_ids", "txt_ids", "guidance"),
        encoded=("encoder_hidden_states", None),
        timestep_scale=1.0,
        guidance_argument="guidance_scale",
        example=_example,
        notes={"width": "the FFNs are gated, and the blocks have no modulations of their own"},
    )
)
