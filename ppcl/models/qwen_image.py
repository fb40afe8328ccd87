"""Qwen-Image, and Qwen-Image-Edit, whose transformer of the same class is given the edited image's tokens too."""

from __future__ import annotations

from typing import Any

from ppcl.models.adapter import IMG_QKV, TXT_QKV, BlockParts, ModelAdapter, register
from ppcl.models.example_inputs import latents_and_text


def _example(config: Any, samples: int, grid: tuple[int, int], text: int) -> dict[str, Any]:
    call = latents_and_text(config, samples, grid, text, packed=True)
    return call | {"img_shapes": [[(1, *grid)]] * samples, "encoder_hidden_states_mask": None}


QWEN_IMAGE = register(
    ModelAdapter(
        name="Qwen-Image",
        transformer="QwenImageTransformer2DModel",
        pipelines=("QwenImagePipeline", "QwenImageEditPipeline", "QwenImageEditPlusPipeline"),
        block_lists=("transformer_blocks",),
        block_classes=("QwenImageTransformerBlock",),
        layer_counts=("num_layers",),
        parts={
            "transformer_blocks": {
                "img": BlockParts("img_mod.1", "img_norm1", "img_norm2", "img_mlp", "attn.to_out.0", IMG_QKV),
                "txt": BlockParts("txt_mod.1", "txt_norm1", "txt_norm2", "txt_mlp", "attn.to_add_out", TXT_QKV),
            }
        },
        prompt_arguments=("encoder_hidden_states", "encoder_hidden_states_mask"),
        text_mask="encoder_hidden_states_mask",
        shared_arguments=("img_shapes", "guidance"),
        encoded=("encoder_hidden_states", "encoder_hidden_states_mask"),
        timestep_scale=1.0,
        example=_example,
        guidance_keeps_norm=True,
        uncalibrated=dict.fromkeys(
            ("QwenImageEditPipeline", "QwenImageEditPlusPipeline"),
            "its prompts come with images",
        ),
    )
)
