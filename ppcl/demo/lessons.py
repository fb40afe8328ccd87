"""What a demo teacher learns from: the world's scenes, or the velocities of a teacher that has learnt already.

A lesson gives a batch by the number of its step alone, so that a run that goes on sees the batches an undisturbed one
would have seen.
"""

from __future__ import annotations

import json
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from diffusers import AutoencoderKLQwenImage, QwenImagePipeline
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from ppcl.demo import text, world
from ppcl.demo.train_vae import Z_DIM, scenes, single_frame_convolutions, to_unit
from ppcl.storage.atomic import replacing

GRID = [(1, 4, 4)]  # the latent 8 × 8 in patches of 2
TEXT_LENGTH = 15  # tokens of the longest caption, template included
UNCONDITIONAL_SHARE = 0.05
UNCONDITIONAL = " "  # the caption of a sample without one
# Scenes of these come more often: they are learnt last.
CATEGORY_WEIGHT = {"position": 3.0, "counting": 2.0}


@dataclass(frozen=True)
class Batch:
    """Samples to learn from: packed latents `noisy (B, 16, 32)` at times `t (B,)`, and the velocity to give, `target`.

    `captions (B,)`: the number of each sample's caption in the lesson's `vocabulary`. `guidance (B,)`: the scale of
    the guidance that is in the target.
    """

    noisy: torch.Tensor
    t: torch.Tensor
    captions: torch.Tensor
    target: torch.Tensor
    guidance: torch.Tensor


class Lesson(Protocol):
    vocabulary: list[str]

    def batch(self, step: int, count: int) -> Batch: ...


@torch.no_grad()
def encode_pictures(vae: AutoencoderKLQwenImage, pictures: torch.Tensor, device: str) -> torch.Tensor:
    """Normalised, packed latents `(n, 16, 32)` of pictures `(n, 3, 64, 64)` uint8."""
    mean = torch.tensor(vae.config.latents_mean).view(1, -1, 1, 1, 1).to(device)
    std = torch.tensor(vae.config.latents_std).view(1, -1, 1, 1, 1).to(device)
    packed = []
    with single_frame_convolutions():
        for index, chunk in enumerate(pictures.split(64)):
            z = (vae.encode(to_unit(chunk).to(device)).latent_dist.mode() - mean) / std
            packed.append(QwenImagePipeline._pack_latents(z, len(z), Z_DIM, 8, 8).cpu())
            if index % 100 == 0:
                print(f"encoded {index * 64}/{len(pictures)} scenes", flush=True)
    return torch.cat(packed)


class Scenes:
    """The world itself: `x_t = (1 - t) x + t e`, target `e - x` (rectified flow, Liu et al. 2022, arXiv 2209.03003).

    The latents `(n, 16, 32)` of `count` scenes are computed once and kept in the folder `work`.
    """

    def __init__(self, vae: AutoencoderKLQwenImage, count: int, seed: int, work: Path, device: str):
        cache = work / "latents.safetensors"
        if not cache.exists():
            pictures, texts = scenes(count, np.random.default_rng(seed))
            save_file({"latents": encode_pictures(vae, pictures, device)}, cache, metadata={"texts": json.dumps(texts)})
        with safe_open(cache, "pt") as file:
            latents, texts = file.get_tensor("latents"), json.loads(file.metadata()["texts"])
        self.seed, self.device = seed, device
        self.vocabulary = [*sorted(set(texts)), UNCONDITIONAL]
        number = {caption: index for index, caption in enumerate(self.vocabulary)}
        category = {caption.text: caption.category for caption in world.captions()}
        self.latents = latents.to(device)
        self.captions = torch.tensor([number[caption] for caption in texts], device=device)
        self.weights = torch.tensor([CATEGORY_WEIGHT.get(category[caption], 1.0) for caption in texts])

    def batch(self, step: int, count: int) -> Batch:
        return self.drawn(torch.Generator().manual_seed(self.seed * 1_000_003 + step), count)

    def drawn(self, generator: torch.Generator, count: int) -> Batch:
        """`count` samples from a generator."""
        rows = torch.multinomial(self.weights, count, replacement=True, generator=generator).to(self.device)
        noise = torch.randn(count, *self.latents.shape[1:], generator=generator).to(self.device)
        # What an image shows is settled at high noise: learn there more.
        t = torch.sigmoid(0.6 + 1.2 * torch.randn(count, generator=generator)).to(self.device)
        drop = torch.rand(count, generator=generator).to(self.device) < UNCONDITIONAL_SHARE
        clean = self.latents[rows]
        return Batch(
            noisy=(1 - t)[:, None, None] * clean + t[:, None, None] * noise,
            t=t,
            captions=torch.where(drop, len(self.vocabulary) - 1, self.captions[rows]),
            target=noise - clean,
            guidance=torch.ones(count, device=self.device),
        )


class Velocities:
    """What a trained teacher answers: its guided velocity, which is without noise, so that less steps are needed.

    The target is `u + g (c - u)` of the teacher's velocities with and without the caption, and `g` is drawn anew for
    each sample: guidance distillation (Meng et al. 2023, arXiv 2210.03142). Both velocities of `count` samples are
    computed once and kept in the folder `work`, in bfloat16.
    """

    def __init__(
        self, pipeline: QwenImagePipeline, scenes: Scenes, count: int, guidance: tuple[float, float], work: Path
    ):
        self.vocabulary, self.seed, self.guidance = scenes.vocabulary, scenes.seed, guidance
        cache = work / "velocities.safetensors"
        if not cache.exists():
            tensors = _answers(pipeline, scenes, count)
            with replacing(cache) as partial:
                save_file(tensors, partial)
        self.samples = load_file(cache, device=scenes.device)
        self.device = scenes.device

    def batch(self, step: int, count: int) -> Batch:
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + step)
        s = self.samples
        rows = torch.randint(len(s["t"]), (count,), generator=generator).to(self.device)
        low, high = self.guidance
        guidance = (low + (high - low) * torch.rand(count, generator=generator)).to(self.device)
        without = s["without"][rows].float()
        target = without + guidance[:, None, None] * (s["conditional"][rows].float() - without)
        drop = torch.rand(count, generator=generator).to(self.device) < UNCONDITIONAL_SHARE
        return Batch(
            noisy=s["noisy"][rows].float(),
            t=s["t"][rows],
            captions=torch.where(drop, len(self.vocabulary) - 1, s["captions"][rows]),
            target=torch.where(drop[:, None, None], without, target),
            guidance=guidance,
        )


@torch.no_grad()
def _answers(pipeline: QwenImagePipeline, scenes: Scenes, count: int) -> dict[str, torch.Tensor]:
    """Noisy latents of the scenes, and the teacher's velocities for them."""
    embeddings, masks = text.encode(pipeline, scenes.vocabulary, TEXT_LENGTH)
    embeddings, masks = embeddings.to(scenes.device), masks.to(scenes.device)
    transformer = pipeline.transformer.to(scenes.device).eval()
    generator = torch.Generator().manual_seed(scenes.seed + 1)
    kept: dict[str, list[torch.Tensor]] = {}
    started_at, size = time.monotonic(), 128
    for start in range(0, count, size):
        batch = scenes.drawn(generator, min(size, count - start))
        # What is kept is what is answered.
        noisy = batch.noisy.bfloat16()
        given: dict[str, Any] = {"hidden_states": noisy.float(), "timestep": batch.t, "return_dict": False}
        given["img_shapes"] = [GRID] * len(batch.t)
        empty = torch.full_like(batch.captions, len(scenes.vocabulary) - 1)
        conditional, without = (
            transformer(encoder_hidden_states=embeddings[index], encoder_hidden_states_mask=masks[index], **given)[0]
            for index in (batch.captions, empty)
        )
        made = {"noisy": noisy, "conditional": conditional, "without": without}
        made = {name: value.bfloat16().cpu() for name, value in made.items()}
        for name, value in (made | {"t": batch.t.cpu(), "captions": batch.captions.cpu()}).items():
            kept.setdefault(name, []).append(value)
        if start // size % 50 == 0:
            done = start + len(batch.t)
            left = (time.monotonic() - started_at) / done * (count - done) / 60
            print(f"velocities of {done}/{count} samples, {left:.0f} min left", flush=True)
    return {name: torch.cat(values) for name, values in kept.items()}
