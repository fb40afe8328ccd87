"""The demo's Stable Diffusion 3.5: 11 blocks of width 96, the first 2 of them with a second attention of the image."""

from __future__ import annotations

from pathlib import Path

import torch
from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler, SD3Transformer2DModel, StableDiffusion3Pipeline

from ppcl.demo import text_encoders
from ppcl.demo.families.family import SHIFT, Family, zero
from ppcl.demo.lessons import Batch
from ppcl.demo.text import WIDTH
from ppcl.demo.train_vae import Z_DIM


class SD3(Family):
    def __init__(self, vae: Path, seed: int):
        model = self.transformer = SD3Transformer2DModel(
            sample_size=8,
            patch_size=2,
            in_channels=Z_DIM,
            out_channels=Z_DIM,
            num_layers=11,
            attention_head_dim=24,
            num_attention_heads=4,
            joint_attention_dim=WIDTH,
            caption_projection_dim=96,
            pooled_projection_dim=WIDTH,
            pos_embed_max_size=8,
            dual_attention_layers=(0, 1),
            qk_norm="rms_norm",
        )
        zero(model, ("norm1.linear", "norm1_context.linear"))
        tokenizer = text_encoders.clip_tokenizer()
        tokenizer_3 = text_encoders.t5_tokenizer()
        one, two = (text_encoders.clip(tokenizer, WIDTH // 2, projected=True, seed=seed + n) for n in (0, 1))
        self.pipeline = StableDiffusion3Pipeline(
            scheduler=FlowMatchEulerDiscreteScheduler(shift=SHIFT),
            vae=AutoencoderKL.from_pretrained(vae).eval(),
            text_encoder=one,
            tokenizer=tokenizer,
            text_encoder_2=two,
            tokenizer_2=tokenizer,
            text_encoder_3=text_encoders.t5(tokenizer_3, WIDTH, seed),
            tokenizer_3=tokenizer_3,
            transformer=self.transformer,
        )

    def encode(self, captions: list[str]) -> dict[str, torch.Tensor]:
        embeddings, _, pooled, _ = self.pipeline.encode_prompt(
            captions, None, None, do_classifier_free_guidance=False, max_sequence_length=text_encoders.TOKENS
        )
        return {"encoder_hidden_states": embeddings, "pooled_projections": pooled}

    def velocity(self, batch: Batch) -> torch.Tensor:
        velocity = self.transformer(
            hidden_states=_unpacked(batch.noisy),
            timestep=1000 * batch.t,
            return_dict=False,
            **self.of(batch.captions),
        )[0]
        return _packed(velocity)


def _unpacked(tokens: torch.Tensor) -> torch.Tensor:
    """Tokens `(B, 16, 32)` as latents `(B, 8, 8, 8)`."""
    latents = tokens.view(-1, 4, 4, Z_DIM, 2, 2).permute(0, 3, 1, 4, 2, 5)
    return latents.reshape(-1, Z_DIM, 8, 8)


def _packed(latents: torch.Tensor) -> torch.Tensor:
    tokens = latents.view(-1, Z_DIM, 4, 2, 4, 2).permute(0, 2, 4, 1, 3, 5)
    return tokens.reshape(-1, 16, 4 * Z_DIM)
