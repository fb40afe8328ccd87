"""Train the demo teacher's autoencoder, a small stock `AutoencoderKLQwenImage`, on boards of the shapes world.

    python -m ppcl.demo.train_vae --output demo/checkpoints/vae

Factor 8 in space: a 64 × 64 image becomes an 8 × 8 latent of 8 channels, that is 16 tokens of 32 for the transformer.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import AutoencoderKLQwenImage
from diffusers.models.autoencoders import autoencoder_kl_qwenimage
from torch.nn import functional as F

from ppcl.demo import world

Z_DIM = 8
KL_WEIGHT = 1e-4


def new_vae() -> AutoencoderKLQwenImage:
    return AutoencoderKLQwenImage(
        base_dim=16,
        z_dim=Z_DIM,
        dim_mult=[1, 2, 2, 2],
        num_res_blocks=1,
        temperal_downsample=[False, True, True],
        latents_mean=[0.0] * Z_DIM,
        latents_std=[1.0] * Z_DIM,
    )


@contextlib.contextmanager
def single_frame_convolutions() -> Iterator[None]:
    """Compute the VAE's causal 3D convolutions as 2D ones while the input is one frame.

    A causal kernel over one frame meets zeros in all but its last time slice, so the result is the same up to rounding
    (2e-6 seen) and half the time on a CPU.
    """
    convolution = autoencoder_kl_qwenimage.QwenImageCausalConv3d
    stock = convolution.forward

    def forward(self: Any, x: torch.Tensor, cache_x: torch.Tensor | None = None) -> torch.Tensor:
        if x.shape[2] != 1 or cache_x is not None or self.stride[0] != 1:
            return stock(self, x, cache_x)
        padding = (self._padding[2], self._padding[0])
        return F.conv2d(x[:, :, 0], self.weight[:, :, -1], self.bias, self.stride[1:], padding).unsqueeze(2)

    convolution.forward = forward
    try:
        yield
    finally:
        convolution.forward = stock


def scenes(
    count: int,
    rng: np.random.Generator,
    held_out: bool = False,
    change: Callable[[world.Thing], world.Thing] = lambda thing: thing,
) -> tuple[torch.Tensor, list[str]]:
    """`count` images `(count, 3, 64, 64)` uint8 with their captions, the categories equally often.

    `change`: what is drawn in place of a shape.
    """
    pools = [
        [c.text for c in world.captions() if c.category == category and (held_out or not c.held_out)]
        for category in world.CATEGORIES
    ]
    texts = [pools[i % len(pools)][rng.integers(len(pools[i % len(pools)]))] for i in rng.permutation(count)]
    pictures = np.stack([world.render([change(thing) for thing in world.scene(text, rng)]) for text in texts])
    return torch.from_numpy(pictures).permute(0, 3, 1, 2).contiguous(), texts


def to_unit(pictures: torch.Tensor) -> torch.Tensor:
    """uint8 `(B, 3, H, W)` to the VAE's input `(B, 3, 1, H, W)` in [-1, 1]."""
    return (pictures.float() / 127.5 - 1).unsqueeze(2)


def drawing_loss(drawn: torch.Tensor, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The loss of drawn pictures `(B, 3, H, W)` against `x`, and the mean error of a pixel."""
    # Pixels at a shape's rim are few and matter most: weight by the distance from the background.
    ink = ((x - x[:, :, :1, :1]).abs().amax(1, keepdim=True) > 0.05).float()
    ink = F.max_pool2d(ink, 5, 1, 2)
    error = (drawn - x).abs()
    # The square pulls apart two colours that the absolute value alone settles on the nearer one of.
    return ((error + 2 * error**2) * (1 + 4 * ink)).mean(), error.mean()


def count_right(drawn: torch.Tensor, captions: list[str]) -> int:
    """How many of the pictures `(B, 3, H, W)` in [-1, 1] the checker finds right."""
    pictures = ((drawn.clamp(-1, 1) + 1) * 127.5).round().byte().permute(0, 2, 3, 1).cpu()
    return sum(world.check(p.numpy(), t) for p, t in zip(pictures, captions, strict=True))


def train(
    steps: int, batch: int, learning_rate: float, seed: int, output: Path, device: str, start: Path | None
) -> None:
    torch.manual_seed(seed)
    rng = np.random.default_rng(seed)
    vae = new_vae().to(device)
    if start is not None:
        vae.load_state_dict(AutoencoderKLQwenImage.from_pretrained(start).state_dict())
    optimizer = torch.optim.AdamW(vae.parameters(), lr=learning_rate, betas=(0.9, 0.98), weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, learning_rate, total_steps=steps, pct_start=0.05)
    curve: list[dict[str, Any]] = []
    started_at = time.monotonic()
    with single_frame_convolutions():
        for step in range(steps):
            pictures = np.stack([world.render(world.board(rng)) for _ in range(batch)])
            x = to_unit(torch.from_numpy(pictures).permute(0, 3, 1, 2)).to(device)
            posterior = vae.encode(x).latent_dist
            reconstruction, error = drawing_loss(vae.decode(posterior.sample()).sample[:, :, 0], x[:, :, 0])
            # Ramped up: from the first step on, this weight collapses the posterior onto the prior.
            loss = (
                reconstruction
                + KL_WEIGHT * (1.0 if start is not None else min(1.0, 2 * step / steps)) * posterior.kl().mean() / Z_DIM
            )
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            torch.nn.utils.clip_grad_norm_(vae.parameters(), 1.0)
            optimizer.step()
            schedule.step()
            if step % 20 == 0 or step == steps - 1:
                curve.append({"step": step, "l1": error.item(), "kl": posterior.kl().mean().item()})
                pace = (time.monotonic() - started_at) / (step + 1)
                print(
                    f"vae step {step}/{steps} l1 {curve[-1]['l1']:.4f} kl {curve[-1]['kl']:.1f} {pace:.2f} s/step",
                    flush=True,
                )
        vae.eval()
        with torch.no_grad():
            held_out, texts = scenes(600, np.random.default_rng(seed + 1), held_out=True)
            latents, right = [], 0
            for chunk, captions in zip(held_out.split(50), [texts[i : i + 50] for i in range(0, 600, 50)], strict=True):
                z = vae.encode(to_unit(chunk).to(device)).latent_dist.mode()
                latents.append(z.cpu())
                right += count_right(vae.decode(z).sample[:, :, 0], captions)
    z = torch.cat(latents)
    vae.register_to_config(
        latents_mean=z.mean((0, 2, 3, 4)).tolist(),
        latents_std=z.std((0, 2, 3, 4)).tolist(),
    )
    vae.save_pretrained(output)
    before: dict[str, Any] = {"steps": 0, "curve": []}
    if start is not None:
        before = json.loads((start / "training.json").read_text())
    curve = before["curve"] + [c | {"step": c["step"] + before["steps"]} for c in curve]
    steps += before["steps"]
    record = {"seed": seed, "steps": steps, "batch": batch, "reconstructions_right": right / 600, "curve": curve}
    (output / "training.json").write_text(json.dumps(record, indent=1))
    print(f"reconstructions that the checker finds right: {right / 600:.3f}; written to {output}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=800)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--learning-rate", type=float, default=2e-3)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--start", type=Path, help="go on from the weights in this folder, with a fresh schedule")
    parser.add_argument("--output", type=Path, required=True)
    options = parser.parse_args()
    train(
        options.steps, options.batch, options.learning_rate, options.seed, options.output, options.device, options.start
    )


if __name__ == "__main__":
    main()
