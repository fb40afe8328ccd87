"""Lumina Image 2.0 and Z-Image: refiners of the text and of the image, then blocks that take both as one stream.

The refiners belong to the embedder: only `layers` are blocks.
"""

from __future__ import annotations

from typing import Any

import torch

from ppcl.models.adapter import NEEDS_MASK, ModelAdapter, register
from ppcl.models.block_layout import ONE_STREAM, BlockLayout
from ppcl.models.example_inputs import latents_and_text


def _lumina_example(config: Any, samples: int, grid: tuple[int, int], text: int) -> dict[str, Any]:
    call = latents_and_text(config, samples, grid, text, packed=False)
    return call | {"encoder_attention_mask": torch.ones(samples, text, dtype=torch.bool)}


def _z_image_example(config: Any, samples: int, grid: tuple[int, int], text: int) -> dict[str, Any]:
    rows, columns = grid
    return {
        "x": [torch.empty(config.in_channels, 1, 2 * rows, 2 * columns) for _ in range(samples)],
        "t": torch.empty(samples),
        "cap_feats": [torch.empty(text, config.cap_feat_dim) for _ in range(samples)],
    }


LUMINA2 = register(
    ModelAdapter(
        name="Lumina Image 2.0",
        transformer="Lumina2Transformer2DModel",
        pipelines=("Lumina2Pipeline",),
        block_lists=("layers",),
        block_classes=("Lumina2TransformerBlock",),
        layouts={"layers": ONE_STREAM},
        layer_counts=("num_layers",),
        parts={},
        prompt_arguments=("encoder_hidden_states", "encoder_attention_mask"),
        shared_arguments=(),
        encoded=("encoder_hidden_states", "encoder_attention_mask", None, None),
        timestep_scale=1.0,
        packed_latents=False,
        guidance_argument="guidance_scale",
        example=_lumina_example,
        uncalibrated={"Lumina2Pipeline": NEEDS_MASK},
        notes={
            "width": "the FFNs are gated, and norms stand behind attention and FFN",
            "plan": "its forward reads the values of its prompts' mask",
        },
    )
)

Z_IMAGE = register(
    ModelAdapter(
        name="Z-Image",
        transformer="ZImageTransformer2DModel",
        pipelines=("ZImagePipeline",),
        block_lists=("layers",),
        block_classes=("ZImageTransformerBlock",),
        # Diffusers' registry calls the argument hidden_states.
        layouts={"layers": BlockLayout("x", None, ("img",))},
        layer_counts=("n_layers",),
        parts={},
        prompt_arguments=("cap_feats",),
        shared_arguments=(),
        encoded=("cap_feats", None),
        timestep_scale=1.0,
        attention="attention",
        latents="x",
        timestep="t",
        packed_latents=False,
        guidance_argument="guidance_scale",
        example=_z_image_example,
        uncalibrated={"ZImagePipeline": "its transformer takes and returns lists of latents"},
        notes={"width": "the FFNs are gated, and norms stand behind attention and FFN"},
    )
)
