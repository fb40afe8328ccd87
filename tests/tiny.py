"""Tiny real models of every supported family, with random weights: what the tests run on."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from diffusers import (
    AutoencoderKL,
    AutoencoderKLQwenImage,
    FlowMatchEulerDiscreteScheduler,
    FluxPipeline,
    FluxTransformer2DModel,
    QwenImagePipeline,
    QwenImageTransformer2DModel,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
)
from torch import nn
from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    CLIPTokenizer,
    T5Config,
    T5EncoderModel,
    T5Tokenizer,
)

from ppcl.demo import text

Z_DIM = 4


def randomised(model: nn.Module, seed: int) -> nn.Module:
    """Weights large enough that every block does something, drawn from the seed."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if p.ndim > 1:
                p.copy_(torch.randn(p.shape, generator=generator) * (0.5 / p[0].numel() ** 0.5))
            elif name.endswith("bias"):
                p.copy_(torch.randn(p.shape, generator=generator) * 0.1)
    return model.eval().requires_grad_(False)


def aligned(model: Any) -> Any:
    """A model or pipeline with copies of its weights, for comparisons of bits.

    Sums on a CPU round by where numbers lie in memory: at other places in a mapped file than in a copy.
    """
    components = model.components.values() if hasattr(model, "components") else (model,)
    for module in components:
        for tensor in (*module.parameters(), *module.buffers()) if isinstance(module, nn.Module) else ():
            tensor.data = tensor.data.clone()
    return model


def qwen_transformer(blocks: int = 6, seed: int = 0) -> QwenImageTransformer2DModel:
    """Width 32."""
    model = QwenImageTransformer2DModel(
        patch_size=2,
        in_channels=4 * Z_DIM,
        out_channels=Z_DIM,
        num_layers=blocks,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=text.WIDTH,
        axes_dims_rope=(4, 6, 6),
    )
    return randomised(model, seed)


def flux_transformer(double: int = 3, single: int = 4, seed: int = 0) -> FluxTransformer2DModel:
    """Width 32; blocks 0..double-1 are double-stream, the rest single-stream."""
    model = FluxTransformer2DModel(
        patch_size=1,
        in_channels=16,
        num_layers=double,
        num_single_layers=single,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=24,
        pooled_projection_dim=20,
        guidance_embeds=True,
        axes_dims_rope=(4, 6, 6),
    )
    return randomised(model, seed)


def sd3_transformer(blocks: int = 5, seed: int = 0) -> SD3Transformer2DModel:
    """Width 32, SD3.5-like: dual attention in the first two blocks, a last block without text output."""
    model = SD3Transformer2DModel(
        sample_size=8,
        patch_size=2,
        in_channels=4,
        num_layers=blocks,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=24,
        caption_projection_dim=32,
        pooled_projection_dim=20,
        out_channels=4,
        pos_embed_max_size=8,
        dual_attention_layers=(0, 1),
        qk_norm="rms_norm",
    )
    return randomised(model, seed)


def inputs(model: nn.Module, batch: int = 3, seed: int = 0) -> dict[str, Any]:
    """Arguments of one call of a tiny transformer; Qwen-Image's prompts have different lengths, with a mask."""
    g = torch.Generator().manual_seed(seed)
    t = torch.rand(batch, generator=g)
    if isinstance(model, QwenImageTransformer2DModel):
        mask = torch.ones(batch, 7, dtype=torch.long)
        mask[0, 5:] = 0
        return {
            "hidden_states": torch.randn(batch, 16, 4 * Z_DIM, generator=g),
            "timestep": t,
            "encoder_hidden_states": torch.randn(batch, 7, text.WIDTH, generator=g) * mask[..., None],
            "encoder_hidden_states_mask": mask,
            "img_shapes": [[(1, 4, 4)]] * batch,
        }
    if isinstance(model, FluxTransformer2DModel):
        rows, columns = torch.meshgrid(torch.arange(4), torch.arange(4), indexing="ij")
        return {
            "hidden_states": torch.randn(batch, 16, 16, generator=g),
            "timestep": t,
            "guidance": torch.full((batch,), 3.5),
            "encoder_hidden_states": torch.randn(batch, 6, 24, generator=g),
            "pooled_projections": torch.randn(batch, 20, generator=g),
            "img_ids": torch.stack([0 * rows, rows, columns], -1).reshape(16, 3).float(),
            "txt_ids": torch.zeros(6, 3),
        }
    return {
        "hidden_states": torch.randn(batch, 4, 8, 8, generator=g),
        "timestep": t * 1000,
        "encoder_hidden_states": torch.randn(batch, 6, 24, generator=g),
        "pooled_projections": torch.randn(batch, 20, generator=g),
    }


def qwen_pipeline(folder: Path, blocks: int = 6, seed: int = 0) -> Path:
    """A stock QwenImagePipeline folder: pictures of 32 × 32 (factor 4), captions of the shapes world."""
    torch.manual_seed(seed)
    vae = AutoencoderKLQwenImage(
        base_dim=8,
        z_dim=Z_DIM,
        dim_mult=[1, 1, 1],
        num_res_blocks=1,
        temperal_downsample=[False, False],
        latents_mean=[0.0] * Z_DIM,
        latents_std=[1.0] * Z_DIM,
    )
    tokenizer = text.new_tokenizer()
    pipeline = QwenImagePipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(),
        vae=vae,
        text_encoder=text.new_text_encoder(len(tokenizer), seed),
        tokenizer=tokenizer,
        transformer=qwen_transformer(blocks, seed),
    )
    pipeline.save_pretrained(folder)
    return folder


def _autoencoder(channels: int = 4) -> AutoencoderKL:
    """`channels` latent ones, factor 2."""
    torch.manual_seed(0)
    return AutoencoderKL(
        block_out_channels=(4, 4),
        layers_per_block=1,
        latent_channels=channels,
        norm_num_groups=2,
        sample_size=16,
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        scaling_factor=1.5,
        shift_factor=0.1,
    ).eval()


def _clip(width: int, projected: bool, seed: int, length: int = 16) -> tuple[CLIPTextModel, CLIPTokenizer]:
    """A CLIP text encoder over single letters, which takes `length` of them."""
    letters = [f"{chr(97 + i)}{end}" for i in range(26) for end in ("", "</w>")]
    vocabulary = {token: i for i, token in enumerate([*letters, "<|startoftext|>", "<|endoftext|>"])}
    tokenizer = CLIPTokenizer(vocab=vocabulary, merges=[], model_max_length=length)
    config = CLIPTextConfig(
        vocab_size=len(vocabulary),
        hidden_size=width,
        intermediate_size=2 * width,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=length,
        projection_dim=width,
        bos_token_id=len(letters),
        eos_token_id=len(letters) + 1,
        pad_token_id=len(letters) + 1,
    )
    torch.manual_seed(seed)
    return (CLIPTextModelWithProjection if projected else CLIPTextModel)(config).eval(), tokenizer


def _t5(width: int, seed: int) -> tuple[T5EncoderModel, T5Tokenizer]:
    pieces = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("▁", -1.0), *((chr(97 + i), -2.0) for i in range(26))]
    tokenizer = T5Tokenizer(vocab=pieces, extra_ids=0)
    config = T5Config(vocab_size=len(pieces), d_model=width, d_kv=8, d_ff=2 * width, num_layers=1, num_heads=2)
    torch.manual_seed(seed)
    return T5EncoderModel(config).eval(), tokenizer


def flux_pipeline(folder: Path, double: int = 4, single: int = 6, seed: int = 0) -> Path:
    """A stock FluxPipeline folder with both text encoders: pictures of 16 × 16."""
    clip, clip_tokenizer = _clip(20, False, seed)
    t5, t5_tokenizer = _t5(24, seed)
    FluxPipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(),
        vae=_autoencoder(),
        text_encoder=clip,
        tokenizer=clip_tokenizer,
        text_encoder_2=t5,
        tokenizer_2=t5_tokenizer,
        transformer=flux_transformer(double, single, seed),
    ).save_pretrained(folder)
    return folder


def sd3_pipeline(folder: Path, blocks: int = 6, seed: int = 0) -> Path:
    """A stock StableDiffusion3Pipeline folder with all three text encoders: pictures of 16 × 16."""
    (one, tokenizer), (two, tokenizer_2) = _clip(10, True, seed), _clip(10, True, seed + 1)
    t5, t5_tokenizer = _t5(24, seed)
    StableDiffusion3Pipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(),
        vae=_autoencoder(),
        text_encoder=one,
        tokenizer=tokenizer,
        text_encoder_2=two,
        tokenizer_2=tokenizer_2,
        text_encoder_3=t5,
        tokenizer_3=t5_tokenizer,
        transformer=sd3_transformer(blocks, seed),
    ).save_pretrained(folder)
    return folder
