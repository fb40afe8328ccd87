"""A tiny random transformer of every family that ppcl has a record of, and arguments to call it with."""

from __future__ import annotations

from typing import Any

import diffusers
import torch
from torch import nn

from ppcl.models import adapter_of, records
from tests.tiny import randomised

_HEADS = {"attention_head_dim": 16, "num_attention_heads": 2}
_TWO_LISTS = {"num_layers": 3, "num_single_layers": 4}
_ROPE = {"axes_dims_rope": (4, 6, 6)}

# By transformer class, the keys of its configuration; the width is 32 everywhere.
CONFIGS: dict[str, dict[str, Any]] = {
    "AuraFlowTransformer2DModel": {
        **_HEADS,
        "sample_size": 8,
        "num_mmdit_layers": 3,
        "num_single_dit_layers": 4,
        "joint_attention_dim": 24,
        "caption_projection_dim": 32,
        "pos_embed_max_size": 16,
    },
    "BriaTransformer2DModel": {**_HEADS, **_TWO_LISTS, **_ROPE, "in_channels": 16, "joint_attention_dim": 24},
    "ChromaTransformer2DModel": {
        **_HEADS,
        **_TWO_LISTS,
        **_ROPE,
        "in_channels": 16,
        "joint_attention_dim": 24,
        "approximator_num_channels": 16,
        "approximator_hidden_dim": 40,
        "approximator_layers": 2,
    },
    "CogView4Transformer2DModel": {
        **_HEADS,
        "in_channels": 4,
        "out_channels": 4,
        "num_layers": 4,
        "text_embed_dim": 24,
        "time_embed_dim": 20,
        "condition_dim": 4,
        "rope_axes_dim": (8, 8),
    },
    "Flux2Transformer2DModel": {
        **_HEADS,
        **_TWO_LISTS,
        "in_channels": 16,
        "joint_attention_dim": 24,
        "timestep_guidance_channels": 12,
        "axes_dims_rope": (4, 4, 4, 4),
    },
    "FluxTransformer2DModel": {
        **_HEADS,
        **_TWO_LISTS,
        **_ROPE,
        "in_channels": 16,
        "joint_attention_dim": 24,
        "pooled_projection_dim": 20,
        "guidance_embeds": True,
    },
    "HunyuanImageTransformer2DModel": {
        **_HEADS,
        **_TWO_LISTS,
        "in_channels": 4,
        "out_channels": 4,
        "num_refiner_layers": 1,
        "text_embed_dim": 24,
        "text_embed_2_dim": 12,
        "rope_axes_dim": (8, 8),
    },
    "HunyuanVideoTransformer3DModel": {
        **_HEADS,
        **_TWO_LISTS,
        "in_channels": 4,
        "out_channels": 4,
        "num_refiner_layers": 1,
        "text_embed_dim": 24,
        "pooled_projection_dim": 20,
        "rope_axes_dim": (4, 6, 6),
    },
    "Krea2Transformer2DModel": {
        **_HEADS,
        **_ROPE,
        "in_channels": 16,
        "num_layers": 4,
        "num_key_value_heads": 1,
        "intermediate_size": 48,
        "timestep_embed_dim": 12,
        "text_hidden_dim": 24,
        "num_text_layers": 2,
        "text_num_attention_heads": 2,
        "text_num_key_value_heads": 2,
        "text_intermediate_size": 20,
        "num_layerwise_text_blocks": 1,
        "num_refiner_text_blocks": 1,
    },
    "LTXVideoTransformer3DModel": {
        **_HEADS,
        "in_channels": 8,
        "out_channels": 8,
        "num_layers": 4,
        "cross_attention_dim": 32,
        "caption_channels": 24,
    },
    "LongCatImageTransformer2DModel": {
        **_HEADS,
        **_TWO_LISTS,
        **_ROPE,
        "in_channels": 64,
        "joint_attention_dim": 32,
        "pooled_projection_dim": 24,
    },
    "Lumina2Transformer2DModel": {
        "in_channels": 4,
        "hidden_size": 32,
        "num_layers": 4,
        "num_refiner_layers": 1,
        "num_attention_heads": 2,
        "num_kv_heads": 1,
        "multiple_of": 8,
        "axes_dim_rope": (4, 6, 6),
        "axes_lens": (32, 16, 16),
        "cap_feat_dim": 24,
    },
    "OvisImageTransformer2DModel": {
        **_HEADS,
        **_TWO_LISTS,
        **_ROPE,
        "in_channels": 16,
        "out_channels": 16,
        "joint_attention_dim": 24,
    },
    "QwenImage21Transformer2DModel": {
        **_HEADS,
        **_ROPE,
        "in_channels": 16,
        "out_channels": 16,
        "num_layers": 4,
        "context_in_dim": 24,
    },
    "QwenImageTransformer2DModel": {
        **_HEADS,
        **_ROPE,
        "in_channels": 16,
        "out_channels": 4,
        "num_layers": 4,
        "joint_attention_dim": 24,
    },
    "SD3Transformer2DModel": {
        **_HEADS,
        "sample_size": 8,
        "in_channels": 4,
        "out_channels": 4,
        "num_layers": 5,
        "joint_attention_dim": 24,
        "caption_projection_dim": 32,
        "pooled_projection_dim": 20,
        "pos_embed_max_size": 8,
        "dual_attention_layers": (0, 1),
        "qk_norm": "rms_norm",
    },
    "WanTransformer3DModel": {
        **_HEADS,
        "in_channels": 4,
        "out_channels": 4,
        "text_dim": 24,
        "freq_dim": 16,
        "ffn_dim": 48,
        "num_layers": 4,
        "rope_max_seq_len": 32,
    },
    "ZImageTransformer2DModel": {
        "in_channels": 4,
        "dim": 32,
        "n_layers": 4,
        "n_refiner_layers": 1,
        "n_heads": 2,
        "n_kv_heads": 2,
        "cap_feat_dim": 24,
        "axes_dims": [4, 6, 6],
        "axes_lens": [64, 16, 16],
    },
}
FAMILIES = [record.transformer for record in records()]


def transformer(name: str, seed: int = 0) -> Any:
    torch.manual_seed(seed)
    model = randomised(getattr(diffusers, name)(**CONFIGS[name]), seed)
    generator = torch.Generator().manual_seed(seed + 1)
    for parameter_name, p in model.named_parameters():
        # Tables of modulations and the like, which a new model has at zero.
        if p.ndim < 2 or "table" in parameter_name or "token" in parameter_name:
            with torch.no_grad():
                p.add_(torch.randn(p.shape, generator=generator) * 0.1)
    return model


def inputs(model: nn.Module, samples: int = 2, text: int = 6, seed: int = 0) -> dict[str, Any]:
    """Arguments of one call: those of the record's example, with random numbers."""
    record: Any = adapter_of(model)
    generator = torch.Generator().manual_seed(seed)

    def filled(name: str, value: Any) -> Any:
        if isinstance(value, list):
            return [filled(name, x) for x in value]
        if not torch.is_tensor(value) or not value.is_floating_point():
            return value
        if name == record.timestep:
            return torch.rand(value.shape, generator=generator) * record.timestep_scale
        return torch.randn(value.shape, generator=generator)

    call = record.example(record_config(model), samples, (4, 4), text)
    return {name: filled(name, value) for name, value in call.items()}


def record_config(model: Any) -> Any:
    return model.config
