"""FLUX.1 and the families that are built like it: double-stream blocks, then single-stream blocks.

Bria and LongCat-Image differ from FLUX.1 in their embedders alone. Chroma computes all modulations outside of its
blocks, and Ovis-Image has gated FFNs.
"""

from __future__ import annotations

from typing import Any

import torch

from ppcl.models.adapter import IMG_QKV, NEEDS_MASK, TXT_QKV, BlockParts, FusedParts, ModelAdapter, register
from ppcl.models.block_layout import ONE_STREAM, BlockLayout
from ppcl.models.example_inputs import flux_like

BLOCK_LISTS = ("transformer_blocks", "single_transformer_blocks")
LAYER_COUNTS = ("num_layers", "num_single_layers")
# A block that adds its attention and its FFN by one projection.
_SINGLE_PARTS = {"img": FusedParts("norm.linear", "proj_mlp", "proj_out", IMG_QKV)}
# Of blocks whose norms are `AdaLayerNormZero`, whose FFNs are not gated, and whose attention adds the text's maps.
JOINT_PARTS = {
    "img": BlockParts("norm1.linear", "norm1.norm", "norm2", "ff", "attn.to_out.0", IMG_QKV),
    "txt": BlockParts(
        "norm1_context.linear", "norm1_context.norm", "norm2_context", "ff_context", "attn.to_add_out", TXT_QKV
    ),
}


def _flux_example(config: Any, samples: int, grid: tuple[int, int], text: int) -> dict[str, Any]:
    call = flux_like(config, samples, grid, text)
    call["pooled_projections"] = torch.empty(samples, config.pooled_projection_dim)
    if config.guidance_embeds:
        call["guidance"] = torch.empty(samples)
    return call


def _chroma_example(config: Any, samples: int, grid: tuple[int, int], text: int) -> dict[str, Any]:
    tokens = text + grid[0] * grid[1]
    return flux_like(config, samples, grid, text) | {"attention_mask": torch.ones(samples, tokens, dtype=torch.bool)}


FLUX = register(
    ModelAdapter(
        name="FLUX.1",
        transformer="FluxTransformer2DModel",
        pipelines=("FluxPipeline",),
        block_lists=BLOCK_LISTS,
        block_classes=("FluxTransformerBlock", "FluxSingleTransformerBlock"),
        layer_counts=LAYER_COUNTS,
        parts={"transformer_blocks": JOINT_PARTS, "single_transformer_blocks": _SINGLE_PARTS},
        prompt_arguments=("encoder_hidden_states", "pooled_projections"),
        shared_arguments=("img_ids", "txt_ids", "guidance"),
        encoded=("encoder_hidden_states", "pooled_projections", None),
        timestep_scale=1.0,
        example=_flux_example,
    )
)

BRIA = register(
    ModelAdapter(
        name="Bria 3.2",
        transformer="BriaTransformer2DModel",
        pipelines=("BriaPipeline",),
        block_lists=BLOCK_LISTS,
        block_classes=("BriaTransformerBlock", "BriaSingleTransformerBlock"),
        # Diffusers' registry says that the blocks return the image stream alone.
        layouts={"transformer_blocks": BlockLayout(), "single_transformer_blocks": BlockLayout()},
        layer_counts=LAYER_COUNTS,
        parts={"transformer_blocks": JOINT_PARTS, "single_transformer_blocks": _SINGLE_PARTS},
        prompt_arguments=("encoder_hidden_states",),
        shared_arguments=("img_ids", "txt_ids", "guidance"),
        encoded=("encoder_hidden_states", None, None),
        timestep_scale=1000.0,
        guidance_argument="guidance_scale",
        example=flux_like,
    )
)

LONGCAT_IMAGE = register(
    ModelAdapter(
        name="LongCat-Image",
        transformer="LongCatImageTransformer2DModel",
        pipelines=("LongCatImagePipeline",),
        block_lists=BLOCK_LISTS,
        block_classes=("LongCatImageTransformerBlock", "LongCatImageSingleTransformerBlock"),
        layouts={"transformer_blocks": BlockLayout(), "single_transformer_blocks": BlockLayout()},
        layer_counts=LAYER_COUNTS,
        parts={"transformer_blocks": JOINT_PARTS, "single_transformer_blocks": _SINGLE_PARTS},
        prompt_arguments=("encoder_hidden_states",),
        shared_arguments=("img_ids", "txt_ids", "guidance"),
        encoded=("encoder_hidden_states", None),
        timestep_scale=1.0,
        guidance_argument="guidance_scale",
        uncalibrated={"LongCatImagePipeline": "its call takes no embeddings in place of a prompt"},
        example=flux_like,
    )
)

OVIS_IMAGE = register(
    ModelAdapter(
        name="Ovis-Image",
        transformer="OvisImageTransformer2DModel",
        pipelines=("OvisImagePipeline",),
        block_lists=BLOCK_LISTS,
        block_classes=("OvisImageTransformerBlock", "OvisImageSingleTransformerBlock"),
        layouts={"transformer_blocks": BlockLayout(), "single_transformer_blocks": BlockLayout()},
        layer_counts=LAYER_COUNTS,
        parts={},
        prompt_arguments=("encoder_hidden_states",),
        shared_arguments=("img_ids", "txt_ids"),
        encoded=("encoder_hidden_states", None, None, None),
        timestep_scale=1.0,
        guidance_argument="guidance_scale",
        example=flux_like,
        notes={"width": "the FFNs are gated"},
    )
)

CHROMA = register(
    ModelAdapter(
        name="Chroma",
        transformer="ChromaTransformer2DModel",
        pipelines=("ChromaPipeline",),
        block_lists=BLOCK_LISTS,
        block_classes=("ChromaTransformerBlock", "ChromaSingleTransformerBlock"),
        layouts={"transformer_blocks": BlockLayout(), "single_transformer_blocks": ONE_STREAM},
        layer_counts=LAYER_COUNTS,
        parts={},
        prompt_arguments=("encoder_hidden_states", "attention_mask"),
        shared_arguments=("img_ids", "txt_ids"),
        encoded=("encoder_hidden_states", None, "attention_mask", None, None, None),
        timestep_scale=1.0,
        guidance_argument="guidance_scale",
        example=_chroma_example,
        uncalibrated={"ChromaPipeline": NEEDS_MASK},
        notes={
            "width": "the modulations are computed outside of the blocks",
            "export": "the stock class makes a block's modulation from its number and the number of all blocks",
        },
    )
)
