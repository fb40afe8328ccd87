"""AuraFlow: a few double-stream blocks, then blocks that take text and image tokens as one stream."""

from __future__ import annotations

from typing import Any

from ppcl.models.adapter import NEEDS_MASK, ModelAdapter, register
from ppcl.models.block_layout import ONE_STREAM, BlockLayout
from ppcl.models.example_inputs import latents_and_text


def _example(config: Any, samples: int, grid: tuple[int, int], text: int) -> dict[str, Any]:
    return latents_and_text(config, samples, grid, text, packed=False)


AURA_FLOW = register(
    ModelAdapter(
        name="AuraFlow",
        transformer="AuraFlowTransformer2DModel",
        pipelines=("AuraFlowPipeline",),
        block_lists=("joint_transformer_blocks", "single_transformer_blocks"),
        block_classes=("AuraFlowJointTransformerBlock", "AuraFlowSingleTransformerBlock"),
        layouts={"joint_transformer_blocks": BlockLayout(), "single_transformer_blocks": ONE_STREAM},
        layer_counts=("num_mmdit_layers", "num_single_dit_layers"),
        parts={},
        prompt_arguments=("encoder_hidden_states",),
        shared_arguments=(),
        encoded=("encoder_hidden_states", None, None, None),
        timestep_scale=1.0,
        packed_latents=False,
        guidance_argument="guidance_scale",
        example=_example,
        uncalibrated={"AuraFlowPipeline": NEEDS_MASK},
        notes={"width": "the FFNs are gated, and have no residual of their own"},
    )
)
