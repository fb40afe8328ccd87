"""Train the demo teacher: a stock `QwenImagePipeline` of 16 blocks on the shapes world, on a CPU or a GPU.

    python -m ppcl.demo.train_vae --output demo/checkpoints/vae
    python -m ppcl.demo.train_teacher --vae demo/checkpoints/vae --output demo/teacher

Rectified flow on the VAE's latents (Liu et al. 2022, arXiv 2209.03003): `x_t = (1 - t) x + t e`, target `e - x`. Each
latent is encoded once. The run writes a checkpoint every few minutes and the same command continues from it.
"""

from __future__ import annotations

import argparse
import json
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from diffusers import (
    AutoencoderKLQwenImage,
    FlowMatchEulerDiscreteScheduler,
    QwenImagePipeline,
    QwenImageTransformer2DModel,
)
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from ppcl.demo import text, world
from ppcl.demo.score_teacher import score
from ppcl.demo.train_vae import Z_DIM, scenes, single_frame_convolutions, to_unit
from ppcl.storage.atomic import replacing

BLOCKS, HEADS, HEAD_DIM = 16, 4, 24
TEXT_LENGTH = 15  # tokens of the longest caption, template included
UNCONDITIONAL_SHARE = 0.05
EMA_DECAY = 0.999
SHIFT = 2.0  # what an image shows is settled at high noise: sample there more closely
# Scenes of these come more often: they are learnt last.
CATEGORY_WEIGHT = {"position": 3.0, "counting": 2.0}
GRID = [(1, 4, 4)]  # the latent 8 × 8 in patches of 2


def new_transformer() -> QwenImageTransformer2DModel:
    model = QwenImageTransformer2DModel(
        patch_size=2,
        in_channels=4 * Z_DIM,
        out_channels=Z_DIM,
        num_layers=BLOCKS,
        attention_head_dim=HEAD_DIM,
        num_attention_heads=HEADS,
        joint_attention_dim=text.WIDTH,
        axes_dims_rope=(8, 8, 8),
    )
    # adaLN-Zero (Peebles & Xie 2023, arXiv 2212.09748): every block starts as the identity.
    for block in model.transformer_blocks:
        for modulation in (block.img_mod[1], block.txt_mod[1]):
            torch.nn.init.zeros_(modulation.weight)
            torch.nn.init.zeros_(modulation.bias)
    torch.nn.init.zeros_(model.proj_out.weight)
    torch.nn.init.zeros_(model.proj_out.bias)
    return model


def new_pipeline(vae: AutoencoderKLQwenImage, transformer: QwenImageTransformer2DModel, seed: int) -> QwenImagePipeline:
    tokenizer = text.new_tokenizer()
    pipeline = QwenImagePipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(shift=SHIFT),
        vae=vae,
        text_encoder=text.new_text_encoder(len(tokenizer), seed),
        tokenizer=tokenizer,
        transformer=transformer,
    )
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


@torch.no_grad()
def encode_scenes(vae: AutoencoderKLQwenImage, count: int, seed: int, device: str) -> tuple[torch.Tensor, list[str]]:
    """Normalised, packed latents `(count, 16, 32)` of training scenes, with their captions."""
    pictures, texts = scenes(count, np.random.default_rng(seed))
    return encode_pictures(vae, pictures, device), texts


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


@dataclass(frozen=True)
class Scenes:
    """The training set on the device: latents `(n, 16, 32)`, the number of each caption, and how often it is drawn.

    `embeddings (v, L, text width)` and `masks (v, L)`: the encoded captions by number; the last one is the empty one.
    """

    latents: torch.Tensor
    captions: torch.Tensor
    weights: torch.Tensor
    embeddings: torch.Tensor
    masks: torch.Tensor

    @classmethod
    def of(cls, pipeline: QwenImagePipeline, options: argparse.Namespace) -> Scenes:
        """Encoded once, and kept in the work folder."""
        cache = options.work / "latents.safetensors"
        if not cache.exists():
            options.work.mkdir(parents=True, exist_ok=True)
            latents, texts = encode_scenes(pipeline.vae, options.scenes, options.seed, options.device)
            save_file({"latents": latents}, cache, metadata={"texts": json.dumps(texts)})
        with safe_open(cache, "pt") as file:
            latents, texts = file.get_tensor("latents"), json.loads(file.metadata()["texts"])
        vocabulary = [*sorted(set(texts)), " "]
        number = {caption: index for index, caption in enumerate(vocabulary)}
        category = {caption.text: caption.category for caption in world.captions()}
        pipeline.text_encoder.to(options.device)
        embeddings, masks = text.encode(pipeline, vocabulary, TEXT_LENGTH)
        return cls(
            latents.to(options.device),
            torch.tensor([number[caption] for caption in texts], device=options.device),
            torch.tensor([CATEGORY_WEIGHT.get(category[caption], 1.0) for caption in texts]),
            embeddings.to(options.device),
            masks.to(options.device),
        )


class TeacherTraining:
    """The transformer in training: optimizer, average of the weights, loss curve, and their checkpoint."""

    def __init__(self, model: QwenImageTransformer2DModel, options: argparse.Namespace):
        self.model, self.options, self.work = model, options, options.work
        self.parameters = dict(model.named_parameters())
        self.ema = {name: p.detach().clone() for name, p in self.parameters.items()}
        self.optimizer = torch.optim.AdamW(
            model.parameters(), lr=options.learning_rate, betas=(0.9, 0.98), weight_decay=0.01, fused=True
        )
        self.step = 0
        self.curve: list[dict] = []

    def train_step(self, scenes: Scenes) -> float:
        """One step on a batch that the step's number alone decides; gives the loss."""
        self._set_rate()
        loss = self._loss(scenes)
        self.model.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        with torch.no_grad():
            weight = 1 - min(EMA_DECAY, (self.step + 1) / (self.step + 10))
            torch._foreach_lerp_(list(self.ema.values()), [p.detach() for p in self.parameters.values()], weight)
        self.step += 1
        return loss.item()

    def _set_rate(self) -> None:
        # Constant, then to zero in the last third (warmup-stable-decay).
        steps = self.options.steps
        share = min(1.0, (self.step + 1) / 200, 3 * (steps - self.step) / steps)
        for group in self.optimizer.param_groups:
            group["lr"] = self.options.learning_rate * share

    def _loss(self, scenes: Scenes) -> torch.Tensor:
        options, device, batch = self.options, self.options.device, self.options.batch
        # Seeded by the step: a continued run sees the batches an undisturbed one would have seen.
        generator = torch.Generator().manual_seed(options.seed * 1_000_003 + self.step)
        rows = torch.multinomial(scenes.weights, batch, replacement=True, generator=generator).to(device)
        noise = torch.randn(batch, *scenes.latents.shape[1:], generator=generator).to(device)
        t = torch.sigmoid(0.6 + 1.2 * torch.randn(batch, generator=generator)).to(device)
        drop = torch.rand(batch, generator=generator).to(device) < UNCONDITIONAL_SHARE
        index = torch.where(drop, len(scenes.embeddings) - 1, scenes.captions[rows])
        clean = scenes.latents[rows]
        noisy = (1 - t)[:, None, None] * clean + t[:, None, None] * noise
        with torch.autocast(device, torch.bfloat16, enabled=device == "cuda"):
            velocity = self.model(
                hidden_states=noisy,
                timestep=t,
                encoder_hidden_states=scenes.embeddings[index],
                encoder_hidden_states_mask=scenes.masks[index],
                img_shapes=[GRID] * batch,
                return_dict=False,
            )[0]
        return (velocity.float() - (noise - clean)).square().mean()

    def save(self) -> None:
        """Write a checkpoint beside the old one, then take its place in one rename."""
        tensors = {f"ema.{name}": value for name, value in self.ema.items()}
        tensors |= {f"model.{name}": p.data for name, p in self.parameters.items()}
        for name, p in self.parameters.items():
            state = self.optimizer.state.get(p, {})
            tensors |= {f"optimizer.{name}.{key}": value for key, value in state.items() if key != "step"}
        contiguous = {name: tensor.contiguous() for name, tensor in tensors.items()}
        with replacing(self.work / "checkpoint.safetensors") as partial:
            save_file(contiguous, partial, metadata={"step": str(self.step)})
            (self.work / "curve.json").write_text(json.dumps(self.curve))

    @torch.no_grad()
    def load(self) -> None:
        """Resume from the work folder's checkpoint; does nothing where there is none."""
        path = self.work / "checkpoint.safetensors"
        if not path.exists():
            return
        state = load_file(path, device=self.options.device)
        with safe_open(path, "pt") as file:
            self.step = int(file.metadata()["step"])
        self.curve = [c for c in json.loads((self.work / "curve.json").read_text()) if c["step"] < self.step]
        for name, p in self.parameters.items():
            p.copy_(state[f"model.{name}"])
            self.ema[name].copy_(state[f"ema.{name}"])
            if f"optimizer.{name}.exp_avg" in state:
                moments = {key: state[f"optimizer.{name}.{key}"] for key in ("exp_avg", "exp_avg_sq")}
                self.optimizer.state[p] = {"step": torch.tensor(float(self.step)), **moments}
        print(f"continuing from step {self.step}", flush=True)

    @torch.no_grad()
    def use_ema(self) -> None:
        """Put the average of the weights in their place."""
        for name, p in self.parameters.items():
            p.copy_(self.ema[name])


def train(options: argparse.Namespace) -> tuple[QwenImagePipeline, list[dict]]:
    """Train the transformer; gives the whole pipeline and the loss curve."""
    torch.manual_seed(options.seed)
    vae = AutoencoderKLQwenImage.from_pretrained(options.vae).to(options.device).eval()
    model = new_transformer().to(options.device)
    pipeline = new_pipeline(vae, model, options.seed)
    scenes = Scenes.of(pipeline, options)
    training = TeacherTraining(model, options)
    training.load()
    if options.compile:
        model.compile_repeated_blocks()
    first, started_at, running = training.step, time.monotonic(), None
    for step in range(first, options.steps):
        loss, last = training.train_step(scenes), step == options.steps - 1
        running = loss if running is None else 0.98 * running + 0.02 * loss
        if step % 50 == 0 or last:
            training.curve.append({"step": step, "loss": round(running, 5)})
            pace = (time.monotonic() - started_at) / (step + 1 - first)
            left = pace * (options.steps - step - 1) / 60
            print(f"step {step}/{options.steps} loss {running:.4f} {pace:.2f} s/step, {left:.0f} min left", flush=True)
        if (step + 1) % options.checkpoint_every == 0 or last:
            training.save()
    training.use_ema()
    return pipeline, training.curve


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--vae", type=Path, required=True, help="folder written by ppcl.demo.train_vae")
    parser.add_argument("--output", type=Path, required=True, help="the pipeline folder to write")
    parser.add_argument("--work", type=Path, default=Path("demo/checkpoints/teacher"), help="checkpoints and latents")
    parser.add_argument("--steps", type=int, default=16000)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--learning-rate", type=float, default=2e-3)
    parser.add_argument("--scenes", type=int, default=24000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--checkpoint-every", type=int, default=250)
    parser.add_argument("--sampling-steps", type=int, default=20)
    parser.add_argument("--per-category", type=int, default=100)
    parser.add_argument("--compile", action="store_true")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    options = parser.parse_args()
    pipeline, curve = train(options)
    pipeline.to("cpu").save_pretrained(options.output)
    scores = score(pipeline, options.per_category, options.sampling_steps, seed=1)
    record = {
        "seed": options.seed,
        "steps": options.steps,
        "batch": options.batch,
        "scenes": options.scenes,
        "learning_rate": options.learning_rate,
        "sampling_steps": options.sampling_steps,
        "images_per_category": options.per_category,
        "scores": scores,
        "vae": json.loads((options.vae / "training.json").read_text()),
        "curve": curve,
    }
    (options.output / "training.json").write_text(json.dumps(record, indent=1))
    print(json.dumps(scores, indent=1))


if __name__ == "__main__":
    main()
