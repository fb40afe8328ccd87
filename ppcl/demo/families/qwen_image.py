"""The demo's Qwen-Image: 16 blocks of width 96."""

from __future__ import annotations

from pathlib import Path

import torch
from diffusers import (
    AutoencoderKLQwenImage,
    FlowMatchEulerDiscreteScheduler,
    QwenImagePipeline,
    QwenImageTransformer2DModel,
)

from ppcl.demo import text
from ppcl.demo.families.family import SHIFT, Family, zero
from ppcl.demo.lessons import GRID, TEXT_LENGTH, Batch
from ppcl.demo.train_vae import Z_DIM


class QwenImage(Family):
    def __init__(self, vae: Path, seed: int):
        model = self.transformer = QwenImageTransformer2DModel(
            patch_size=2,
            in_channels=4 * Z_DIM,
            out_channels=Z_DIM,
            num_layers=16,
            attention_head_dim=24,
            num_attention_heads=4,
            joint_attention_dim=text.WIDTH,
            axes_dims_rope=(8, 8, 8),
        )
        zero(model, ("img_mod.1", "txt_mod.1"))
        tokenizer = text.new_tokenizer()
        self.pipeline = QwenImagePipeline(
            scheduler=FlowMatchEulerDiscreteScheduler(shift=SHIFT),
            vae=AutoencoderKLQwenImage.from_pretrained(vae).eval(),
            text_encoder=text.new_text_encoder(len(tokenizer), seed),
            tokenizer=tokenizer,
            transformer=self.transformer,
        )

    def encode(self, captions: list[str]) -> dict[str, torch.Tensor]:
        embeddings, masks = text.encode(self.pipeline, captions, TEXT_LENGTH)
        return {"encoder_hidden_states": embeddings, "encoder_hidden_states_mask": masks}

    def velocity(self, batch: Batch) -> torch.Tensor:
        return self.transformer(
            hidden_states=batch.noisy,
            timestep=batch.t,
            img_shapes=[GRID] * len(batch.t),
            return_dict=False,
            **self.of(batch.captions),
        )[0]
