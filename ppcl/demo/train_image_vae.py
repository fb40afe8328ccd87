"""Train the autoencoder of the FLUX.1 and SD3.5 demo teachers: a small stock `AutoencoderKL`.

    python -m ppcl.demo.train_image_vae --like demo/teacher/vae --output demo/checkpoints/image_vae

Their pipelines cannot take the first demo teacher's `AutoencoderKLQwenImage`. This one reads and writes the same
latents, normalised: its encoder learns the other's latents, its decoder learns to draw from them. So what one teacher
has learnt can be taught to another.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderKL, AutoencoderKLQwenImage

from ppcl.demo import world
from ppcl.demo.train_vae import Z_DIM, count_right, drawing_loss, scenes, single_frame_convolutions, to_unit

LATENT_NOISE = 0.05  # in standard deviations: the decoder meets sampled latents, which are not exact
LOG_VARIANCE = -8.0  # of the encoder's posterior: next to none


def new_vae() -> AutoencoderKL:
    levels = 4
    return AutoencoderKL(
        block_out_channels=(16, 32, 32, 32),
        down_block_types=("DownEncoderBlock2D",) * levels,
        up_block_types=("UpDecoderBlock2D",) * levels,
        layers_per_block=1,
        latent_channels=Z_DIM,
        norm_num_groups=8,
        sample_size=world.CANVAS,
        scaling_factor=1.0,
        shift_factor=0.0,
        use_quant_conv=False,
        use_post_quant_conv=False,
        mid_block_add_attention=False,
        force_upcast=False,
    )


@torch.no_grad()
def normalised_latents(vae: AutoencoderKLQwenImage, x: torch.Tensor) -> torch.Tensor:
    """The latents `(B, 8, 8, 8)` of pictures `(B, 3, 64, 64)` in [-1, 1], mean 0 and standard deviation 1."""
    mean = torch.tensor(vae.config.latents_mean).view(1, -1, 1, 1).to(x)
    std = torch.tensor(vae.config.latents_std).view(1, -1, 1, 1).to(x)
    with single_frame_convolutions():
        return (vae.encode(x.unsqueeze(2)).latent_dist.mode()[:, :, 0] - mean) / std


def loss_of(vae: AutoencoderKL, x: torch.Tensor, z: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The loss on pictures and their latents, and the mean error of a pixel."""
    posterior = vae.encode(x).latent_dist
    encoding = (posterior.mean - z).square().mean() + 1e-3 * (posterior.logvar - LOG_VARIANCE).square().mean()
    drawing, error = drawing_loss(vae.decode(z + LATENT_NOISE * torch.randn_like(z)).sample, x)
    return encoding + drawing, error


@torch.no_grad()
def share_right(vae: AutoencoderKL, seed: int, count: int = 600) -> float:
    """The share of held-out scenes whose reconstruction the checker finds right."""
    pictures, texts = scenes(count, np.random.default_rng(seed), held_out=True)
    right = 0
    for start in range(0, count, 50):
        x = to_unit(pictures[start : start + 50])[:, :, 0]
        right += count_right(vae.decode(vae.encode(x).latent_dist.mode()).sample, texts[start : start + 50])
    return right / count


def train(options: argparse.Namespace) -> None:
    torch.manual_seed(options.seed)
    rng = np.random.default_rng(options.seed)
    like = AutoencoderKLQwenImage.from_pretrained(options.like).eval()
    vae = new_vae()
    optimizer = torch.optim.AdamW(vae.parameters(), lr=options.learning_rate, betas=(0.9, 0.98), weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, options.learning_rate, total_steps=options.steps, pct_start=0.05
    )
    curve, started_at = [], time.monotonic()
    for step in range(options.steps):
        pictures = np.stack([world.render(world.board(rng)) for _ in range(options.batch)])
        x = to_unit(torch.from_numpy(pictures).permute(0, 3, 1, 2))[:, :, 0]
        loss, error = loss_of(vae, x, normalised_latents(like, x))
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(vae.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        if step % 20 == 0 or step == options.steps - 1:
            curve.append({"step": step, "loss": round(loss.item(), 5), "l1": round(error.item(), 5)})
            pace = (time.monotonic() - started_at) / (step + 1)
            left = pace * (options.steps - step - 1) / 60
            print(f"vae step {step}/{options.steps} {curve[-1]} {pace:.2f} s/step, {left:.0f} min left", flush=True)
    vae.eval()
    right = share_right(vae, options.seed + 1)
    vae.save_pretrained(options.output)
    record = {"seed": options.seed, "steps": options.steps, "batch": options.batch, "reconstructions_right": right}
    (options.output / "training.json").write_text(json.dumps(record | {"curve": curve}, indent=1))
    print(f"reconstructions that the checker finds right: {right:.3f}; written to {options.output}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--like", type=Path, required=True, help="the `AutoencoderKLQwenImage` whose latents it learns")
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=2500)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--learning-rate", type=float, default=3e-3)
    parser.add_argument("--seed", type=int, default=0)
    train(parser.parse_args())


if __name__ == "__main__":
    main()
