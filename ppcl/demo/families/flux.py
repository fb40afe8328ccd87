"""The demo's FLUX.1: 4 double-stream and 10 single-stream blocks of width 96, guided by an embedding as FLUX.1-dev."""

from __future__ import annotations

from pathlib import Path

import torch
from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler, FluxPipeline, FluxTransformer2DModel

from ppcl.demo import text_encoders
from ppcl.demo.families.family import SHIFT, Family, zero
from ppcl.demo.lessons import Batch
from ppcl.demo.text import WIDTH
from ppcl.demo.train_vae import Z_DIM


class Flux(Family):
    def __init__(self, vae: Path, seed: int):
        model = self.transformer = FluxTransformer2DModel(
            patch_size=1,
            in_channels=4 * Z_DIM,
            num_layers=4,
            num_single_layers=10,
            attention_head_dim=24,
            num_attention_heads=4,
            joint_attention_dim=WIDTH,
            pooled_projection_dim=WIDTH,
            guidance_embeds=True,
            axes_dims_rope=(8, 8, 8),
        )
        zero(model, ("norm1.linear", "norm1_context.linear", "norm.linear"))
        tokenizer, tokenizer_2 = text_encoders.clip_tokenizer(), text_encoders.t5_tokenizer()
        self.pipeline = FluxPipeline(
            scheduler=FlowMatchEulerDiscreteScheduler(shift=SHIFT),
            vae=AutoencoderKL.from_pretrained(vae).eval(),
            text_encoder=text_encoders.clip(tokenizer, WIDTH, projected=False, seed=seed),
            tokenizer=tokenizer,
            text_encoder_2=text_encoders.t5(tokenizer_2, WIDTH, seed),
            tokenizer_2=tokenizer_2,
            transformer=self.transformer,
        )

    def encode(self, captions: list[str]) -> dict[str, torch.Tensor]:
        embeddings, pooled, _ = self.pipeline.encode_prompt(captions, None, max_sequence_length=text_encoders.TOKENS)
        return {"encoder_hidden_states": embeddings, "pooled_projections": pooled}

    def velocity(self, batch: Batch) -> torch.Tensor:
        given = self.of(batch.captions)
        device = batch.noisy.device
        return self.transformer(
            hidden_states=batch.noisy,
            timestep=batch.t,
            guidance=batch.guidance,
            img_ids=FluxPipeline._prepare_latent_image_ids(len(batch.t), 4, 4, device, torch.float32),
            txt_ids=torch.zeros(given["encoder_hidden_states"].shape[1], 3, device=device),
            return_dict=False,
            **given,
        )[0]
