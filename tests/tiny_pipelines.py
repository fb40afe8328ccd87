"""Tiny stock pipelines of the families of `tests.tiny_families`, with random text encoders of the kind they have."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import diffusers
import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from PIL import Image
from transformers import (
    Gemma2Config,
    Gemma2Model,
    GlmConfig,
    GlmModel,
    LlamaConfig,
    LlamaModel,
    Qwen3Config,
    Qwen3ForCausalLM,
    Qwen3Model,
    UMT5Config,
    UMT5EncoderModel,
)

from ppcl.demo import text
from tests import tiny, tiny_families

WIDTH = 24
_TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n"
    "{% if m['content'] is string %}{{ m['content'] }}{% else %}{{ m['content'][0]['text'] }}{% endif %}"
    "<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


@cache
def _tokenizer() -> Any:
    """A byte-level BPE with a chat template."""
    tokenizer = text.new_tokenizer()
    tokenizer.chat_template = _TEMPLATE
    return tokenizer


def _language_model(config_class: Any, model_class: Any, width: int = WIDTH, layers: int = 2) -> Any:
    """A decoder of a few layers over the tokenizer's words."""
    torch.manual_seed(0)
    config = config_class(
        vocab_size=len(_tokenizer()),
        hidden_size=width,
        intermediate_size=2 * width,
        num_hidden_layers=layers,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=8,
        max_position_embeddings=1024,
        pad_token_id=0,
        bos_token_id=0,
        eos_token_id=0,
    )
    return model_class(config).eval()


def _umt5() -> tuple[Any, Any]:
    _, tokenizer = tiny._t5(WIDTH, 0)
    torch.manual_seed(0)
    config = UMT5Config(vocab_size=len(tokenizer), d_model=WIDTH, d_kv=8, d_ff=2 * WIDTH, num_layers=1, num_heads=2)
    return UMT5EncoderModel(config).eval(), tokenizer


def _flux2_vae() -> Any:
    torch.manual_seed(0)
    return diffusers.AutoencoderKLFlux2(
        block_out_channels=(4, 4),
        layers_per_block=1,
        latent_channels=4,
        norm_num_groups=2,
        sample_size=16,
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
    ).eval()


def _parts(transformer: str, **others: Any) -> dict[str, Any]:
    return {
        "transformer": tiny_families.transformer(transformer),
        "scheduler": FlowMatchEulerDiscreteScheduler(),
        "vae": tiny._autoencoder(),
        **others,
    }


def _t5_of(pipeline: str, transformer: str) -> Any:
    encoder, tokenizer = tiny._t5(WIDTH, 0)
    return getattr(diffusers, pipeline)(**_parts(transformer, text_encoder=encoder, tokenizer=tokenizer))


def _aura_flow() -> Any:
    encoder, tokenizer = _umt5()
    parts = _parts("AuraFlowTransformer2DModel", text_encoder=encoder, tokenizer=tokenizer)
    return diffusers.AuraFlowPipeline(**parts)


def _wan() -> Any:
    encoder, tokenizer = _umt5()
    torch.manual_seed(0)
    vae = diffusers.AutoencoderKLWan(
        base_dim=4,
        z_dim=4,
        dim_mult=[1, 1],
        num_res_blocks=1,
        temperal_downsample=[False],
        latents_mean=[0.0] * 4,
        latents_std=[1.0] * 4,
        scale_factor_spatial=2,
        scale_factor_temporal=1,
    ).eval()
    parts = _parts("WanTransformer3DModel", text_encoder=encoder, tokenizer=tokenizer, vae=vae)
    return diffusers.WanPipeline(**parts)


def _klein() -> Any:
    encoder = _language_model(Qwen3Config, Qwen3ForCausalLM, width=8, layers=28)
    parts = _parts("Flux2Transformer2DModel", text_encoder=encoder, tokenizer=_tokenizer(), vae=_flux2_vae())
    return diffusers.Flux2KleinPipeline(**parts, is_distilled=True)


def _z_image() -> Any:
    encoder = _language_model(Qwen3Config, Qwen3Model)
    parts = _parts("ZImageTransformer2DModel", text_encoder=encoder, tokenizer=_tokenizer())
    return diffusers.ZImagePipeline(**parts)


def _ovis() -> Any:
    encoder = _language_model(Qwen3Config, Qwen3Model)
    parts = _parts("OvisImageTransformer2DModel", text_encoder=encoder, tokenizer=_tokenizer())
    return diffusers.OvisImagePipeline(**parts)


def _lumina() -> Any:
    encoder = _language_model(Gemma2Config, Gemma2Model)
    parts = _parts("Lumina2Transformer2DModel", text_encoder=encoder, tokenizer=_tokenizer())
    return diffusers.Lumina2Pipeline(**parts)


def _cogview4() -> Any:
    encoder = _language_model(GlmConfig, GlmModel)
    parts = _parts("CogView4Transformer2DModel", text_encoder=encoder, tokenizer=_tokenizer())
    return diffusers.CogView4Pipeline(**parts)


def _hunyuan_video() -> Any:
    clip, clip_tokenizer = tiny._clip(20, False, 0, length=77)
    encoder = _language_model(LlamaConfig, LlamaModel, layers=3)
    torch.manual_seed(0)
    vae = diffusers.AutoencoderKLHunyuanVideo(
        latent_channels=4,
        block_out_channels=(4, 4, 4, 4),
        layers_per_block=1,
        norm_num_groups=2,
        mid_block_add_attention=False,
    ).eval()
    parts = _parts(
        "HunyuanVideoTransformer3DModel",
        text_encoder=encoder,
        tokenizer=_tokenizer(),
        text_encoder_2=clip,
        tokenizer_2=clip_tokenizer,
        vae=vae,
    )
    return diffusers.HunyuanVideoPipeline(**parts)


def _ltx() -> Any:
    encoder, tokenizer = tiny._t5(WIDTH, 0)
    torch.manual_seed(0)
    vae = diffusers.AutoencoderKLLTXVideo(
        latent_channels=8,
        block_out_channels=(8, 8, 8, 8),
        decoder_block_out_channels=(8, 8, 8, 8),
        layers_per_block=(1, 1, 1, 1, 1),
        decoder_layers_per_block=(1, 1, 1, 1, 1),
        patch_size=1,
    ).eval()
    parts = _parts("LTXVideoTransformer3DModel", text_encoder=encoder, tokenizer=tokenizer, vae=vae)
    return diffusers.LTXPipeline(**parts)


def _qwen_vae() -> Any:
    torch.manual_seed(0)
    return diffusers.AutoencoderKLQwenImage(
        base_dim=8,
        z_dim=4,
        dim_mult=[1, 1, 1],
        num_res_blocks=1,
        temperal_downsample=[False, False],
        latents_mean=[0.0] * 4,
        latents_std=[1.0] * 4,
    ).eval()


def _hunyuan_image() -> Any:
    vae = diffusers.AutoencoderKLHunyuanImage(
        in_channels=3,
        out_channels=3,
        latent_channels=4,
        block_out_channels=(32, 32),
        layers_per_block=1,
        spatial_compression_ratio=2,
        sample_size=16,
        scaling_factor=1.0,
    ).eval()
    parts = _parts("HunyuanImageTransformer2DModel", vae=vae, text_encoder=None, tokenizer=None)
    return diffusers.HunyuanImagePipeline(**parts, text_encoder_2=None, tokenizer_2=None)


def _longcat() -> Any:
    encoder, vae = text.new_text_encoder(len(_tokenizer()), 0, width=32), tiny._autoencoder(16)
    parts = _parts("LongCatImageTransformer2DModel", tokenizer=_tokenizer(), text_encoder=encoder, vae=vae)
    return diffusers.LongCatImagePipeline(**parts, text_processor=None)


def _embedded(pipeline: str, transformer: str, vae: Any, *without: str) -> Any:
    """Without a text encoder: it is called with embeddings."""
    return getattr(diffusers, pipeline)(**{**_parts(transformer), "vae": vae, **dict.fromkeys(without)})


def _embeds(*shape: int, name: str = "prompt_embeds") -> dict[str, Any]:
    return {name: torch.randn(1, *shape, generator=torch.Generator().manual_seed(0))}


_MASK = {"prompt_embeds_mask": torch.ones(1, 6, dtype=torch.bool)}
_QWEN_TEXT = ("text_encoder", "tokenizer", "processor")
_TWO = {"height": 16, "width": 16, "num_inference_steps": 2}
_IMAGE = {"height": 16, "width": 16, "num_inference_steps": 2, "max_sequence_length": 8}
# By pipeline: what makes it, and the arguments of a call beside the prompt.
PIPELINES: dict[str, tuple[Callable[[], Any], dict[str, Any]]] = {
    "AuraFlowPipeline": (_aura_flow, _IMAGE),
    "BriaPipeline": (lambda: _t5_of("BriaPipeline", "BriaTransformer2DModel"), _IMAGE),
    "ChromaPipeline": (lambda: _t5_of("ChromaPipeline", "ChromaTransformer2DModel"), _IMAGE),
    "CogView4Pipeline": (_cogview4, {**_IMAGE, "guidance_scale": 1.0}),
    "Flux2KleinPipeline": (_klein, _IMAGE),
    "Flux2Pipeline": (
        lambda: _embedded("Flux2Pipeline", "Flux2Transformer2DModel", _flux2_vae(), "text_encoder", "tokenizer"),
        {**_TWO, **_embeds(6, WIDTH)},
    ),
    "HunyuanImagePipeline": (
        _hunyuan_image,
        {
            **_TWO,
            **_embeds(6, WIDTH),
            **_MASK,
            **_embeds(3, 12, name="prompt_embeds_2"),
            "prompt_embeds_mask_2": torch.ones(1, 3, dtype=torch.bool),
        },
    ),
    "Krea2Pipeline": (
        lambda: _embedded("Krea2Pipeline", "Krea2Transformer2DModel", _qwen_vae(), "text_encoder", "tokenizer"),
        {**_TWO, **_embeds(6, 2, WIDTH), **_MASK, "guidance_scale": 0.0},
    ),
    "LongCatImagePipeline": (_longcat, {**_TWO, "enable_prompt_rewrite": False, "guidance_scale": 1.0}),
    "QwenImageEditPipeline": (
        lambda: _embedded(
            "QwenImageEditPipeline",
            "QwenImageTransformer2DModel",
            _qwen_vae(),
            "text_encoder",
            "tokenizer",
            "processor",
        ),
        {**_TWO, **_embeds(6, WIDTH), **_MASK, "image": Image.new("RGB", (16, 16))},
    ),
    "QwenImageEditPlusPipeline": (
        lambda: _embedded(
            "QwenImageEditPlusPipeline",
            "QwenImageTransformer2DModel",
            _qwen_vae(),
            "text_encoder",
            "tokenizer",
            "processor",
        ),
        {**_TWO, **_embeds(6, WIDTH), **_MASK, "image": [Image.new("RGB", (16, 16))]},
    ),
    "HunyuanVideoPipeline": (_hunyuan_video, {**_IMAGE, "height": 64, "width": 64, "num_frames": 1}),
    "LTXPipeline": (_ltx, {**_IMAGE, "height": 32, "width": 32, "num_frames": 1}),
    "Lumina2Pipeline": (_lumina, _IMAGE),
    "OvisImagePipeline": (_ovis, _IMAGE),
    "WanPipeline": (_wan, {**_IMAGE, "num_frames": 1}),
    "ZImagePipeline": (_z_image, _IMAGE),
}
