"""States of images: VAE latents, noised along the straight path of rectified flow to the levels of the sampler."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import torch
from PIL import Image, UnidentifiedImageError
from torch import nn

from ppcl.calibration.encoding import Embedding, EncodedPrompts, collate, pipeline_arguments
from ppcl.calibration.seeding import generator, strata
from ppcl.calibration.trajectory_recorder import Call, State, StateSettings, call_of, check_arguments, sigmas_of
from ppcl.config.schema import Sampling
from ppcl.errors import UserError
from ppcl.models import ModelAdapter
from ppcl.storage.mirror import local_file


def noised(latents: torch.Tensor, noise: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
    """`x_t = (1 - t) x + t e`: at `t` 0 the image, at 1 noise. Shapes `(B, ...)`, `(B, ...)`, `(B,)`."""
    t = t.reshape(-1, *[1] * (latents.ndim - 1)).to(latents)
    return (1 - t) * latents + t * noise


@torch.no_grad()
def image_latents(pipeline: Any, adapter: ModelAdapter, images: Sequence[str], sampling: Sampling) -> torch.Tensor:
    """Encode images to latents as the transformer takes them: the VAE's mean, normalised and packed as by the pipeline.

    Images are scaled and cropped to the sampling's size. Raises `UserError` for one that cannot be read.
    """
    vae = pipeline.vae
    pixels = pipeline.image_processor.preprocess(
        [_open(path) for path in images], sampling.height, sampling.width, resize_mode="crop"
    ).to(vae.device, vae.dtype)
    config = vae.config
    if hasattr(vae, "bn"):
        raise UserError(
            f"calibration.source is images, but the VAE of {type(pipeline).__name__} normalises latents in a way that "
            "ppcl does not know; set calibration.source to trajectories"
        )
    if getattr(config, "latents_mean", None) is not None:
        # The VAE of Qwen-Image is one of videos: an image is a clip of one frame, normalised by channel.
        latents = vae.encode(pixels[:, :, None]).latent_dist.mode()
        mean, std = (
            torch.tensor(v).view(1, -1, 1, 1, 1).to(latents) for v in (config.latents_mean, config.latents_std)
        )
        latents = ((latents - mean) / std)[:, :, 0]
    else:
        latents = vae.encode(pixels).latent_dist.mode()
        latents = (latents - (getattr(config, "shift_factor", None) or 0.0)) * config.scaling_factor
    if adapter.packed_latents:
        latents = pipeline._pack_latents(latents, *latents.shape)
    return latents


def noise_images(
    pipeline: Any,
    adapter: ModelAdapter,
    prompts: EncodedPrompts,
    images: Sequence[str],
    transformer_config: Mapping[str, Any],
    settings: StateSettings,
) -> tuple[list[State], Call]:
    """`states_per_prompt` noised latents of each image; noise and timestep depend on (seed, prompt id, slot) alone.

    Noise levels are those of the sampler's own schedule: a teacher distilled for few steps is defined on no others.
    `images`: their paths or URLs, one per prompt. `pipeline` needs no transformer, only `transformer_config`: a
    stand-in receives the pipeline's call. Raises `UserError` for an image that cannot be read or a size that does not
    fit the pipeline.
    """
    sampling, seed = settings.sampling, settings.seed
    call, shape = _first_call(pipeline, adapter, prompts.embeddings[0], transformer_config, sampling)
    latents = image_latents(pipeline, adapter, images, sampling).cpu()
    if latents.shape[1:] != shape:
        raise UserError(
            f"an image of {sampling.height} x {sampling.width} gives latents {tuple(latents.shape[1:])}, the pipeline "
            f"takes {tuple(shape)}; set sampling.height and sampling.width to multiples of what its VAE and patches "
            "need"
        )
    states = []
    for prompt_id, picture in zip(prompts.ids, latents, strict=True):
        for slot, position in enumerate(strata(seed, prompt_id, settings.states_per_prompt)):
            step = int(position * len(call.timesteps))
            noise = torch.randn(shape, generator=generator("noise", seed, prompt_id, slot)).to(picture)
            states.append(
                State(
                    sample_id=settings.sample_id(prompt_id, slot),
                    prompt_id=prompt_id,
                    embedding_id=prompt_id,
                    timestep=call.timesteps[step],
                    latents=noised(picture[None], noise[None], torch.tensor([call.sigmas[step]]))[0],
                )
            )
    return states, call


def _open(path: str) -> Image.Image:
    try:
        return Image.open(local_file(path)).convert("RGB")
    except (OSError, UnidentifiedImageError, Image.DecompressionBombError) as error:
        raise UserError(
            f"the image {path} cannot be read ({error}); replace it or take it out of the prompt file"
        ) from None


class _Called(Exception):
    """Ends the pipeline's call at the call of its transformer."""


class _StandIn(nn.Module):
    """A transformer without weights: it has the configuration, device and type, and keeps the arguments of its call."""

    def __init__(self, config: Mapping[str, Any], device: torch.device, dtype: torch.dtype):
        super().__init__()
        self.config, self.device, self.dtype = SimpleNamespace(**config), device, dtype
        self.arguments: dict[str, Any] = {}

    def cache_context(self, name: str) -> Any:
        return torch.no_grad()

    def forward(self, **arguments: Any) -> None:
        self.arguments = arguments
        raise _Called


def _first_call(
    pipeline: Any,
    adapter: ModelAdapter,
    embedding: Embedding,
    transformer_config: Mapping[str, Any],
    sampling: Sampling,
) -> tuple[Call, torch.Size]:
    """The shared arguments of the pipeline's transformer calls, and the shape of one sample's latents."""
    check_arguments(type(pipeline), sampling)
    device = pipeline.vae.device
    own = pipeline.transformer
    stand_in = _StandIn(transformer_config, device, pipeline.vae.dtype)
    pipeline.transformer = stand_in
    arguments = pipeline_arguments(collate([embedding], adapter), str(device))
    ignored = ("negative_prompt", "true_cfg_scale")
    try:
        pipeline(
            **{k: v for k, v in sampling.arguments.items() if k not in ignored},
            **arguments,
            height=sampling.height,
            width=sampling.width,
            num_inference_steps=sampling.steps,
            generator=generator("first call"),
            output_type="latent",
        )
    except _Called:
        pass
    finally:
        pipeline.transformer = own
    scheduler = pipeline.scheduler
    scale = adapter.timestep_scale / scheduler.config.num_train_timesteps
    timesteps = [timestep.item() * scale for timestep in scheduler.timesteps.double()]
    call = replace(call_of(adapter, stand_in.arguments), timesteps=timesteps, sigmas=sigmas_of(pipeline))
    return call, stand_in.arguments[adapter.latents].shape[1:]
